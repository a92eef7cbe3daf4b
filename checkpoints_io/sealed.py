"""The facts of a checkpoint under a seal: they are read exactly as written, or refused."""

from collections.abc import Mapping
import hashlib
import json
from typing import Any

from jaxtyping import PyTree

from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import BadInput

Facts = dict[str, Any]  # what a checkpoint says about itself, as JSON values

FORMAT = 2


def with_bits(
    step: int, facts: Mapping[str, object], trees: Mapping[str, PyTree]
) -> dict[str, object]:
    """Adds format, step and the fingerprint of each tree to the facts of a checkpoint."""
    bits = {name: fingerprint(tree) for name, tree in trees.items()}
    return dict(facts) | {"format": FORMAT, "step": step, "bits": bits}


def closed(facts: Mapping[str, object]) -> dict[str, object]:
    """Facts as they are stored: as text, with its SHA-256."""
    text = json.dumps(facts)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"format": FORMAT, "json": text, "sha256": sha256}


def opened(kept: Facts, step: int) -> dict[str, object]:
    """The facts of the checkpoint of a step; those of another format unchecked, to be reported.

    Raises:
      ValueError: they have changed since they were written, or belong to another checkpoint.
    """
    if "json" not in kept and kept["format"] != FORMAT:
        return kept
    if hashlib.sha256(kept["json"].encode()).hexdigest() != kept["sha256"]:
        raise BadInput("its facts are not those that were written")
    facts = json.loads(kept["json"])
    if facts["step"] != step:
        raise BadInput(f"it is the checkpoint of step {facts['step']}")
    return facts


def refuse_other_format(facts: Mapping[str, object], whose: str) -> None:
    """Refuses a checkpoint whose format is not the one that this version writes.

    Raises:
      ValueError: another version of this file wrote it.
    """
    if facts.get("format") != FORMAT:
        raise BadInput(
            f"{whose} has format {facts.get('format')}, but this program reads {FORMAT}: resume it "
            "with the version that wrote it, or start in another directory"
        )


def refuse_other_bits(trees: Mapping[str, PyTree], facts: Mapping[str, Any]) -> None:
    """Refuses trees whose fingerprints differ from those in the facts.

    Raises:
      ValueError: a bit has changed since it was written.
    """
    for name, tree in trees.items():
        if fingerprint(tree) != facts["bits"][name]:
            raise BadInput(f"the bits of its {name} are not those that were written")

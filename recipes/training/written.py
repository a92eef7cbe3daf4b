"""Settings that are written as text, and what they mean."""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.rows import source
from recipes.training.settings import trains_on_pairs

DTYPES = {
    "f32": np.dtype(np.float32),
    "float32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "float16": np.dtype(np.float16),
}
# Metrics that can choose the best checkpoint, and whether higher is better.
BEST_BY = {
    "loss": False,
    "dpo_loss": False,
    "dpo_accuracy": True,
    "dpo_reward_margin": True,
    "dpo_margin_policy": True,
}


def loss_terms(text: str) -> list[tuple[str, str | None]]:
    """The losses of `sigmoid,sft=0.2`, by name, each with its weight as it is written."""
    parts = ([x.strip() for x in part.partition("=")] for part in text.split(","))
    return [(name, number if sign else None) for name, sign, number in parts]


def rows_of(given: Mapping[str, Any]) -> source.Rows:
    """What a row must hold for the loss of these settings."""
    if not trains_on_pairs(given):
        return source.Rows(single=True, labelled=False)
    labelled = any(name in source.UNPAIRED for name, _ in loss_terms(given.get("loss", "")))
    return source.Rows(single=labelled, labelled=labelled)


class Precision(NamedTuple):
    """Dtypes of the stored weights and of the computation."""

    params: np.dtype
    compute: np.dtype


def precision(mp: str) -> Precision:
    """Parses `p=f32,c=bfloat16`.

    Raises:
      ValueError: it is written otherwise, or names dtypes that do not train.
    """
    try:
        given = dict(part.split("=") for part in mp.split(","))
        read = Precision(DTYPES[given.pop("p")], DTYPES[given.pop("c")])
    except (ValueError, KeyError) as error:
        raise BadInput(f"--config.mp={mp!r} is not of the form p=f32,c=bfloat16") from error
    if given or read.compute == np.float16 or read.params == np.float16:
        raise BadInput(f"--config.mp={mp!r}: p and c may be f32 or bfloat16")
    if read.params != np.float32:
        raise BadInput(
            f"--config.mp={mp!r}: bfloat16 weights do not change at the learning rates of "
            "fine-tuning; use p=f32"
        )
    return read


def profiled(steps: str | None) -> range:
    """The steps of `11-13`; an empty range for None.

    Raises:
      ValueError: it is written otherwise.
    """
    if steps is None:
        return range(0)
    found = re.fullmatch(r"(\d+)-(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise BadInput(f"--config.profile={steps!r} is not of the form 11-13")
    return range(int(found[1]), int(found[2]) + 1)


def steps_at(steps: str | None) -> frozenset[int]:
    """The steps of `1,5,25`; none for None.

    Raises:
      ValueError: it is written otherwise.
    """
    if steps is None:
        return frozenset()
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", steps):
        raise BadInput(f"--config.eval_at={steps!r} is not of the form 1,5,25")
    return frozenset(map(int, steps.split(",")))

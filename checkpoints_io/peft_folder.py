"""A folder of adapters as PEFT keeps it: adapter_config.json and adapter_model.safetensors.

Beside them a file of our own, trained_on.json, says which weights they were trained on; other
programs do not look at it. (Metadata of safetensors are written in any order: a folder would not be
the same twice.)

Source: peft 0.21 (peft/tuners/lora/config.py, peft/utils/save_and_load.py).
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from checkpoints_io import hf_export, hf_folder, hf_weights
from checkpoints_io.errors import BadInput, NotFound

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED_ON = "trained_on.json"
FILES = [CONFIG, WEIGHTS, TRAINED_ON]
PREFIX = "base_model.model."

# What is no LoRA of this zoo, by the key that says so, and the remedy.
REFUSED = {
    "modules_to_save": "whole weights beside the adapters: merge them into the base with PEFT",
    "trainable_token_indices": "tokens of its own: merge it into the base with PEFT",
    "lora_bias": "biases of its own: merge it into the base with PEFT",
    "alora_invocation_tokens": "an adapter that begins in the middle of a text (aLoRA)",
    "layer_replication": "layers that stand for others: merge it into the base with PEFT",
    "use_qalora": "QALoRA's pooled inputs: merge it into the base with PEFT",
    "megatron_config": "Megatron's layers: merge it into the base with PEFT",
}
# Beginnings that change the base too, so that without its adapter it is not the base any more.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Said(NamedTuple):
    """What adapter_config.json says, by PEFT's names."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_model_name_or_path: str | None
    revision: str | None
    lora_dropout: float


def read_config(folder: pathlib.Path) -> Said:
    """The adapter_config.json of a folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another kind of adapter, or of a part that is not read here.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise NotFound(f"{folder} is not a folder of adapters: it has no {CONFIG}")
    given = hf_folder.read_json(path)
    refuse = lambda why: BadInput(f"{path} asks for {why}")
    if (kind := given.get("peft_type")) != "LORA":
        raise refuse(f"peft_type {kind!r}, and only LORA is read here")
    for key, what in REFUSED.items():
        if given.get(key):
            raise refuse(f"{key}, which is {what}")
    if (bias := given.get("bias", "none")) != "none":
        raise refuse(f"bias={bias!r}: merge it into the base with PEFT")
    begun = given.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise refuse(
            f"init_lora_weights={begun!r}, which changes the base too: convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    kinds = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float)}
    kinds |= dict.fromkeys(("rank_pattern", "alpha_pattern"), dict)
    usual = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
    values: dict[str, Any] = {name: given.get(name, usual.get(name)) for name in Said._fields}
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = values[name] or {}
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise refuse(f"{name}={values[name]!r}")
    for name in ("use_rslora", "use_dora"):
        values[name] = bool(values[name])
    return Said(**values)


@contextlib.contextmanager
def tensors(folder: pathlib.Path) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """The tensors of a folder, open for reading in parts, and what it says it was trained on.

    Their names are without PEFT's prefix.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it is not whole.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        other = folder / "adapter_model.bin"
        why = "a pickle, which is not opened here: load and save it again with PEFT"
        hint = f": {other.name} is {why}" if other.is_file() else ""
        raise NotFound(f"{folder} has no {WEIGHTS}{hint}")
    with hf_weights.opened(path) as file:
        names = file.keys()
        found = {name.removeprefix(PREFIX): file.get_slice(name) for name in names}
        facts = hf_folder.read_if_there(folder / TRAINED_ON)
        yield found, {name: str(value) for name, value in facts.items()}


def write(
    folder: pathlib.Path,
    config: Mapping[str, object],
    arrays: Mapping[str, np.ndarray],
    trained_on: Mapping[str, str],
) -> None:
    """Writes a folder that PEFT and vLLM read; names are without PEFT's prefix.

    `trained_on` are facts of the frozen weights.
    """
    named = {PREFIX + name: np.ascontiguousarray(value) for name, value in arrays.items()}
    hf_export.write_file(named, folder / WEIGHTS)
    (folder / TRAINED_ON).write_text(json.dumps(dict(trained_on), indent=2) + "\n")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

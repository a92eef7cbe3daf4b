"""Reads Gemma 4's layers from a config.json: which have full attention, which share keys."""

from collections.abc import Mapping
import re

from checkpoints_io.errors import BadInput
from zoo.parts import hf_config, rope_config
from zoo.parts.hf_config import FULL, SLIDING

# The default of transformers, for files that omit it.
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
COUNTS = ("hidden_size_per_layer_input", "num_kv_shared_layers")  # 0 means the feature is off


def read(hf: dict[str, object]) -> dict[str, object]:
    """Adds a rope per kind of layer; every sixth one and the last have full attention.

    Raises:
      ValueError: the keys about layers contradict each other.
    """
    if hf.get("use_bidirectional_attention") == "vision":  # affects images only
        hf = hf | {"use_bidirectional_attention": False}
    hf = last_is_full(hf_config.every(hf, 6))
    if hf.get("rope_parameters") is None:
        hf["rope_parameters"] = ROPES
    return rope_config.read_two(of_full_layers(counted(hf)), theta=1e6, sliding_theta=1e4)


def last_is_full(hf: Mapping[str, object]) -> dict[str, object]:
    """Makes the last layer full attention, as transformers does whatever the file says."""
    listed = hf.get("layer_types")
    full = {"layer_types": [*listed[:-1], FULL]} if isinstance(listed, list) and listed else {}
    return dict(hf) | full


def counted(hf: Mapping[str, object]) -> dict[str, object]:
    """Replaces counts of 0 by None.

    Raises:
      ValueError: layers would share keys of a kind that no earlier layer has.
    """
    found = dict(hf) | {key: hf.get(key) or None for key in COUNTS}
    shared: object = found["num_kv_shared_layers"]
    listed: object = hf.get("layer_types")
    if not shared or not isinstance(shared, int) or not isinstance(listed, list):
        return found
    own = listed[: max(len(listed) - shared, 0)]
    if lost := {str(kind) for kind in listed if kind not in own}:
        raise BadInput(
            f"config.json: the last num_kv_shared_layers={shared} of {len(listed)} layers would "
            f"use the keys of an earlier {sorted(lost)[0]} layer, but there is none"
        )
    return found


def written(said: Mapping[str, object]) -> dict[str, object]:
    """The way back."""
    return dict(said) | {key: said[key] or 0 for key in COUNTS if key in said}


def of_full_layers(hf: dict[str, object]) -> dict[str, object]:
    """Reads the settings of full-attention layers, which transformers 5 writes layer by layer."""
    rest, listed = dict(hf), hf.get("layer_types")
    own = rest.pop("per_layer_config", None)
    if own is None or not isinstance(listed, list):
        return hf
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    full = {i for i, kind in enumerate(listed) if kind == FULL}
    if not isinstance(own, dict) or _numbers(own) != full:
        return hf  # refused by the name of the key
    given, *others = own.values()
    odd = not isinstance(given, dict) or given.keys() - names.keys()
    if odd or any(other != given for other in others):
        return hf
    return rest | {names[key]: value for key, value in given.items()}


def _numbers(by_layer: dict[str, object]) -> set[int | None]:
    """The numbers of the layers that have an entry, such as "05" if there are more than ten."""
    return {int(key) if re.fullmatch("[0-9]{1,9}", key) else None for key in by_layer}

"""PEFT's adapters on tensors that hold all experts of a layer, read as those of each expert.

transformers 5 keeps gate and up of a layer's experts in one tensor and down in another. PEFT wraps
both (`target_parameters`): of A the expert is the slow index of rows, of B the fast one of columns.

Source: peft 0.21, ParamWrapper of peft/tuners/lora/layer.py.
"""

from collections.abc import Mapping
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from checkpoints_io import hf_weights
from checkpoints_io.errors import BadInput
from zoo import targets
from zoo.models import Model

WRAPPED = re.compile(
    r"((?:.*\.)?layers\.(\d+)\..*experts(?:\.base_layer)?)\.lora_([AB])(\.weight)?"
)


class Piece(NamedTuple):
    """A part of a tensor, asked for as a file's tensors are."""

    array: np.ndarray

    def get_shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def __getitem__(self, index: Any) -> Any:
        """Some of it, or all of it."""
        return self.array if index is Ellipsis else self.array[index]


def apart(
    model: Model, tensors: Mapping[str, Any], folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors with one for each expert, and what each expert's module is called in patterns.

    Raises:
      ValueError: they have the shape of no expert of the model.
    """
    found = {name: tensor for name, tensor in tensors.items() if not WRAPPED.fullmatch(name)}
    weights, sizes = targets.linear(model), model.config.sizes
    if len(found) == len(tensors) or "{E}" not in _entry(weights, "gate").name:
        return dict(tensors), {}
    E, D, F = (sizes[letter] for letter in "EDF")
    wrapped: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name in tensors.keys() - found.keys():
        met = WRAPPED.fullmatch(name)
        assert met is not None
        at, layer, which, _ = met.groups()
        wrapped.setdefault((at, int(layer)), {})[which] = np.asarray(tensors[name][...])
    called: dict[str, str] = {}
    for (at, layer), both in wrapped.items():
        a, b = both.get("A", np.zeros((0, 0))), both.get("B", np.zeros((0, 0)))
        rank, own = len(a) // E, at.removesuffix(".base_layer")
        if a.shape == (E * rank, D) and b.shape == (2 * F, rank * E):
            parts, whole = {"gate": slice(F), "up": slice(F, None)}, f"{own}.gate_up_proj"
        elif a.shape == (E * rank, F) and b.shape == (D, rank * E):
            parts, whole = {"down": slice(None)}, f"{own}.down_proj"
        else:
            raise BadInput(
                f"{folder}: the adapters of {at} have shapes {a.shape} and {b.shape}, which fit no "
                "experts of the model: is it the adapter of another?"
            )
        by_expert = a.reshape(E, rank, -1), b.reshape(len(b), rank, E)
        for weight, rows in parts.items():
            entry = _entry(weights, weight)
            n = layer if entry.layers is None else entry.layers.index(layer)
            for e in range(E):
                module = hf_weights.hf_name(entry, (n, e)).removesuffix(".weight")
                found[f"{module}.lora_A.weight"] = Piece(by_expert[0][e])
                found[f"{module}.lora_B.weight"] = Piece(by_expert[1][rows, :, e])
                called[module] = whole
    return found, called


def _entry(weights: Mapping[str, Any], name: str) -> hf_weights.Entry:
    nothing = hf_weights.Entry("", "")
    return weights[f"blocks.mlp.{name}"][1] if f"blocks.mlp.{name}" in weights else nothing

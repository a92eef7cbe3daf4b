"""Splits PEFT's adapters on fused expert tensors into adapters of each expert.

transformers 5 stores gate and up of a layer's experts in one tensor and down in another. PEFT wraps
both (`target_parameters`): the expert is the slow index of rows in A, the fast one of columns in B.

Source: peft 0.21, ParamWrapper of peft/tuners/lora/layer.py.
"""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any, NamedTuple

import einops
import numpy as np

from checkpoints_io import hf_names, peft_folder
from checkpoints_io.errors import BadInput
from zoo import targets

# The module, its layer, and which of the two.
WRAPPED = re.compile(r"((?:.*\.)?layers\.(\d+)\..*experts(?:\.base_layer)?)\.lora_([AB])\.weight")
# To rows, columns and experts.
FORMS = {"A": "(E R) D -> R D E", "B": "F (R E) -> F R E"}


class Piece(NamedTuple):
    """A part of a tensor, with the interface of a tensor in a file."""

    shape: tuple[int, int]
    whole: Callable[[], np.ndarray]  # rows by columns by expert, read when it is first asked for
    rows: slice
    expert: int

    def get_shape(self) -> list[int]:
        """The shape of this part."""
        return [*self.shape]

    def __getitem__(self, index: Any) -> Any:
        """Reads an index of this part, or all of it."""
        return self.whole()[self.rows, :, self.expert][index]


def apart(
    weights: targets.Matrices, opened: peft_folder.Opened
) -> tuple[dict[str, object], dict[str, str]]:
    """Splits tensors by expert, and returns the name of each expert's module in patterns.

    Raises:
      ValueError: their shapes fit no experts of the model.
    """
    met = {name: found for name in opened.tensors if (found := WRAPPED.fullmatch(name))}
    found = {name: tensor for name, tensor in opened.tensors.items() if name not in met}
    if not met or not any("{E}" in entry.name for _, entry in weights.values()):
        return dict(opened.tensors), {}
    wrapped = {}
    for name, (at, layer, which) in ((name, one.groups()) for name, one in met.items()):
        wrapped.setdefault((at, int(layer)), {})[which] = opened.tensors[name]
    called: dict[str, str] = {}
    for (at, layer), both in wrapped.items():
        shapes = [[*both[which].get_shape()] if which in both else [0, 0] for which in "AB"]
        there = _of_layer(weights, layer)
        parts, whole = _parts(there, at.removesuffix(".base_layer"), shapes)
        if not parts:
            raise BadInput(
                f"{opened.folder}: the adapters of {at} have shapes {shapes[0]} and {shapes[1]}, "
                "which fit no experts of the model: is it the adapter of another?"
            )
        E = there["down"].sizes["E"]
        rank, into = shapes[0][0] // E, shapes[0][1]
        a, b = (_by_expert(both[which], form, E) for which, form in FORMS.items())
        for part, rows in parts.items():
            made = len(range(shapes[1][0])[rows])
            for e in range(E):
                index = there[part].number, e
                module = hf_names.at(there[part].entry, index).removesuffix(".weight")
                found[f"{module}.lora_A.weight"] = Piece((rank, into), a, slice(None), e)
                found[f"{module}.lora_B.weight"] = Piece((made, rank), b, rows, e)
                called[module] = whole
    return found, called


class Experts(NamedTuple):
    """The experts of one layer within one of our weights."""

    entry: hf_names.Entry
    sizes: dict[str, int]
    number: int  # of the layer in the weight


def _of_layer(weights: targets.Matrices, layer: int) -> dict[str, Experts]:
    """The experts of a layer by role (gate, up, down); empty if the layer has none."""
    found = {}
    for path, (param, entry) in weights.items():
        if "{E}" in entry.name and (number := _number(entry, layer)) != -1:
            sizes = dict(zip(param.axes.split(), param.shape, strict=True))
            found[path.rpartition(".")[2]] = Experts(entry, sizes, number)
    return found


def _parts(
    there: Mapping[str, Experts], module: str, shapes: list[list[int]]
) -> tuple[dict[str, slice], str]:
    """Our weights that a pair of tensors belongs to, and the rows; empty if they fit no expert."""
    if not {"gate", "up", "down"} <= there.keys():
        return {}, module
    E, D, F = (there["down"].sizes[letter] for letter in "EDF")
    rank = shapes[0][0] // E
    if rank and shapes == [[E * rank, D], [2 * F, rank * E]]:
        return {"gate": slice(F), "up": slice(F, None)}, f"{module}.gate_up_proj"
    if rank and shapes == [[E * rank, F], [D, rank * E]]:
        return {"down": slice(None)}, f"{module}.down_proj"
    return {}, module


def _number(entry: hf_names.Entry, layer: int) -> int:
    """The index in our weight of a layer of the file; -1: not in it."""
    if entry.layers is None:
        return layer
    return entry.layers.index(layer) if layer in entry.layers else -1


def _by_expert(tensor: Any, form: str, experts: int) -> Callable[[], np.ndarray]:
    return functools.cache(lambda: einops.rearrange(np.asarray(tensor[...]), form, E=experts))

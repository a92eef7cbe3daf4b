"""Tensors that hold all experts of a layer, read as one matrix per expert, and the reverse.

transformers 5 keeps gate and up of a layer's experts in one tensor, and down in another; some files
on the hub hold them so, others one by one, which is how they are read here. Where an architecture
has all in one tensor, programs that quantise matrix by matrix still write them one by one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from checkpoints_io.mxfp4 import Slices


class Packed(NamedTuple):
    """A packed tensor: `mlp.experts.gate_up_proj` holds all `mlp.experts.{E}.gate_proj.weight`."""

    name: str  # the end of the tensor's name
    parts: Sequence[str]  # the parts of one expert, side by side
    width_at: int  # the axis of the model's width; axis 0 is that of experts


class Split(NamedTuple):
    """Tensors that together are one: `experts.gate_up_proj` as `experts.{E}.gate_proj.weight` …."""

    name: str  # the end of the tensor's name in the table
    parts: Sequence[str]  # the parts of one expert, side by side; without {E} merely another name
    turned: bool = False  # the table's matrices are [into, out], those of the files [out, into]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One expert's part of a tensor, with the interface of a safetensors slice."""

    whole: Slices
    expert: int
    place: int  # its index among `count` parts that are side by side
    count: int
    turned: bool

    def get_shape(self) -> list[int]:
        """The shape of the matrix, [rows, columns]."""
        _, *sides = self.whole.get_shape()
        rows, columns = reversed(sides) if self.turned else sides
        return [rows // self.count, columns]

    def get_dtype(self) -> str:
        """As the file spells it."""
        return self.whole.get_dtype()

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the matrix."""
        rows, columns = at
        begin = self.place * self.get_shape()[0]
        rows = slice(begin + rows.start, begin + rows.stop)
        sides = (columns, rows) if self.turned else (rows, columns)
        (found,) = self.whole[(slice(self.expert, self.expert + 1), *sides)]
        return found.T if self.turned else found


def apart(
    tensors: Mapping[str, Slices], packed: Sequence[Packed], *, experts: int, width: int
) -> dict[str, Slices]:
    """The tensors, each packed one as its parts; one that does not fit the model is left as it is.

    Some files have the last two axes swapped, which the model's `width` tells.
    """
    found = dict(tensors)
    for one in packed:
        for name in [name for name in tensors if name.endswith(f".{one.name}")]:
            shape, count = tensors[name].get_shape(), len(one.parts)
            # A header may claim any number of experts, so the loop is over the model's.
            if len(shape) != 3 or shape[0] != experts or width not in shape[1:]:
                continue
            turned = shape[one.width_at] != width
            if shape[2 if turned else 1] % count:
                continue
            whole = found.pop(name)
            for place, part in enumerate(one.parts):
                for expert in range(experts):
                    each = name.removesuffix(one.name) + part.format(E=expert)
                    found[each] = Matrix(whole, expert, place, count, turned)
    return found


@dataclasses.dataclass(frozen=True)
class Stack:
    """The matrices of all experts, or their biases, as one tensor in a file."""

    experts: Sequence[Sequence[Slices]]  # for each expert, the tensors that go side by side
    turned: bool

    def get_shape(self) -> list[int]:
        """The shape: [E, rows, columns], or [E, columns, rows] if turned; for biases [E, rows]."""
        rows = sum(part.get_shape()[0] for part in self.experts[0])
        sides = [rows, *self.experts[0][0].get_shape()[1:]]
        return [len(self.experts), *(reversed(sides) if self.turned else sides)]

    def get_dtype(self) -> str:
        """As the file spells it."""
        return self.experts[0][0].get_dtype()

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of some experts; each of these is read whole."""
        among, *sides = at
        found = []
        for parts in self.experts[among]:
            every = [part[tuple(slice(0, n) for n in part.get_shape())] for part in parts]
            matrix = np.concatenate(every)
            found.append((matrix.T if self.turned else matrix)[tuple(sides)])
        return np.stack(found)


def together(
    tensors: Mapping[str, Slices], split: Sequence[Split], *, experts: int
) -> dict[str, Slices]:
    """The tensors, with single experts' joined into one; if any is missing, all are left as is."""
    found = dict(tensors)
    for one in split:
        first = one.parts[0].format(E=0)
        for lead in [name.removesuffix(first) for name in tensors if name.endswith(f".{first}")]:
            if first == one.parts[0]:
                found[lead + one.name] = found.pop(lead + first)
                continue
            names = [[lead + part.format(E=e) for part in one.parts] for e in range(experts)]
            if all(name in tensors for of_one in names for name in of_one):
                every = [[tensors[name] for name in of_one] for of_one in names]
                if all(list(map(_like, of_one)) == list(map(_like, every[0])) for of_one in every):
                    found[lead + one.name] = Stack(every, one.turned)
                    for name in (name for of_one in names for name in of_one):
                        del found[name]
    return found


def _like(tensor: Slices) -> tuple[list[int], str]:
    return tensor.get_shape(), tensor.get_dtype()

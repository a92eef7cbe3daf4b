"""Tensors that hold all experts of a layer, seen as the matrices of each, and the other way round.

transformers 5 keeps gate and up of a layer's experts in one tensor, and down in another; some hubs'
files have them so, others one by one, which is how they are read here. Where an architecture has
all in one tensor, programs that quantise matrix by matrix still write them one by one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from checkpoints_io.mxfp4 import Slices


class Packed(NamedTuple):
    """`mlp.experts.gate_up_proj` holds `mlp.experts.{E}.gate_proj.weight` and up_proj's."""

    name: str  # how the tensor's ends
    parts: Sequence[str]  # side by side: those of one expert
    width_at: int  # which axis is that of the model's width; 0 is that of experts


class Split(NamedTuple):
    """`experts.{E}.gate_proj.weight` and up_proj's are what `experts.gate_up_proj` holds."""

    name: str  # how the tensor's ends in the table
    parts: Sequence[str]  # side by side: those of one expert; without {E} the same by another name
    turned: bool = False  # the table's matrices are [into, out], those of the files [out, into]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One expert's part of a tensor, as safetensors offers one."""

    whole: Slices
    expert: int
    place: int  # among `count` that stand side by side
    count: int
    turned: bool

    def get_shape(self) -> list[int]:
        """[rows, columns]."""
        _, *sides = self.whole.get_shape()
        rows, columns = reversed(sides) if self.turned else sides
        return [rows // self.count, columns]

    def get_dtype(self) -> str:
        """As the file spells it."""
        return self.whole.get_dtype()

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """A part of the matrix."""
        rows, columns = at
        begin = self.place * self.get_shape()[0]
        rows = slice(begin + rows.start, begin + rows.stop)
        sides = (columns, rows) if self.turned else (rows, columns)
        (found,) = self.whole[(slice(self.expert, self.expert + 1), *sides)]
        return found.T if self.turned else found


def apart(
    tensors: Mapping[str, Slices], packed: Sequence[Packed], *, experts: int, width: int
) -> dict[str, Slices]:
    """The tensors, each packed one as its parts; one that fits no such model is left as it is.

    Some files have the last two axes the other way round: there the model's `width` says so.
    """
    found = dict(tensors)
    for one in packed:
        for name in [name for name in tensors if name.endswith(f".{one.name}")]:
            shape, count = tensors[name].get_shape(), len(one.parts)
            # A header may name any number of experts: the model's are looped over.
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
    """The matrices of all experts, or their biases, as one tensor of a file."""

    experts: Sequence[Sequence[Slices]]  # of each, what stands side by side
    turned: bool

    def get_shape(self) -> list[int]:
        """[E, rows, columns], or [E, columns, rows] where they are turned; of biases [E, rows]."""
        rows = sum(part.get_shape()[0] for part in self.experts[0])
        sides = [rows, *self.experts[0][0].get_shape()[1:]]
        return [len(self.experts), *(reversed(sides) if self.turned else sides)]

    def get_dtype(self) -> str:
        """As the file spells it."""
        return self.experts[0][0].get_dtype()

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """A part of some experts, each of which is read whole."""
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
    """The tensors, those of single experts as one; where some are missing, all are left as is."""
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

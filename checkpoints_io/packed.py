"""Tensors that hold all experts of a layer, seen as the matrices of each.

transformers 5 keeps gate and up of a layer's experts in one tensor, and down in another; some hubs'
files have them so, others one by one, which is how they are read here.
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

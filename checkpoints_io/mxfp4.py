"""Weights stored as MXFP4, read as the matrices they stand for: 4 bits a number, blocks of 32.

Source: the OCP Microscaling Formats specification 1.0, section 5.3, and the layout of the gpt-oss
files: `NAME_blocks` [E, rows, columns / 32, 16], two numbers a byte, the lower half first, and
`NAME_scales` [E, rows, columns / 32], powers of two. The matrix is their transpose.
"""

from collections.abc import Mapping
import dataclasses
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from checkpoints_io.errors import BadInput

BLOCK = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@runtime_checkable
class Slices(Protocol):
    """A tensor in a file, read in parts, with the interface of a safetensors slice."""

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        ...

    def get_dtype(self) -> str:
        """The dtype as the file spells it."""
        ...

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """Reads a part."""
        ...


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Matrices with the interface of a safetensors slice, computed from blocks and scales."""

    blocks: Slices
    scales: Slices

    def get_shape(self) -> list[int]:
        """The shape of the matrices, [E, columns, rows]."""
        experts, rows, count, _ = self.blocks.get_shape()
        return [experts, count * BLOCK, rows]

    def get_dtype(self) -> str:
        """The dtype to which the checkpoint's makers unpack the numbers."""
        return "BF16"

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the matrices; blocks outside it are not read."""
        experts, columns, rows = at
        first = columns.start // BLOCK
        among = slice(first, -(-columns.stop // BLOCK))
        bytes_, scales = self.blocks[experts, rows, among], self.scales[experts, rows, among]
        begin, count = columns.start - first * BLOCK, columns.stop - columns.start
        whole = np.empty((len(bytes_), count, bytes_.shape[1]), ml_dtypes.bfloat16)
        for made, packed, powers in zip(whole, bytes_, scales, strict=True):  # an expert at a time
            halves = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*powers.shape, BLOCK)
            numbers = np.ldexp(VALUES[halves], powers.astype(np.int32)[..., None] - 127)
            made[...] = numbers.reshape(len(packed), -1).T[begin : begin + count]
        return whole


def unpacked(tensors: Mapping[str, Slices]) -> dict[str, Slices]:
    """The tensors of a checkpoint, each pair of blocks and scales as one.

    Raises:
      ValueError: blocks and scales do not match.
    """
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        blocks, scales = tensors[name], tensors.get(f"{whole}_scales")
        if scales is None or blocks.get_dtype() != "U8" or scales.get_dtype() != "U8":
            raise BadInput(f"{name} is not MXFP4: it needs {whole}_scales, and both bytes (U8)")
        shape = blocks.get_shape()
        if len(shape) != 4 or shape[-1] * 2 != BLOCK or scales.get_shape() != shape[:-1]:
            raise BadInput(
                f"{name} is {shape} and {whole}_scales {scales.get_shape()}: MXFP4 has blocks "
                "[experts, rows, count, 16] and scales [experts, rows, count]"
            )
        del found[name], found[f"{whole}_scales"]
        found[whole] = Matrices(blocks, scales)
    return found

"""Quantised matrices as files hold them: bitsandbytes' nf4, and 8 bits with separate scales.

Sources: bitsandbytes 0.50.2 (`functional.py`, `csrc/cpu_ops.cpp`), whose numbers are reproduced to
the last bit; QLoRA, https://arxiv.org/abs/2305.14314; compressed-tensors 0.15; DeepSeek V3's FP8.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from jaxtyping import PyTree
import ml_dtypes
import numpy as np

from checkpoints_io.errors import BadInput
from checkpoints_io.mxfp4 import Slices

KINDS = ("int8", "nf4")
BLOCK = 64  # how many numbers share a scale
NESTED = 256  # how many scales share a scale of their own
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
CHUNK = 2**10  # blocks that are quantised at a time

STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MOST_STATE = 4096  # bytes of JSON in a tensor's quant_state
SCALES = ("_scale_inv", "_scale")
EIGHTS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# The scales of activations, which are not quantised here.
OF_ACTIVATIONS = re.compile(r"[._](input|output|activation)_(scale|zero_point)$")
# Nor is the KV cache, whose scales config.json may not mention.
OF_CACHE = re.compile(r"\.((self_)?attn|[qkv]_proj|qkv_proj)\.([qkv]|kv|prob)_(scale|zero_point)$")
# Formats of compressed-tensors with one number per byte.
FORMATS = ("naive-quantized", "int-quantized", "float-quantized")


class Narrow(NamedTuple):
    """A matrix [out, into] in few bits, or a stack of them; or one property of each of its arrays.

    nf4 packs two numbers in a byte, the first in the upper half. Each block of 64 along `into` has
    a scale: 8 bits looked up in a table, times a scale shared by 256 of them, plus a common offset.
    If blocks cross the ends of rows, the codes are one row.
    """

    codes: PyTree  # nf4: uint8 [rows, into / 2]; int8: int8 [out, into]
    scales: PyTree  # nf4: one per block, uint8, or float32 if they are not quantised again; int8:
    # float32 [out]
    steps: PyTree = None  # float32, one per 256 scales
    offset: PyTree = None  # float32 []
    table: PyTree = None  # float32 [256]


def rows(out: int, into: int) -> int:
    """The number of rows of a matrix's nf4 codes: one if blocks cross the ends of its rows."""
    return out if into % BLOCK == 0 else 1


def shapes(kind: str, out: int, into: int) -> Narrow:
    """The shape and dtype of each array of a quantised matrix."""
    if kind == "int8":
        return Narrow(((out, into), np.int8), ((out,), np.float32))
    numbers = out * into
    lines, blocks = rows(out, into), -(-numbers // BLOCK)
    return Narrow(
        ((lines, -(-numbers // lines // 2)), np.uint8),
        ((blocks,), np.uint8),
        ((-(-blocks // NESTED),), np.float32),
        ((), np.float32),
        ((256,), np.float32),
    )


def quantised(matrix: np.ndarray, kind: str, *, nested: bool = True) -> Narrow:
    """Quantises a matrix [out, into], rounding to nearest; int8 scales each output by its largest.

    `nested`: the scales of nf4 are quantised again.
    """
    matrix = np.ascontiguousarray(matrix, np.float32)
    if kind == "int8":
        scales = np.abs(matrix).max(-1) / np.float32(127)
        by = np.where(scales == 0, np.float32(1), scales)[:, None]
        return Narrow(np.rint(matrix / by).astype(np.int8), scales)
    codes, scales = _nf4(matrix.reshape(-1))
    codes = codes.reshape(rows(*matrix.shape), -1)
    return Narrow(codes, *_nested(scales)) if nested else Narrow(codes, scales)


def _nf4(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes, two in a byte, and each block's maximum; the last block may be shorter."""
    count = len(numbers)
    blocks = np.pad(numbers, (0, -count % BLOCK)).reshape(-1, BLOCK)
    scales, codes = np.empty(len(blocks), np.float32), np.zeros(blocks.shape, np.uint8)
    for begin in range(0, len(blocks), CHUNK):
        at = slice(begin, begin + CHUNK)
        scales[at] = np.abs(blocks[at]).max(-1)
        by = np.maximum(scales[at], np.float32(1e-38))[:, None]
        unit = np.clip(blocks[at] * (1 / by), -1, 1)
        if count % BLOCK and at.stop >= len(blocks):  # bitsandbytes divides in a short block
            unit[-1] = np.clip(blocks[-1] / by[-1], -1, 1)
        for middle in (NF4[1:] + NF4[:-1]) / np.float32(2):
            codes[at] += unit > middle
    both = codes.reshape(-1)[: count + count % 2]
    return both[::2] << 4 | both[1::2], scales


def _nested(scales: np.ndarray) -> tuple:
    """Scales quantised to 8 bits: indices into a table, steps, offset and the table itself."""
    offset = scales.mean(dtype=np.float64).astype(np.float32)
    rest = scales - offset
    groups = np.pad(rest, (0, -len(rest) % NESTED)).reshape(-1, NESTED)
    steps = np.abs(groups).max(-1)
    unit = (groups / np.maximum(steps, np.float32(1e-38))[:, None]).reshape(-1)[: len(rest)]
    table = dynamic_table()
    # bitsandbytes looks up the nearest number on a grid of 65,536.
    grid = np.floor((unit + np.float32(1)) * np.float32(32767.5) + np.float32(0.5))
    grid = np.where(steps.repeat(NESTED)[: len(rest)] == 0, 0, grid)  # theirs divides by 0 there
    wide = table.astype(np.float64)
    places = np.searchsorted((wide[1:] + wide[:-1]) / 2, grid.astype(np.float64) / 32767.5 - 1)
    return places.astype(np.uint8), steps, offset, table


@functools.cache
def dynamic_table() -> np.ndarray:
    """The numbers of bitsandbytes' 8-bit type: a sign, an exponent in unary, a linear fraction."""
    found = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        step, at = np.float64(np.float32(0.9) / np.float32(n)), np.arange(n + 1)
        # torch.linspace(0.1, 1), which counts from both ends.
        below, above = np.float64(np.float32(0.1)) + step * at, 1 - step * (n - at)
        cuts = np.where(at < (n + 1) // 2, below, above).astype(np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((cuts[:-1] + cuts[1:]) / np.float32(2))
        found += [*means, *-means]
    return np.sort(np.array(found, np.float32))


def _whole(tensor: Slices) -> np.ndarray:
    return tensor[tuple(slice(0, n) for n in tensor.get_shape())]


def is_read(told: Mapping[str, object]) -> bool:
    """Whether weights with this `quantization_config` are read here."""
    method = told.get("quant_method")
    if method == "bitsandbytes":
        return bool(told.get("load_in_4bit") or told.get("_load_in_4bit"))
    if method == "compressed-tensors":  # a transform would have to be undone
        return told.get("format") in FORMATS and not told.get("transform_config")
    return method == "fp8"


@dataclasses.dataclass(frozen=True)
class Halves:
    """A matrix with the interface of a safetensors slice, computed from bitsandbytes' 4 bits."""

    codes: Slices
    scales: Slices
    values: np.ndarray  # the sixteen numbers
    shape: tuple[int, int]
    block: int
    steps: np.ndarray | None = None  # none: the scales are float32
    offset: np.float32 | None = None
    table: np.ndarray | None = None

    def get_shape(self) -> list[int]:
        """The shape of the matrix, [out, into]."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Of the products of codes and scales."""
        return "F32"

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the matrix; rows outside it are not read."""
        lines, columns = at
        width = self.shape[1]
        first, last = lines.start * width, lines.stop * width
        packed = self.codes[first // 2 : -(-last // 2), 0:1].reshape(-1)
        both = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
        begin, end = first // self.block, -(-last // self.block)
        scales = self.scales[(slice(begin, end),)]
        if self.steps is not None:
            assert self.table is not None and self.offset is not None
            own = self.steps[np.arange(begin, end) // NESTED]
            scales = self.table[scales] * own + self.offset
        numbers = self.values[both[first % 2 :][: last - first]]
        numbers *= scales[np.arange(first, last) // self.block - begin]
        return numbers.reshape(-1, width)[:, columns]

    def narrow(self, kind: str) -> Narrow | None:
        """Its codes as stored, if they are of this kind."""
        if kind != "nf4" or self.block != BLOCK or not np.array_equal(self.values, NF4):
            return None
        codes = _whole(self.codes).reshape(rows(*self.shape), -1)
        return Narrow(codes, _whole(self.scales), self.steps, self.offset, self.table)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A matrix with the interface of a safetensors slice, computed from 8 bits and scales."""

    codes: Slices
    scales: np.ndarray  # one per block, with the same number of axes
    block: tuple[int, ...]

    def get_shape(self) -> list[int]:
        """The shape, [out, into]; for all experts of a layer [experts, out, into]."""
        return self.codes.get_shape()

    def get_dtype(self) -> str:
        """Of the products of codes and scales."""
        return "F32"

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of the matrix."""
        places = [np.arange(s.start, s.stop) // n for s, n in zip(at, self.block, strict=True)]
        return self.codes[at].astype(np.float32) * self.scales[np.ix_(*places)]

    def narrow(self, kind: str) -> Narrow | None:
        """Its codes as stored, if they are of this kind: whole numbers, and a scale per row."""
        out, into = self.get_shape()[-2:]
        if (
            kind != "int8"
            or self.codes.get_dtype() != "I8"
            or self.block not in ((1, into), (out, into))
        ):
            return None
        return Narrow(_whole(self.codes), np.broadcast_to(self.scales[:, 0], out))


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A tensor of 8-bit floats, which safetensors cannot read into numpy."""

    array: np.ndarray
    dtype: str

    def get_shape(self) -> list[int]:
        """Of the whole."""
        return list(self.array.shape)

    def get_dtype(self) -> str:
        """As the file spells it."""
        return self.dtype

    def __getitem__(self, at: Any) -> np.ndarray:
        """A part, read now."""
        return np.asarray(self.array[at])


def eights(path: pathlib.Path) -> dict[str, Slices]:
    """The 8-bit float tensors of a safetensors file that is known to be complete."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found: dict[str, Slices] = {}
    every = np.memmap(path, np.uint8, "r")[8 + size :]
    for name, said in header.items():
        if name != "__metadata__" and (kind := EIGHTS.get(said["dtype"])) is not None:
            begin, end = said["data_offsets"]
            found[name] = Mapped(every[begin:end].view(kind).reshape(said["shape"]), said["dtype"])
    return found


def unpacked(tensors: Mapping[str, Slices], told: Mapping[str, object]) -> dict[str, Slices]:
    """The tensors of a checkpoint, each quantised one combined with its scales.

    `told` is its `quantization_config`.

    Raises:
      ValueError: tensors and scales do not match, or are of a kind that is not read.
    """
    scales = lambda name: OF_CACHE.search(name) or (told and OF_ACTIVATIONS.search(name))
    found = {name: one for name, one in tensors.items() if not scales(name)}
    for name in [name for name in tensors if STATE.search(name)]:
        whole = STATE.sub("", name)
        beside = {key: found.pop(f"{whole}.{key}", None) for key in (
            "absmax", "quant_map", "nested_absmax", "nested_quant_map")}  # fmt: skip
        found[whole] = _halves(whole, found.get(whole), beside, found.pop(name))
    for end in SCALES:
        for name in [name for name in tensors if name.endswith(end)]:
            whole = name.removesuffix(end)
            if whole.endswith(".weight") or _is_eight(found.get(whole)):
                scales = found.pop(name)
                found[whole] = _scaled(whole, found.get(whole), scales, end, told)
    return found


def _is_eight(tensor: Slices | None) -> bool:
    return tensor is not None and tensor.get_dtype() in ("I8", *EIGHTS)


def _halves(name: str, codes: Slices | None, beside: Mapping, state: Slices) -> Halves:
    refuse = lambda why: BadInput(f"{name} is not bitsandbytes' 4 bits: {why}")
    if state.get_dtype() != "U8" or not 0 < math.prod(state.get_shape()) <= MOST_STATE:
        raise refuse("its quant_state is not text")
    try:
        said = json.loads(bytes(_whole(state)))
        shape, block = tuple(said["shape"]), said["blocksize"]
        nested, offset = said.get("nested_blocksize"), said.get("nested_offset")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"its quant_state cannot be read ({error!r})") from error
    sizes = (*shape, block)
    if len(shape) != 2 or any(type(n) is not int or not 0 < n < 2**31 for n in sizes):
        raise refuse(f"its quant_state says shape {shape} and blocksize {block}")
    count = math.prod(shape)
    blocks = -(-count // block) if block in BLOCKS else -1
    wanted = {"absmax": ([blocks], "F32"), "quant_map": ([16], "F32")}
    if nested is not None:
        if nested != NESTED or not isinstance(offset, float):
            raise refuse(f"its scales are quantised in blocks of {nested}, not of {NESTED}")
        steps = ([-(-blocks // NESTED)], "F32")
        wanted |= {"absmax": ([blocks], "U8"), "nested_absmax": steps}
        wanted |= {"nested_quant_map": ([256], "F32")}
    if codes is None or (codes.get_shape(), codes.get_dtype()) != ([-(-count // 2), 1], "U8"):
        raise refuse(f"a matrix {shape} needs {-(-count // 2)} bytes (U8)")
    for key, (size, dtype) in wanted.items():
        there = beside[key]
        if there is None or (there.get_shape(), there.get_dtype()) != (size, dtype):
            raise refuse(f"it needs {name}.{key}, {dtype} {size}")
    found = Halves(codes, beside["absmax"], _whole(beside["quant_map"]), shape, block)
    if nested is None:
        return found
    steps, table = _whole(beside["nested_absmax"]), _whole(beside["nested_quant_map"])
    return dataclasses.replace(found, steps=steps, offset=np.float32(offset), table=table)


def _scaled(name: str, codes: Slices | None, scales: Slices, end: str, told: Mapping) -> Scaled:
    shape, size = codes.get_shape() if codes is not None else [], scales.get_shape()
    if codes is None or not _is_eight(codes) or len(shape) not in (2, 3):
        kind = f"{codes.get_dtype()} {shape}" if codes is not None else "missing"
        raise BadInput(f"{name} has {name}{end} beside it and is {kind}, not a matrix of 8 bits")
    if scales.get_dtype() not in ("F32", "BF16", "F16"):
        raise BadInput(f"{name}{end} is {scales.get_dtype()}; only floats are read")
    *experts, out, into = shape
    # For all experts of a layer, each has its own scale, or one is shared by all.
    count = size[0] if experts and size[:1] == experts else 1
    lines, columns = (*size[len(experts) :], 1, 1)[:2]
    blocks = told.get("weight_block_size", [128, 128] if end == "_scale_inv" else None)
    blocks = blocks or _block_of_groups(told)
    block = _as_block(blocks)
    if (lines, columns) == (1, 1):
        block = out, into
    elif blocks is None or (end == "_scale" and lines == out):  # of some config groups, not all
        block = 1, -(-into // max(columns, 1))
    if experts and block and lines == 2 and out % 2 == 0 and -(-out // block[0]) != 2:
        block = out // 2, into if columns == 1 else block[1]  # gate and up have one each
    if (
        not all((count, *(block or (0,))))
        or math.prod(size) != count * lines * columns
        or [lines, columns] != [-(-out // block[0]), -(-into // block[1])]
    ):
        raise BadInput(
            f"{name} is {shape} and {name}{end} {size}: there should be one scale, one for each "
            "row or group of it, or one for each weight_block_size of config.json"
        )
    whole = np.asarray(_whole(scales), np.float32)
    each = [-(-n // count) for n in experts]
    return Scaled(codes, whole.reshape([count] * len(experts) + [lines, columns]), (*each, *block))


def _as_block(given: object) -> tuple[int, ...]:
    """Rows and columns of a block; nothing if the value is not a block."""
    is_size = lambda n: type(n) is int and n > 0
    is_one = isinstance(given, list) and len(given) == 2 and all(map(is_size, given))
    return tuple(given) if isinstance(given, list) and is_one else ()


def _block_of_groups(told: Mapping) -> object:
    """The block size per scale, as compressed-tensors gives it; None: there are no blocks."""
    groups = told.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("strategy") == "block":
            return weights.get("block_structure")
    return None

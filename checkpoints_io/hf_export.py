"""Writes sharded arrays as safetensors, using the table that hf_weights.py reads them with."""

from collections.abc import Mapping, Sequence
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple, Protocol, runtime_checkable

import einops
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from checkpoints_io import hf_names, processes, quantised
from checkpoints_io.errors import BadInput, StorageError
from checkpoints_io.mxfp4 import Slices

SHARD_BYTES = 5_000_000_000
WIDEST = 8  # bytes assumed for a number until its tensor has been looked at


class _Tensor(NamedTuple):
    """One tensor of an export: its HF name, our weights in it, and which layer (and expert)."""

    name: str
    paths: Sequence[str]  # side by side; none: a tensor of another part, written unchanged
    index: tuple[int, ...] = ()
    turned: bool = False


@runtime_checkable
class Layers(Protocol):
    """An array, or an object that returns one for each of its layers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    def __getitem__(self, layer: object) -> object: ...


class Weight(NamedTuple):
    """A weight to be written: its axes, its numbers, and their dtype in the file."""

    axes: str
    array: Layers
    dtype: np.dtype


def write(
    folder: pathlib.Path | None,
    table: hf_names.Table,
    weights: Mapping[str, Weight],
    others: Mapping[str, Slices] = {},
    joined: Sequence[hf_names.Joined] = (),
) -> None:
    """Writes weights given by path: one safetensors file, or shards and an index.

    `others` are tensors by their HF names, written unchanged; the weights of experts that are
    `joined` are written as one tensor. One file at a time is held in host memory. Every process
    must call it; those without a folder only help to gather the arrays.

    Raises:
      ValueError: weights are not finite, or overflow in the dtype they are written in.
      OSError: the disk is full, or fails.
    """
    plan = _shards(table, weights, others, joined)
    file_of, total = {}, 0
    for i, shard in enumerate(plan, start=1):
        many = len(plan) > 1
        file = f"model-{i:05}-of-{len(plan):05}.safetensors" if many else "model.safetensors"
        tensors = _gathered(shard, table, weights)
        refuse_not_finite(tensors)
        file_of |= dict.fromkeys([one.name for one in shard], file)
        if folder:
            tensors |= {one.name: _whole(others[one.name]) for one in shard if not one.paths}
            total += sum(tensor.nbytes for tensor in tensors.values())
            write_file(tensors, folder / file)
    if folder and len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def refuse_not_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses tensors, given by their names in the file, that hold NaN or infinity.

    Raises:
      ValueError: a tensor is not finite.
    """
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if bad:
        raise BadInput(
            f"{bad[0]} holds numbers that are not finite in {tensors[bad[0]].dtype} (NaN or "
            "infinity), so nothing is written: training diverged, or the numbers overflow a narrow "
            "dtype"
        )


def write_file(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes one safetensors file.

    Raises:
      OSError: the disk is full, or fails.
    """
    try:
        safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        known = re.search(r"os error (\d+)", str(error))
        if not known:
            raise StorageError(f"{path} cannot be written: {error}") from error
        number = int(known[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(0o644)  # safetensors makes it readable by the owner only


def _whole(other: Slices) -> np.ndarray:
    """A whole tensor, unchanged; one unpacked from few bits is no wider than necessary."""
    found = other[tuple(slice(0, n) for n in other.get_shape())]
    was_packed = isinstance(other, quantised.Halves | quantised.Scaled)
    return found.astype(ml_dtypes.bfloat16) if was_packed else found


def _shards(
    table: hf_names.Table,
    weights: Mapping[str, Weight],
    others: Mapping[str, Slices],
    joined: Sequence[hf_names.Joined],
) -> list[list[_Tensor]]:
    """Splits the tensors, in order, into files of at most SHARD_BYTES."""
    sized: list[tuple[_Tensor, int]] = []
    leads = {one.paths[0]: one for one in joined}
    passed = {path for one in joined for path in one.paths[1:]}
    for path, weight in weights.items():
        if path in passed:
            continue
        one = leads.get(path) or hf_names.Joined(table[path].name, [path])
        entry = table[path]._replace(name=one.name)
        names = list(hf_names.of(entry, weight.array.shape))
        size = sum(weights[p].array.size * weights[p].dtype.itemsize for p in one.paths)
        sized += [(_Tensor(name, one.paths, index, one.turned), size // len(names))
                  for index, name in names]  # fmt: skip
    sized += [(_Tensor(name, ()), WIDEST * math.prod(one.get_shape()))
              for name, one in others.items()]  # fmt: skip
    shards: list[list[_Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor, size in sized:
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    return shards


def _gathered(
    shard: list[_Tensor], table: hf_names.Table, weights: Mapping[str, Weight]
) -> dict[str, np.ndarray]:
    """The tensors of one file, in host memory; a layer's experts are gathered together."""
    made: dict[str, np.ndarray] = {}
    held: tuple[tuple, np.ndarray] | None = None
    for name, paths, index, turned in shard:
        parts = []
        for path in paths:
            axes, array, dtype = weights[path]
            layer, rest = index[:1], index[1:]
            if held is None or held[0] != (path, layer):
                part: Any = array[layer] if layer else array
                if not part.is_fully_addressable:
                    part = processes.gathered(part)
                held = (path, layer), np.asarray(part)
            own = " ".join(axes.split()[len(index) :])
            lead = " ".join(hf_names.stacked(table[path].name)[len(index) :])
            form = f"{own} -> {lead} {table[path].axes}"
            parts.append(einops.rearrange(np.asarray(held[1][rest]), form).astype(dtype))
        if parts:
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            whole = whole.swapaxes(-1, -2) if turned else whole
            # safetensors writes wrong bytes for an array that is not contiguous
            made[name] = np.asarray(whole, order="C")
    return made

"""Sharded arrays to safetensors, by the table that hf_weights.py reads them with."""

from collections.abc import Mapping
import json
import os
import pathlib
import re
from typing import Any, NamedTuple, Protocol, runtime_checkable

import einops
import numpy as np
import safetensors
import safetensors.numpy

from checkpoints_io import hf_weights, processes
from checkpoints_io.errors import StorageError

SHARD_BYTES = 5_000_000_000


class _Tensor(NamedTuple):
    """One tensor of an export: its HF name, our weight, and which layer (and expert) of it."""

    name: str
    path: str
    index: tuple[int, ...]


@runtime_checkable
class Weight(Protocol):
    """An array, or what gives one for each of its layers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    def __getitem__(self, layer: Any) -> Any: ...


def write(
    folder: pathlib.Path | None,
    table: hf_weights.Table,
    weights: Mapping[str, tuple[str, Weight]],
    dtype: np.dtype,
) -> None:
    """Writes weights given as path -> (axes, array): one safetensors file, or shards and an index.

    One file at a time is held in host memory. Every process must call it; those without a folder
    only help to gather the arrays.

    Raises:
      OSError: the disk is full, or fails.
    """
    plan = _shards(table, weights, dtype)
    file_of = {}
    for i, shard in enumerate(plan, start=1):
        many = len(plan) > 1
        file = f"model-{i:05}-of-{len(plan):05}.safetensors" if many else "model.safetensors"
        tensors = _gathered(shard, table, weights, dtype)
        file_of |= dict.fromkeys(tensors, file)
        if folder:
            write_file(tensors, folder / file)
    if folder and len(plan) > 1:
        total = sum(array.size for _, array in weights.values()) * np.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """One safetensors file.

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
    path.chmod(0o644)  # safetensors lets only the owner read it


def _shards(table: hf_weights.Table, weights: Mapping, dtype: np.dtype) -> list[list[_Tensor]]:
    """Splits the tensors, in order, into files of at most SHARD_BYTES."""
    shards: list[list[_Tensor]] = [[]]
    room = SHARD_BYTES
    for path, (_, array) in weights.items():
        names = list(hf_weights.hf_names(table[path], array.shape))
        size = array.size // len(names) * np.dtype(dtype).itemsize
        for index, name in names:
            if size > room and shards[-1]:
                shards.append([])
                room = SHARD_BYTES
            shards[-1].append(_Tensor(name, path, index))
            room -= size
    return shards


def _gathered(
    shard: list[_Tensor], table: hf_weights.Table, weights: Mapping, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The tensors of one file, in the host's memory; a layer's experts are gathered together."""
    made: dict[str, np.ndarray] = {}
    held: tuple[tuple, np.ndarray] | None = None
    for name, path, index in shard:
        axes, array = weights[path]
        layer, rest = index[:1], index[1:]
        if held is None or held[0] != (path, layer):
            part = array[layer] if layer else array
            if not part.is_fully_addressable:
                part = processes.gathered(part)
            held = (path, layer), np.asarray(part)
        own = " ".join(axes.split()[len(index) :])
        turned = einops.rearrange(np.asarray(held[1][rest]), f"{own} -> {table[path].axes}")
        # safetensors writes the wrong bytes of an array that is not contiguous
        made[name] = turned.astype(dtype, order="C")
    return made

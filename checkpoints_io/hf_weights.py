"""Safetensors to sharded arrays and back, driven by a table of plain strings.

A table maps each of our weights to (its HF name, its axes in the HF file): a weight with axes
"L D N H" and the entry ("model.layers.{L}.q_proj.weight", "(N H) D") is stacked from one tensor
per layer. einops does the transposing and splitting, both ways.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import einops
import jax
from jax.experimental import multihost_utils
import ml_dtypes  # noqa: F401  numpy learns bfloat16, which safetensors asks it for
import numpy as np
import safetensors
import safetensors.numpy

Table = Mapping[str, tuple[str, str]]

DTYPES = ("BF16", "F16", "F32")
SHARD_BYTES = 5_000_000_000

# Left in checkpoints by old code; worked out from config.json here.
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


class Wanted(NamedTuple):
    """A weight to be read: its axes ("L D N H"), shape, dtype, and where its parts live."""

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding


def read(
    folder: pathlib.Path, table: Table, wanted: Mapping[str, Wanted], unused: frozenset[str]
) -> dict[str, jax.Array]:
    """The weights of a model folder, each part read once and put straight onto its devices.

    All names and shapes are checked before the first array is made. Tensors named in `unused` may
    be there and are not read.

    Raises:
      FileNotFoundError: the folder holds no safetensors, or lacks one that its index names.
      ValueError: a tensor is missing, has no place in the model, or has another shape or dtype.
    """
    with _tensors(folder) as tensors:
        _check(folder, table, wanted, tensors, unused)
        return {path: _array(table[path], want, tensors) for path, want in wanted.items()}


def check(
    folder: pathlib.Path, table: Table, wanted: Mapping[str, Wanted], unused: frozenset[str]
) -> None:
    """Raises what `read` would, having looked at the headers only."""
    with _tensors(folder) as tensors:
        _check(folder, table, wanted, tensors, unused)


@contextlib.contextmanager
def _tensors(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every tensor of a folder by its name, open for reading in parts."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in _files(folder)]
        yield {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118


class _Tensor(NamedTuple):
    """One tensor of an export: its HF name, our weight, and which layer of it (None: all)."""

    name: str
    path: str
    layer: int | None


def write(
    folder: pathlib.Path | None,
    table: Table,
    weights: Mapping[str, tuple[str, jax.Array]],
    dtype: np.dtype,
) -> None:
    """Writes weights given as path -> (axes, array): one safetensors file, or shards and an index.

    One file at a time is held in host memory. Every process must call it; those without a folder
    only help to gather the arrays.
    """
    plan = _shards(table, weights, dtype)
    file_of = {}
    for i, shard in enumerate(plan, start=1):
        many = len(plan) > 1
        file = f"model-{i:05}-of-{len(plan):05}.safetensors" if many else "model.safetensors"
        tensors = {t.name: _gathered(t, table, weights, dtype) for t in shard}
        file_of |= dict.fromkeys(tensors, file)
        if folder:
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors lets only the owner read it
    if folder and len(plan) > 1:
        total = sum(array.size for _, array in weights.values()) * np.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(table: Table, weights: Mapping, dtype: np.dtype) -> list[list[_Tensor]]:
    """Splits the tensors, in order, into files of at most SHARD_BYTES."""
    shards: list[list[_Tensor]] = [[]]
    room = SHARD_BYTES
    for path, (_, array) in weights.items():
        names = list(_hf_names(table[path][0], array.shape))
        size = array.size // len(names) * np.dtype(dtype).itemsize
        for layer, name in names:
            if size > room and shards[-1]:
                shards.append([])
                room = SHARD_BYTES
            shards[-1].append(_Tensor(name, path, layer))
            room -= size
    return shards


def _gathered(tensor: _Tensor, table: Table, weights: Mapping, dtype: np.dtype) -> np.ndarray:
    axes, array = weights[tensor.path]
    if tensor.layer is not None:
        axes, array = axes.removeprefix("L "), array[tensor.layer]
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    turned = einops.rearrange(np.asarray(array), f"{axes} -> {table[tensor.path][1]}")
    # safetensors writes the wrong bytes of an array that is not contiguous
    return np.ascontiguousarray(turned.astype(dtype))


def _hf_names(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int | None, str]]:
    if "{L}" in name:
        yield from ((layer, name.format(L=layer)) for layer in range(shape[0]))
    else:
        yield None, name


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} has no readable weight_map") from error
        # The index comes from a stranger: its names may not lead out of the folder.
        if odd := sorted(str(n) for n in names if pathlib.PurePath(str(n)).name != n):
            raise ValueError(f"{index} names files outside its folder: {odd}")
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    paths = [folder / name for name in sorted(names)]
    if gone := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {gone}: the download is not complete")
    return paths


def _opened(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): was the download cut, or is it a "
            "git-lfs pointer?"
        ) from error


def _check(folder, table: Table, wanted: Mapping[str, Wanted], tensors: dict, unused) -> None:
    shapes = {}
    for path, want in wanted.items():
        name, hf_axes = table[path]
        sizes = dict(zip(want.axes.split(), want.shape, strict=True))
        for _, full in _hf_names(name, want.shape):
            shapes[full] = tuple(
                int(np.prod([sizes[a] for a in group.split()])) for group in _groups(hf_axes)
            )
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"the weights in {folder} lack {_some(missing)}")
    extra = {n for n in tensors.keys() - shapes.keys() - unused if not DERIVED.search(n)}
    if extra:
        raise ValueError(
            f"the weights in {folder} hold {_some(extra)}, which config.json has no use for"
        )
    found = {name: tuple(tensors[name].get_shape()) for name in shapes}
    if wrong := [n for n in shapes if found[n] != shapes[n]]:
        told = [f"{n} is {found[n]} where config.json means {shapes[n]}" for n in wrong[:3]]
        raise ValueError(f"misshapen weights in {folder} ({len(wrong)} in all): {'; '.join(told)}")
    if odd := {n: tensors[n].get_dtype() for n in shapes if tensors[n].get_dtype() not in DTYPES}:
        name, dtype = next(iter(odd.items()))
        raise ValueError(
            f"{name} in {folder} is stored as {dtype} (with {len(odd) - 1} others like it); only "
            f"{', '.join(DTYPES)} are read"
        )


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _groups(hf_axes: str) -> list[str]:
    """Reads "(N H) D" as ["N H", "D"]."""
    return [a or b for a, b in re.findall(r"\(([^)]*)\)|(\w+)", hf_axes)]


def _array(entry: tuple[str, str], want: Wanted, tensors: dict) -> jax.Array:
    """Reads each distinct part once: `make_array_from_callback` would hold all of them at once."""
    parts: dict[tuple, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        assert index is not None  # every device holds a part
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, want.shape, strict=True))
        parts.setdefault(bounds, (tuple(slice(*b) for b in bounds), []))[1].append(device)
    arrays = []
    for index, devices in parts.values():
        part = _read_part(entry, want, tensors, index)
        arrays += [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(want.shape, want.sharding, arrays)


def _read_part(
    entry: tuple[str, str], want: Wanted, tensors: dict, index: tuple[slice, ...]
) -> np.ndarray:
    name, hf_axes = entry
    part = np.empty([s.stop - s.start for s in index], want.dtype)
    if "{L}" in name:  # layer by layer into its place: never twice the stack
        axes = want.axes.removeprefix("L ")
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            tensor = tensors[name.format(L=layer)]
            part[i] = _rearranged(tensor, hf_axes, axes, want.shape[1:], index[1:])
    else:
        part[...] = _rearranged(tensors[name], hf_axes, want.axes, want.shape, index)
    return part


def _rearranged(
    tensor, hf_axes: str, axes: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of an HF tensor in our axes, reading little more than that part's bytes."""
    letters = axes.split()
    sizes = dict(zip(letters, shape, strict=True))
    at = dict(zip(letters, index, strict=True))
    cut, rest = [], dict(at)
    for group in _groups(hf_axes):
        lead, *inner = group.split()
        width = int(np.prod([sizes[letter] for letter in inner]))
        cut.append(slice(at[lead].start * width, at[lead].stop * width))
        rest[lead] = slice(None)
        sizes[lead] = at[lead].stop - at[lead].start
    whole = einops.rearrange(tensor[tuple(cut)], f"{hf_axes} -> {axes}", **sizes)
    return whole[tuple(rest[letter] for letter in letters)]

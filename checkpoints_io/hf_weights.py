"""Reads safetensors into sharded arrays, by a table of names; hf_export.py writes them.

hf_names.py describes the tables; einops does the transposing and splitting, both ways.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import itertools
import logging
import math
import pathlib
import re
from typing import NamedTuple

import einops
import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs
import numpy as np
import safetensors

from checkpoints_io import hf_folder, hf_names, mxfp4, packed, quantised
from checkpoints_io.errors import BadInput, NotFound
from checkpoints_io.packed import Packed, Split, Stack
from checkpoints_io.quantised import Narrow

PLAIN = r"[^/\\\0]+\.safetensors"  # a file name, not a path
MOST_INDEX = 64 << 20

DTYPES = ("BF16", "F16", "F32")
TIED_ROWS = 4096  # rows of two tied tensors that are compared at a time

# Buffers that old code left in checkpoints; here they are computed from config.json.
DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|(cos|sin)_cached)$")


class Plan(NamedTuple):
    """What a model needs from a folder: its weights, and how their names are spelled there."""

    table: hf_names.Table
    wanted: Mapping[str, "Wanted"]
    tied: Mapping[str, str]  # optional tensors, and which of the others each of them repeats
    names: hf_names.Names = ()
    quantised: Mapping[str, object] = {}  # config.json's `quantization_config`
    packed: Sequence[Packed] = ()
    split: Sequence[Split] = ()
    carried: Sequence[str] = ()  # patterns of the names of other parts, which are not read


class Wanted(NamedTuple):
    """A weight to be read: its axes ("L D N H"), shape, dtype, and where its parts live."""

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding
    few: "FewBits | None" = None


class FewBits(NamedTuple):
    """How a weight is kept in few bits, rather than as an array."""

    kind: str  # as in `quantised`
    into: str  # the letters of a matrix's columns, in file order; then those of its rows
    out: str
    like: Narrow  # shapes and shardings


def read(
    folder: pathlib.Path,
    plan: Plan,
    parts: Mapping[str, tuple[hf_names.Entry, Wanted]] | None = None,
) -> dict[str, jax.Array | Narrow]:
    """The weights of a model folder, each part read once and put straight onto its devices.

    Weights to be kept in few bits are returned so, one tensor after the other. All names and shapes
    are checked before the first array is made. If `parts` are given, each a weight of the plan or
    some of its layers, only these are read.

    Raises:
      FileNotFoundError: the folder holds no safetensors, or lacks one that its index names.
      ValueError: a tensor is missing, has no place in the model, or has the wrong shape or dtype;
        or one that should repeat another does not.
    """
    with _tensors(folder, plan) as tensors:
        _check(folder, plan, tensors)
        _check_tied(folder, plan, tensors)
        if parts is None:
            parts = {path: (plan.table[path], want) for path, want in plan.wanted.items()}
        made = lambda want: _array if want.few is None else _in_few_bits
        return {path: made(w)(entry, w, tensors) for path, (entry, w) in parts.items()}


def check(folder: pathlib.Path, plan: Plan) -> None:
    """Raises what `read` would raise, reading only the headers."""
    with _tensors(folder, plan) as tensors:
        _check(folder, plan, tensors)


def are_in(folder: pathlib.Path) -> bool:
    """Whether a model folder holds weights."""
    return any(folder.glob("*.safetensors"))


def stored(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """The dtype of every tensor in a model folder, as its file spells it, and its size in numbers.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    for path in _files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield part.get_dtype(), math.prod(part.get_shape())


@contextlib.contextmanager
def _tensors(folder: pathlib.Path, plan: Plan) -> Iterator[dict[str, mxfp4.Slices]]:
    """Every tensor of the model by its name in the table, open for partial reads."""
    with _opened(folder) as every:
        named = _by_known_name(every, plan)
        found = {known: every[name] for known, name in named.items()}
        wide = mxfp4.unpacked(quantised.unpacked(found, plan.quantised))
        experts = _size(plan, "E")
        wide = packed.together(wide, plan.split, experts=experts)
        yield packed.apart(wide, plan.packed, experts=experts, width=_size(plan, "D"))


@contextlib.contextmanager
def carried(folder: pathlib.Path, plan: Plan) -> Iterator[dict[str, mxfp4.Slices]]:
    """The tensors of the parts that are not read, by their own names, open for reading.

    Tensors stored in few bits give the numbers that they stand for.
    """
    with _opened(folder) as every:
        others = {name: one for name, one in every.items() if _is_carried(name, plan)}
        yield quantised.unpacked(others, plan.quantised)


def as_in(folder: pathlib.Path, plan: Plan) -> tuple[hf_names.Table, list[hf_names.Joined]]:
    """The table with a folder's own names, and the weights that are joined in one tensor there."""
    with _opened(folder) as every:
        named = _by_known_name(every, plan)
        shapes = {known: every[name].get_shape() for known, name in named.items()}
    embedding = plan.table["embedding"].name
    in_folder, width = hf_names.renaming(named, embedding), shapes[embedding][-1]
    joined = []
    for one in plan.packed:
        shape = next((shapes[name] for name in shapes if name.endswith(f".{one.name}")), None)
        together: dict[tuple[str, str], list[str]] = {}  # by name and kind of layer
        for part in one.parts if shape else ():
            for path, entry in plan.table.items():
                if entry.name.endswith(f".{part}"):
                    name = in_folder(entry.name.removesuffix(part) + one.name)
                    together.setdefault((name, path.rpartition(".")[0]), []).append(path)
        joined += [hf_names.Joined(name, paths, turned=bool(shape) and shape[one.width_at] != width)
                   for (name, _), paths in together.items()]  # fmt: skip
    table = {path: entry._replace(name=in_folder(entry.name)) for path, entry in plan.table.items()}
    return table, joined


@contextlib.contextmanager
def _opened(folder: pathlib.Path) -> Iterator[dict[str, mxfp4.Slices]]:
    """Every tensor of a folder by its name there, open for partial reads."""
    with contextlib.ExitStack() as stack:
        every = {}
        for path in _files(folder):
            file = stack.enter_context(opened(path))
            here = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if any(one.get_dtype() in quantised.EIGHTS for one in here.values()):
                here |= quantised.eights(path)
            every |= here
        yield every


def _by_known_name(every: Iterable[str], plan: Plan) -> dict[str, str]:
    """Maps a name in the table to the name in the folder, for the tensors that are read."""
    known = {
        name: hf_names.known_as(name, plan.names) for name in every if not _is_carried(name, plan)
    }
    return {as_: name for name, as_ in known.items() if as_ is not None}


def _is_carried(name: str, plan: Plan) -> bool:
    return any(re.search(pattern, name) for pattern in plan.carried)


def _size(plan: Plan, letter: str) -> int:
    """The size of an axis of the model; 0: none of its weights has it."""
    sizes = (zip(want.axes.split(), want.shape, strict=True) for want in plan.wanted.values())
    return next((size for own in sizes for one, size in own if one == letter), 0)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights; of several sets, the one that transformers would choose."""
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")}
    if "model.safetensors" in names:
        if index.is_file():
            _say_chosen(folder, index.name)
        names = {"model.safetensors"}
    elif index.is_file():
        of = hf_folder.read_json(index, MOST_INDEX).get("weight_map")
        if not isinstance(of, dict) or not all(isinstance(name, str) for name in of.values()):
            raise BadInput(f"{index} has no readable weight_map")
        names = set(of.values())
        # The index is untrusted: its names may not lead out of the folder.
        if odd := sorted(name for name in names if not re.fullmatch(PLAIN, name)):
            raise BadInput(f"{index} names more than .safetensors files beside it: {_some(odd)}")
    if not names:
        raise NotFound(f"{folder} holds no .safetensors file")
    paths = [folder / name for name in sorted(names)]
    if gone := [path.name for path in paths if not path.is_file()]:
        raise NotFound(
            f"{folder} lacks {gone}, which {index.name} names: download them, or the index that "
            "belongs to the files in it"
        )
    return paths


def opened(path: pathlib.Path):
    """Opens a safetensors file.

    Raises:
      ValueError: it is not complete.
    """
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise BadInput(
            f"{path} is not a complete safetensors file ({error}): was the download cut short, or "
            "is it a git-lfs pointer?"
        ) from error


def _check(folder: pathlib.Path, plan: Plan, tensors: dict) -> None:
    shapes = {}
    for path, want in plan.wanted.items():
        entry = plan.table[path]
        sizes = dict(zip(want.axes.split(), want.shape, strict=True))
        if (count := math.prod(want.shape[: len(hf_names.stacked(entry.name))])) > len(tensors):
            raise BadInput(
                f"config.json needs {count} tensors {entry.name}, but there are {len(tensors)} "
                f"tensors in {folder}"
            )
        for _, full in hf_names.of(entry, want.shape):
            shapes[full] = tuple(
                math.prod(sizes[a] for a in group.split()) for group in hf_names.groups(entry.axes)
            )
    if missing := shapes.keys() - tensors.keys():
        raise BadInput(f"the weights in {folder} lack {_some(missing)}")
    extra = {n for n in tensors.keys() - shapes.keys() - plan.tied.keys() if not DERIVED.search(n)}
    if extra:
        raise BadInput(
            f"the weights in {folder} hold {_some(extra)}, which a model of this config.json lacks"
        )
    found = {name: tuple(tensors[name].get_shape()) for name in shapes}
    if wrong := [n for n in shapes if found[n] != shapes[n]]:
        told = [f"{n} is {found[n]} where config.json needs {shapes[n]}" for n in wrong[:3]]
        raise BadInput(f"misshapen weights in {folder} ({len(wrong)} in all): {'; '.join(told)}")
    if odd := {n: tensors[n].get_dtype() for n in shapes if tensors[n].get_dtype() not in DTYPES}:
        name, dtype = next(iter(odd.items()))
        raise BadInput(
            f"{name} in {folder} is stored as {dtype} (with {len(odd) - 1} others like it); only "
            f"{', '.join(DTYPES)} are read"
        )


def _check_tied(folder: pathlib.Path, plan: Plan, tensors: dict) -> None:
    """Refuses tied tensors that differ: transformers uses both then, whatever config.json says."""
    for name in plan.tied.keys() & tensors.keys():
        one, other = tensors[name], tensors[plan.tied[name]]
        rows, *_ = shape = one.get_shape()
        parts = (slice(i, min(i + TIED_ROWS, rows)) for i in range(0, rows, TIED_ROWS))
        same = (np.array_equal(one[p].astype("f4"), other[p].astype("f4"), True) for p in parts)
        if shape != other.get_shape() or not all(same):
            raise BadInput(
                f"config.json ties {name} to {plan.tied[name]}, but in {folder} they differ: set "
                "tie_word_embeddings: false in it if the model has a head of its own, or remove "
                f"{name} from the weights"
            )


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _array(entry: hf_names.Entry, want: Wanted, tensors: dict) -> jax.Array:
    """Reads each distinct part once; `make_array_from_callback` would hold all of them at once."""
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
    entry: hf_names.Entry, want: Wanted, tensors: dict, index: tuple[slice, ...]
) -> np.ndarray:
    part = np.empty([s.stop - s.start for s in index], want.dtype)
    n = len(hf_names.stacked(entry.name))
    axes = " ".join(want.axes.split()[n:])
    # Each tensor is read into its place, so that the stack is never held twice.
    for at in itertools.product(*(range(s.start, s.stop) for s in index[:n])):
        tensor = tensors[hf_names.at(entry, at)]
        place = tuple(i - s.start for i, s in zip(at, index[:n], strict=True))
        part[place] = _rearranged(tensor, entry.axes, axes, want.shape[n:], index[n:])
    return part


def _rearranged(
    tensor, hf_axes: str, axes: str, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of an HF tensor, in our axes; little more than its bytes are read."""
    letters = axes.split()
    sizes = dict(zip(letters, shape, strict=True))
    at = dict(zip(letters, index, strict=True))
    cut, rest = [], dict(at)
    for group in hf_names.groups(hf_axes):
        if not group:  # an axis of 1 that our weight does not have
            cut.append(slice(None))
            continue
        lead, *inner = group.split()
        width = math.prod(sizes[letter] for letter in inner)
        cut.append(slice(at[lead].start * width, at[lead].stop * width))
        rest[lead] = slice(None)
        sizes[lead] = at[lead].stop - at[lead].start
    whole = einops.rearrange(tensor[tuple(cut)], f"{hf_axes} -> {axes}", **sizes)
    return np.asarray(whole[tuple(rest[letter] for letter in letters)])


def _in_few_bits(entry: hf_names.Entry, want: Wanted, tensors: dict) -> Narrow:
    """A weight in few bits, as stored or quantised tensor by tensor, so that only one is wide."""
    assert want.few is not None
    kind, into, out, like = want.few
    inner = [c for c in " ".join(hf_names.groups(entry.axes)).split() if c not in into + out]
    turned = f"{entry.axes} -> {' '.join(inner)} ({out}) ({into})"
    sizes = {c: n for c, n in zip(want.axes.split(), want.shape, strict=True) if c in turned}
    names = list(hf_names.of(entry, want.shape))
    every = [one for at, name in names for one in _matrices(entry, at, tensors[name], out, into)]
    nested = all(getattr(tensor, "steps", ...) is not None for _, tensor, _ in every)
    held: Narrow | None = None

    def keep(at: tuple[int, ...], one: Narrow) -> None:
        nonlocal held
        if held is None:
            lead = want.shape[: like.codes.ndim - 2]
            empty = lambda x: None if x is None else np.empty((*lead, *x.shape), x.dtype)
            held = Narrow(*map(empty, one))
        for whole, part in zip(held, one, strict=True):
            if whole is not None:
                whole[at] = part

    _say_rounded(kind, [name for _, name in names], tensors)
    for at, tensor, is_matrix in every:
        own = tensor.narrow(kind) if is_matrix and hasattr(tensor, "narrow") else None
        if own is not None and (kind != "nf4" or nested == (own.steps is not None)):
            keep(at, own)
            continue
        wide = tensor[tuple(slice(0, n) for n in tensor.get_shape())].astype(np.float32)
        wide = wide if is_matrix else einops.rearrange(wide, turned, **sizes)
        for place in np.ndindex(*wide.shape[:-2]):
            keep((*at, *place), quantised.quantised(wide[place], kind, nested=nested))
    assert held is not None
    put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda i: x[i])
    places = [x and x.sharding for x in like]
    return Narrow(*(x if x is None else put(x, p) for x, p in zip(held, places, strict=True)))


def _matrices(
    entry: hf_names.Entry, at: tuple[int, ...], tensor: mxfp4.Slices, out: str, into: str
) -> Iterator[tuple[tuple[int, ...], mxfp4.Slices, bool]]:
    """The matrices of a tensor, each with its place, and whether it is one matrix [out, into]."""
    groups = hf_names.groups(entry.axes)
    if isinstance(tensor, Stack) and len(tensor.experts[0]) == 1:
        first, *sides = groups
        if (sides[::-1] if tensor.turned else sides) == [out, into] and first not in out + into:
            for expert, (one,) in enumerate(tensor.experts):
                yield (*at, expert), one, True
            return
    yield at, tensor, groups == [out, into]


@functools.cache
def _say_chosen(folder: pathlib.Path, index: str) -> None:
    """Warns once that the folder has two sets of weights, of which programs read different ones."""
    logging.getLogger(__name__).warning(
        "%s holds model.safetensors and %s: the former is read, as transformers does (vLLM reads "
        "the latter); remove one of them", folder, index,
    )  # fmt: skip


def _say_rounded(kind: str, names: list[str], tensors: dict) -> None:
    """Warns of rounding matrices that a folder with others in few bits keeps wide on purpose."""
    if kind != "nf4" or not any(map(_is_halves, tensors.values())):
        return
    if wide := [name for name in names if not _is_halves(tensors[name])]:
        logging.getLogger(__name__).warning(
            "%s: the folder holds these unquantised and others in 4 bits; frozen=nf4 rounds these "
            "too, and without it all are read as stored", _some(wide),
        )  # fmt: skip


def _is_halves(tensor: mxfp4.Slices) -> bool:
    if isinstance(tensor, Stack):
        return all(isinstance(one, quantised.Halves) for parts in tensor.experts for one in parts)
    return isinstance(tensor, quantised.Halves)

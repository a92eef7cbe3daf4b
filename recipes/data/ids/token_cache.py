"""Pairs as ids on disk, computed once: Arrow files, each written whole, mapped when read.

A folder stands for one source, one tokenizer and template, and one way to read them. Its files hold
so many rows of the source each; `done.json` is written after the last of them.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import hashlib
import itertools
import json
import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
import pyarrow

from checkpoints_io import places
from checkpoints_io.errors import StorageError
from recipes.data.ids import counts as counts_io
from recipes.data.ids.pair_ids import AnswerIds, Example, PairIds
from recipes.data.ids.shards import MASKS, TOKENS, Shard
from recipes.training import terminal

FORMAT = 2


def folder_of(directory: places.Place, identity: dict[str, object]) -> places.Place:
    """The folder that holds what `identity` says, made if it is not there.

    Raises:
      OSError: the directory cannot be used.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, indent=1)
    folder = directory.within(hashlib.sha256(text.encode()).hexdigest()[:16])
    with _told(folder):
        folder.make()
        for room in directory.names():
            directory.within(room).clear()
        if not folder.exists("identity.json"):
            folder.write_whole("identity.json", text.encode())
    return folder


@contextlib.contextmanager
def alone(folder: places.Place) -> Iterator[None]:
    """Inside the block no other process writes there; if one does, this waits, and says so."""
    told = f"waiting for another process that tokenises the same, in {folder}"
    with contextlib.ExitStack() as stack:
        with _told(folder):
            stack.enter_context(folder.alone(otherwise=lambda: terminal.write(told)))
        yield


def fact(folder: places.Place, name: str, work: Callable[[], Any]) -> Any:
    """What the folder holds under this name, computed once, as JSON.

    Raises:
      OSError: the disk is full, or cannot be written.
    """
    with contextlib.suppress(OSError, ValueError):
        if (content := folder.read(f"{name}.json")) is not None:
            return json.loads(content)
    found = work()
    with _told(folder):
        folder.write_whole(f"{name}.json", json.dumps(found).encode())
    return found


def name_of(first: int) -> str:
    """The file that begins with a row of the source."""
    return f"{first:09d}.arrow"


def write(folder: places.Place, name: str, shard: Shard) -> None:
    """One file, which appears when it is whole.

    Raises:
      OSError: the disk is full, or cannot be written.
    """
    sink = pyarrow.BufferOutputStream()
    table = _as_table(shard)
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with _told(folder):
        folder.write_whole(name, memoryview(sink.getvalue()))


def read(folder: places.Place, name: str) -> Shard | None:
    """What `write` wrote; None if that cannot be read, or is not there.

    The arrays are views of the file: they take memory while they are looked at.
    """
    try:
        content = folder.mapped(name)
        if content is None:
            return None
        return _from_table(pyarrow.ipc.open_file(content).read_all().combine_chunks())
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError):
        return None


def _as_table(shard: Shard) -> pyarrow.Table:
    ids = shard.ids
    columns: dict[str, object] = {
        "row": _column(np.array([pair.row for pair in ids], np.int64)),
        "key": _column(shard.keys),
        "notes": _texts(["\n".join(pair.notes) for pair in ids]),
    }
    kind = type(ids[0]) if ids else PairIds
    if kind is PairIds:
        sides = enumerate(("score_chosen", "score_rejected"))
        columns |= {name: _column(_ratings(ids, side)) for side, name in sides}
    fields = [one._asdict() for one in ids]
    for name in TOKENS[kind]:
        columns[name] = _lists([one[name] for one in fields], np.int32)
    for name in MASKS[kind]:
        columns[name] = _lists([one[name] for one in fields], np.uint8)
    told = {"counts": json.dumps(shard.counts._asdict())}
    table = pyarrow.Table.from_arrays([*columns.values()], [*columns])
    return table.replace_schema_metadata(told)


def _from_table(table: pyarrow.Table) -> Shard:
    counts = counts_io.from_json(json.loads((table.schema.metadata or {})[b"counts"]))
    if not len(table):
        return Shard([], np.zeros(0, np.uint64), counts)
    plain = lambda name, dtype: _numbers(table[name].chunk(0), dtype)
    kind = AnswerIds if "answer" in table.column_names else PairIds
    tokens = [_parts(table[name].chunk(0), np.int32) for name in TOKENS[kind]]
    masks = [_parts(table[name].chunk(0), np.bool_) for name in MASKS[kind]]
    notes = [tuple(filter(None, text.split("\n"))) for text in table["notes"].to_pylist()]
    rows, keys = plain("row", np.int64).tolist(), plain("key", np.uint64)
    if kind is AnswerIds:
        return Shard(list(map(AnswerIds, rows, *tokens, *masks, notes)), keys, counts)
    both = [plain(f"score_{side}", float).tolist() for side in ("chosen", "rejected")]
    ratings = [None if math.isnan(pair[0]) else pair for pair in zip(*both, strict=True)]
    ids = list(map(PairIds, rows, *tokens, *masks, notes, ratings))
    return Shard(ids, keys, counts)


def finish(folder: places.Place, firsts: Sequence[int]) -> None:
    """Records that these files are all there are."""
    digests = {name_of(first): _digest(folder, name_of(first)) for first in firsts}
    with _told(folder):
        folder.write_whole("done.json", json.dumps(digests).encode())


def clear(folder: places.Place) -> None:
    """Forgets what the folder holds."""
    for name in folder.names():
        if name.endswith(".arrow"):
            folder.remove(name)


def read_all(folder: places.Place) -> list[Shard] | None:
    """Everything, if it is whole; a file that has changed is removed."""
    try:
        done = folder.read("done.json")
        digests = json.loads(done) if done is not None else None
    except (OSError, ValueError):
        return None
    if not isinstance(digests, dict):
        return None
    there = set(folder.names())
    found = []
    for name, digest in digests.items():
        shard = None
        if name in there and _digest(folder, name) == digest:
            shard = read(folder, name)
        if shard is not None:
            found.append(shard)
        elif name in there:
            folder.remove(name)
    return found if len(found) == len(digests) else None


def _digest(folder: places.Place, name: str) -> str | None:
    try:
        content = folder.read(name)
    except OSError:
        return None
    return hashlib.sha256(content).hexdigest() if content is not None else None


@contextlib.contextmanager
def _told(folder: places.Place) -> Iterator[None]:
    """An error of the disk, as a sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"tokens cannot be kept in {folder} ({error.strerror or error}): make room, choose "
            "another --config.token_cache, or unset it"
        ) from error


def _ratings(ids: Sequence[Example], side: int) -> np.ndarray:
    return np.array([pair.ratings[side] if pair.ratings else np.nan for pair in ids])


def _lists(arrays: Sequence[np.ndarray], dtype: DTypeLike) -> pyarrow.LargeListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    values = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
    return pyarrow.LargeListArray.from_arrays(_column(offsets), _column(values))


# `pyarrow.array` and `to_numpy` import pandas first, which takes a third of a second.


def _column(values: np.ndarray) -> pyarrow.Array:
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])


def _texts(texts: Sequence[str]) -> pyarrow.Array:
    each = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, each)], dtype=np.int32)
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(each))]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(each), buffers)


def _numbers(column: pyarrow.Array, dtype: DTypeLike) -> np.ndarray:
    """A view of a column without nulls."""
    data = column.buffers()[1] if len(column) else b""
    return np.frombuffer(data, dtype, len(column), column.offset * np.dtype(dtype).itemsize)


def _parts(lists: pyarrow.Array, dtype: DTypeLike) -> list[np.ndarray]:
    values = _numbers(lists.values, dtype)
    bounds = _numbers(lists.offsets, np.int64).tolist()
    return [values[start:stop] for start, stop in itertools.pairwise(bounds)]

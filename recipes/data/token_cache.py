"""Pairs as ids on disk, worked out once: Arrow files, each written whole, mapped when read.

A folder stands for one source, one tokenizer and template, and one way to read them. Its files hold
so many rows of the source each; `done.json` is written after the last of them.
"""

from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from checkpoints_io import places
from checkpoints_io.errors import StorageError
from recipes import terminal
from recipes.data import counts as counts_io
from recipes.data.counts import Counts
from recipes.data.tokens import AnswerIds, Example, PairIds

FORMAT = 2
# Columns of a file of pairs, and of one of single answers.
TOKENS = {PairIds: ("prompt", "chosen", "rejected"), AnswerIds: ("prompt", "answer")}
MASKS = {PairIds: ("chosen_scored", "rejected_scored"), AnswerIds: ("scored",)}


class Shard(NamedTuple):
    """What became of some rows that follow each other."""

    ids: Sequence[Example]  # all of one kind
    keys: np.ndarray  # uint64: a prompt's, for each pair
    counts: Counts


def folder_of(directory: places.Place, identity: dict[str, Any]) -> places.Place:
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
    """Within it no other process writes there; if one does, it is waited for, and told."""
    told = f"waiting for another process that tokenises the same, in {folder}"
    with contextlib.ExitStack() as stack:
        with _told(folder):
            stack.enter_context(folder.alone(otherwise=lambda: terminal.write(told)))
        yield


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


def compact(shard: Shard) -> Shard:
    """The same with one array for all tokens of a kind: those of a pair are views of it.

    On their own they take twice the memory, for each keeps what it was cut from.
    """
    return _from_table(_as_table(shard))


def _as_table(shard: Shard) -> pyarrow.Table:
    ids = shard.ids
    columns: dict[str, Any] = {
        "row": np.array([pair.row for pair in ids], np.int64),
        "key": shard.keys,
        "notes": pyarrow.array(["\n".join(pair.notes) for pair in ids], pyarrow.string()),
    }
    kind = type(ids[0]) if ids else PairIds
    if kind is PairIds:
        columns |= {"score_chosen": _ratings(ids, 0), "score_rejected": _ratings(ids, 1)}
    fields = [one._asdict() for one in ids]
    for name in TOKENS[kind]:
        columns[name] = _lists([one[name] for one in fields], np.int32)
    for name in MASKS[kind]:
        columns[name] = _lists([one[name] for one in fields], np.uint8)
    told = {"counts": json.dumps(shard.counts._asdict())}
    return pyarrow.table(columns).replace_schema_metadata(told)


def _from_table(table: pyarrow.Table) -> Shard:
    counts = counts_io.from_json(json.loads((table.schema.metadata or {})[b"counts"]))
    if not len(table):
        return Shard([], np.zeros(0, np.uint64), counts)
    plain = lambda name: table[name].chunk(0).to_numpy(zero_copy_only=True)
    kind = AnswerIds if "answer" in table.column_names else PairIds
    tokens = [_parts(table[name].chunk(0), np.int32) for name in TOKENS[kind]]
    masks = [_parts(table[name].chunk(0), np.bool_) for name in MASKS[kind]]
    notes = [tuple(filter(None, text.split("\n"))) for text in table["notes"].to_pylist()]
    rows = plain("row").tolist()
    if kind is AnswerIds:
        return Shard(list(map(AnswerIds, rows, *tokens, *masks, notes)), plain("key"), counts)
    ratings = [
        None if np.isnan(one) else (float(one), float(other))
        for one, other in zip(plain("score_chosen"), plain("score_rejected"), strict=True)
    ]
    ids = list(map(PairIds, rows, *tokens, *masks, notes, ratings))
    return Shard(ids, plain("key"), counts)


def finish(folder: places.Place, firsts: Sequence[int]) -> None:
    """Says that these files are all there are."""
    digests = {name_of(first): _digest(folder, name_of(first)) for first in firsts}
    with _told(folder):
        folder.write_whole("done.json", json.dumps(digests).encode())


def clear(folder: places.Place) -> None:
    """Forgets what the folder holds."""
    for name in folder.names():
        if name.endswith(".arrow"):
            folder.remove(name)


def read_all(folder: places.Place) -> list[Shard] | None:
    """Everything, if it is whole; a file that is not what it was is removed."""
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


def _lists(arrays: Sequence[np.ndarray], dtype: Any) -> pyarrow.LargeListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    values = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
    return pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


def _parts(lists: Any, dtype: Any) -> list[np.ndarray]:
    values = lists.values.to_numpy(zero_copy_only=True).view(dtype)
    bounds = lists.offsets.to_numpy(zero_copy_only=True).tolist()
    return [values[start:stop] for start, stop in itertools.pairwise(bounds)]

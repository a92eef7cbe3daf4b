"""What became of some rows that follow each other; and the same as bytes, from another process."""

from collections.abc import Sequence
import io
import itertools
import json
from typing import Any, NamedTuple

import numpy as np

from recipes.data.ids import counts as counts_io
from recipes.data.ids.counts import Counts
from recipes.data.ids.pair_ids import AnswerIds, Example, PairIds

# What arrays there are of a pair, and of a single answer.
TOKENS = {PairIds: ("prompt", "chosen", "rejected"), AnswerIds: ("prompt", "answer")}
MASKS = {PairIds: ("chosen_scored", "rejected_scored"), AnswerIds: ("scored",)}


class Shard(NamedTuple):
    """What became of some rows that follow each other."""

    ids: Sequence[Example]  # all of one kind
    keys: np.ndarray  # uint64: a prompt's, for each
    counts: Counts


def to_bytes(shard: Shard) -> bytes:
    """The shard as numpy's own files hold arrays."""
    ids = shard.ids
    kind = type(ids[0]) if ids else PairIds
    said = {"counts": shard.counts._asdict(), "notes": [one.notes for one in ids],
            "ratings": [one.ratings for one in ids], "single": kind is AnswerIds}  # fmt: skip
    arrays: dict[str, Any] = {
        "row": np.array([one.row for one in ids], np.int64),
        "key": shard.keys,
        "said": np.frombuffer(json.dumps(said).encode(), np.uint8),
    }
    fields = [one._asdict() for one in ids]
    for names, dtype in ((TOKENS[kind], np.int32), (MASKS[kind], np.bool_)):
        for name in names:
            parts = [one[name] for one in fields]
            arrays[name] = np.concatenate([np.zeros(0, dtype), *parts])
            arrays[f"{name}_ends"] = np.cumsum([0, *map(len, parts)])
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def from_bytes(content: bytes) -> Shard:
    """What `to_bytes` wrote, with one array for all tokens of a kind: a pair's are views of it.

    On their own they take twice the memory, for each keeps what it was cut from.
    """
    with np.load(io.BytesIO(content)) as found:
        arrays = dict(found)
    said = json.loads(arrays["said"].tobytes())
    kind = AnswerIds if said["single"] else PairIds
    names = (*TOKENS[kind], *MASKS[kind])
    each = [_parts(arrays[name], arrays[f"{name}_ends"]) for name in names]
    ratings = [pair and tuple(pair) for pair in said["ratings"]]
    rows, notes = arrays["row"].tolist(), map(tuple, said["notes"])
    ids = list(map(kind, rows, *each, notes, ratings))
    return Shard(ids, arrays["key"], counts_io.from_json(said["counts"]))


def _parts(values: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return [values[start:stop] for start, stop in itertools.pairwise(ends.tolist())]

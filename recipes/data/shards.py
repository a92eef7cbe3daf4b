"""What became of some rows that follow each other; and the same as bytes, from another process."""

import io
import itertools
import json
from typing import Any, NamedTuple

import numpy as np

from recipes.data import counts as counts_io
from recipes.data.counts import Counts
from recipes.data.tokens import PairIds

TOKENS = ("prompt", "chosen", "rejected")
MASKS = ("chosen_scored", "rejected_scored")


class Shard(NamedTuple):
    """What became of some rows that follow each other."""

    ids: list[PairIds]
    keys: np.ndarray  # uint64: a prompt's, for each pair
    counts: Counts


def to_bytes(shard: Shard) -> bytes:
    """The shard as numpy's own files hold arrays."""
    ids = shard.ids
    said = {"counts": shard.counts._asdict(), "notes": [pair.notes for pair in ids]}
    arrays: dict[str, Any] = {
        "row": np.array([pair.row for pair in ids], np.int64),
        "key": shard.keys,
        "scores": np.array([pair.scores or (np.nan, np.nan) for pair in ids], float),
        "said": np.frombuffer(json.dumps(said).encode(), np.uint8),
    }
    for name, dtype in (*((name, np.int32) for name in TOKENS), *((m, np.bool_) for m in MASKS)):
        parts = [getattr(pair, name) for pair in ids]
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
    each = [_parts(arrays[name], arrays[f"{name}_ends"]) for name in (*TOKENS, *MASKS)]
    scores = [None if np.isnan(one) else (one, other) for one, other in arrays["scores"].tolist()]
    rows, notes = arrays["row"].tolist(), map(tuple, said["notes"])
    ids = list(map(PairIds, rows, *each, notes, scores))
    return Shard(ids, arrays["key"], counts_io.from_json(said["counts"]))


def _parts(values: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return [values[start:stop] for start, stop in itertools.pairwise(ends.tolist())]

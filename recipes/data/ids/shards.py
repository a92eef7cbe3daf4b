"""The encoded form of consecutive rows, in memory and as bytes for a pipe or a disk."""

from collections.abc import Sequence
import itertools
import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
import safetensors.numpy

from recipes.data.chats.pair import Worth
from recipes.data.ids import counts as counts_io
from recipes.data.ids.counts import Counts
from recipes.data.ids.examples import Answer, AnswerIds, Encoded, ListIds, PairIds

# The arrays of a pair, of a single answer, and of a list, whose answers are joined.
TOKENS = {
    PairIds: ("prompt", "chosen", "rejected"),
    AnswerIds: ("prompt", "answer"),
    ListIds: ("prompt", "answers"),
}
MASKS = {
    PairIds: ("chosen_scored", "rejected_scored"),
    AnswerIds: ("scored",),
    ListIds: ("answers_scored",),
}


class Shard(NamedTuple):
    """What became of some consecutive rows."""

    ids: Sequence[Encoded]  # all of one kind
    keys: np.ndarray  # uint64: one per example, its prompt's key
    counts: Counts


def to_bytes(shard: Shard) -> bytes:
    """The shard as a safetensors file, with one joined array per kind, and where each part ends.

    A mask ends where its answer does.
    """
    ids = shard.ids
    kind = type(ids[0]) if ids else PairIds
    arrays = {"row": np.array([one.row for one in ids], np.int64), "key": shard.keys}
    fields = [_joined(one) if isinstance(one, ListIds) else one._asdict() for one in ids]
    for names, dtype in ((TOKENS[kind], np.int32), (MASKS[kind], np.bool_)):
        for name in names:
            arrays[name] = np.concatenate([np.zeros(0, dtype), *(one[name] for one in fields)])
    for name in TOKENS[kind]:
        arrays[f"{name}_ends"] = np.cumsum([0, *(len(one[name]) for one in fields)], dtype=np.int64)
    said = {"counts": shard.counts._asdict(), "notes": [one.notes for one in ids],
            "ratings": [one.ratings for one in ids], "worth": [one.worth for one in ids],
            "ranks": [one.ranks for one in ids if isinstance(one, ListIds)],
            "lengths": [one["lengths"] for one in fields if "lengths" in one]}  # fmt: skip
    return safetensors.numpy.save(arrays, {"said": json.dumps(said)})


def _joined(one: ListIds) -> dict[str, Any]:
    """The arrays of an example with its answers joined, and the answers' lengths."""
    joined = np.concatenate([answer.ids for answer in one.answers])
    scored = np.concatenate([answer.scored for answer in one.answers])
    lengths = [len(answer.ids) for answer in one.answers]
    return one._asdict() | {"answers": joined, "answers_scored": scored, "lengths": lengths}


def _parted(ids: np.ndarray, scored: np.ndarray, lengths: list[int]) -> tuple[Answer, ...]:
    ends = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return tuple(Answer(ids[start:stop], scored[start:stop]) for start, stop in ends)


def from_bytes(content: bytes | memoryview) -> Shard:
    """Reads what `to_bytes` wrote; all arrays are views, so that a mapped file stays on disk.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: `to_bytes` did not write it.
    """
    # The library would copy them.
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:begin]))

    def array(name: str, dtype: DTypeLike) -> np.ndarray:
        start, stop = header[name]["data_offsets"]
        count = (stop - start) // np.dtype(dtype).itemsize
        return np.frombuffer(content, dtype, count, begin + start)

    def parts(name: str, dtype: DTypeLike, text: str) -> list[np.ndarray]:
        values, ends = array(name, dtype), array(f"{text}_ends", np.int64).tolist()
        return [values[start:stop] for start, stop in itertools.pairwise(ends)]

    said = json.loads(header["__metadata__"]["said"])
    named = {"answer": AnswerIds, "answers": ListIds}
    kind = next((kind for name, kind in named.items() if name in header), PairIds)
    texts, masks = TOKENS[kind], MASKS[kind]
    tokens = [parts(name, np.int32, name) for name in texts]
    scored = [parts(name, np.bool_, text) for name, text in zip(masks, texts[1:], strict=True)]
    rows, notes = array("row", np.int64).tolist(), map(tuple, said["notes"])
    ratings = [one and tuple(one) for one in said["ratings"]]
    if kind is ListIds:
        answers = map(_parted, tokens[1], scored[0], said["lengths"])
        tokens, scored = [tokens[0], list(answers)], [list(map(tuple, said["ranks"]))]
    worth = itertools.starmap(Worth, said["worth"])
    ids = list(map(kind, rows, *tokens, *scored, notes, ratings, worth))
    return Shard(ids, array("key", np.uint64), counts_io.from_json(said["counts"]))

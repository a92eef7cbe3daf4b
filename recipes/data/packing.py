"""Pairs -> packed rows: each pair one stream with its prompt once, several streams a row.

A stream holds the chosen answer backwards, then the prompt, then the rejected answer, so that every
token sees one contiguous run of keys. Prompt "ab", chosen "xyz", rejected "uv" ("." ends nothing
here: the last token of an answer is only a target and is not stored):

  stored      y x a b u
  position    3 2 0 1 2
  first key   0 1 2 2 2
  last key    4 4 3 4 5      y: yxab   x: xab   a: a   b: ab   u: abu
  scored      b->x x->y y->z   b->u u->v      (from where in the row, to which token)

A pair too long for one row is stored as two ordinary streams, each answer behind its own prompt; so
is one whose answers' lengths turn the prompt otherwise (`Shape.alike`).
"""

from collections.abc import Sequence
import itertools
from typing import Any, NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.tokens import PairIds

CHOSEN, REJECTED = 0, 1


class Shape(NamedTuple):
    """The static shapes of micro-batches: full ones, and those with fewer rows at the end.

    `rows` and `few` count the rows of all devices together.
    """

    rows: int  # B
    row_length: int  # T
    pairs: int  # P
    few: int  # B of the smaller ones; the same as `rows` where there are none
    shards: int = 1  # G: how many devices share the rows of a micro-batch
    alike: int | None = None  # texts up to this length turn alike: see `zoo.rope.limit`


Values = Any  # np.ndarray where it is built, jax.Array on the devices


class Packed(NamedTuple):
    """A micro-batch. P counts the pairs of the update it belongs to.

    The rows of one device are one list of C = B / G x T positions, of which some are read for
    scores: those stand first, in the order of the rows.
    """

    tokens: Values  # int32 [B, T]
    positions: Values  # int32 [B, T]
    first: Values  # int32 [B, T]: token t sees the keys first[t] <= s < last[t] of its row
    last: Values  # int32 [B, T]
    lengths: Values  # int32 [B, T]: of the text that the token belongs to
    source: Values  # int32 [G, C]: where in the list a score is read
    target: Values  # int32 [G, C]: the token that is scored there
    slot: Values  # int32 [G, C]: whose pair it belongs to, -1: nobody's
    answer: Values  # int32 [G, C]: 0 chosen, 1 rejected
    scores: Values  # int32 [G]: how many there are
    is_pair: Values  # bool [P]: is this pair in this micro-batch?


class Stream(NamedTuple):
    """What is stored of a pair, counted from its own beginning."""

    tokens: np.ndarray
    positions: np.ndarray
    first: np.ndarray
    last: np.ndarray
    length: int  # of its longest text
    source: np.ndarray
    target: np.ndarray
    answer: np.ndarray


class Placed(NamedTuple):
    """Where a stream stands: streams of one row follow each other in order."""

    pair: int  # its number in the update
    stream: Stream


def prompt_once(pair: PairIds) -> Stream:
    """Chosen backwards, prompt, rejected. See the head of this file."""
    c, p, r = len(pair.chosen) - 1, len(pair.prompt), len(pair.rejected) - 1
    chosen, prompt, rejected = np.arange(c), np.arange(p), np.arange(r)
    # The first token of either answer is read off the last of the prompt.
    from_chosen = np.concatenate([[c + p - 1], chosen[::-1]])[pair.chosen_scored]
    from_rejected = np.concatenate([[c + p - 1], c + p + rejected])[pair.rejected_scored]
    targets = pair.chosen[pair.chosen_scored], pair.rejected[pair.rejected_scored]
    return Stream(
        tokens=np.concatenate([pair.chosen[:-1][::-1], pair.prompt, pair.rejected[:-1]]),
        positions=np.concatenate([p + chosen[::-1], prompt, p + rejected]),
        first=np.concatenate([chosen, np.full(p + r, c)]),
        last=np.concatenate([np.full(c, c + p), c + prompt + 1, c + p + rejected + 1]),
        length=p + max(c, r) + 1,
        source=np.concatenate([from_chosen, from_rejected]),
        target=np.concatenate(targets),
        answer=np.repeat([CHOSEN, REJECTED], [len(targets[0]), len(targets[1])]),
    )


def separate(pair: PairIds) -> tuple[Stream, Stream]:
    """Two causal streams, each answer behind its own copy of the prompt."""
    return (
        _causal(pair.prompt, pair.chosen, pair.chosen_scored, CHOSEN),
        _causal(pair.prompt, pair.rejected, pair.rejected_scored, REJECTED),
    )


def _causal(prompt: np.ndarray, answer: np.ndarray, scored: np.ndarray, which: int) -> Stream:
    tokens = np.concatenate([prompt, answer[:-1]])
    steps = np.arange(len(tokens))
    return Stream(
        tokens=tokens,
        positions=steps,
        first=np.zeros_like(steps),
        last=steps + 1,
        length=len(prompt) + len(answer),
        source=(len(prompt) - 1 + np.arange(len(answer)))[scored],
        target=answer[scored],
        answer=np.full(int(scored.sum()), which),
    )


def stored_length(pair: PairIds) -> int:
    """Positions a pair takes with its prompt once.

    After a prompt of one token there is one score more than there are tokens, and it needs a place.
    """
    return max(len(pair.prompt), 2) + len(pair.chosen) + len(pair.rejected) - 2


def real_tokens(pair: PairIds) -> int:
    """Tokens of both answers, each with its prompt: what a padded trainer would call real."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def place(pairs: Sequence[PairIds], shape: Shape) -> list[list[list[Placed]]]:
    """Micro-batches of rows of streams, by best fit of the longest first.

    The two streams of a pair that is stored separately stand in one micro-batch.

    Raises:
      ValueError: an answer does not fit into a row, or a micro-batch has one row and a pair needs
        two.
    """
    rows: list[list[Placed]] = []
    room: list[int] = []  # positions left in each row

    def put(row: int, pair: int, stream: Stream) -> None:
        while len(rows) <= row:
            rows.append([])
            room.append(shape.row_length)
        rows[row].append(Placed(pair, stream))
        room[row] -= _length([stream])
        if room[row] < 0:
            raise BadInput("a pair does not fit into its row")

    whole: list[tuple[int, tuple[Stream, ...]]] = []
    for i, pair in enumerate(pairs):
        streams = (prompt_once(pair),) if fits_once(pair, shape) else separate(pair)
        if _length(streams) <= shape.row_length:
            whole.append((i, streams))
            continue
        if shape.rows < 2:
            raise BadInput(
                f"row {pair.row} of the data is too long for one row and needs two in a micro-batch"
            )
        start = len(rows)
        if start % shape.rows == shape.rows - 1:
            start += 1  # its second stream would stand in the next micro-batch
        for offset, stream in enumerate(streams):
            put(start + offset, i, stream)
    apart = len(rows)
    whole.sort(key=lambda item: -_length(item[1]))
    for i, streams in whole:
        fitting = [row for row, left in enumerate(room) if left >= _length(streams)]
        row = min(fitting, key=lambda row: room[row], default=len(rows))
        for stream in streams:
            put(row, i, stream)
    return _cut(rows, apart, shape)


def _cut(rows: list[list[Placed]], apart: int, shape: Shape) -> list[list[list[Placed]]]:
    """Rows -> micro-batches; the first `apart` rows hold pairs in two, and stay in full ones."""
    full = max(len(rows) // shape.rows, -(-apart // shape.rows))
    rest = len(rows) - full * shape.rows
    small = max(-(-rest // shape.few), 0)
    if small * shape.few >= shape.rows:
        full, small = full + 1, 0
    sizes = [shape.rows] * full + [shape.few] * small
    rows += [[] for _ in range(sum(sizes) - len(rows))]
    starts = itertools.accumulate(sizes, initial=0)
    return [rows[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def fits_once(pair: PairIds, shape: Shape) -> bool:
    """Does the pair fit into one row, and may its answers share the prompt's rotary positions?"""
    longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
    alike = shape.alike is None or longest <= shape.alike
    return alike and stored_length(pair) <= shape.row_length


def fits_a_row(pair: PairIds, shape: Shape) -> bool:
    """Does one row hold all of the pair, with its prompt once or, where it must, twice?"""
    return fits_once(pair, shape) or _length(separate(pair)) <= shape.row_length


def _length(streams: Sequence[Stream]) -> int:
    return sum(max(len(stream.tokens), len(stream.target)) for stream in streams)


def build(rows: Sequence[Sequence[Placed]], shape: Shape, shards: Sequence[int]) -> Packed:
    """The arrays of one micro-batch; only the rows of these of its shards, a process's own."""
    each = len(rows) // shape.shards  # rows of a device
    B, T, G = len(shards) * each, shape.row_length, len(shards)
    C = each * T
    self_seen = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))  # padding sees itself
    batch = Packed(
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        first=self_seen.copy(),
        last=self_seen + 1,
        lengths=np.ones((B, T), np.int32),
        source=np.zeros((G, C), np.int32),
        target=np.zeros((G, C), np.int32),
        slot=np.full((G, C), -1, np.int32),
        answer=np.zeros((G, C), np.int32),
        scores=np.zeros(G, np.int32),
        is_pair=np.zeros(shape.pairs, bool),
    )
    for row in rows:
        batch.is_pair[[placed.pair for placed in row]] = True
    for g, shard in enumerate(shards):
        c = 0
        for at_row in range(each):
            b, t = g * each + at_row, 0
            for pair, stream in rows[shard * each + at_row]:
                at, scores = slice(t, t + len(stream.tokens)), slice(c, c + len(stream.target))
                batch.tokens[b, at] = stream.tokens
                batch.positions[b, at] = stream.positions
                batch.first[b, at] = stream.first + t
                batch.last[b, at] = stream.last + t
                batch.lengths[b, at] = stream.length
                batch.source[g, scores] = stream.source + at_row * T + t
                batch.target[g, scores] = stream.target
                batch.slot[g, scores] = pair
                batch.answer[g, scores] = stream.answer
                t, c = at.stop, scores.stop
        batch.scores[g] = c
    return batch

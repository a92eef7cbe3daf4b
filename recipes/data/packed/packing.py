"""Streams -> packed rows, several streams a row, and rows -> micro-batches of one static shape.

What is packed is a list of items. An item is one or several streams, that is lists of tokens with
what each of them sees, and every score read from a stream belongs to one of the item's answers.
How prompts and answers become streams is in `streams.py`.
"""

from collections.abc import Iterator, Sequence
import itertools
from typing import Any, NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.packed import stripes

CUT = 64  # what a device has more scores than tokens is a multiple of it: a tile is as wide


class Shape(NamedTuple):
    """The static shapes of micro-batches: full ones, and those with fewer rows at the end.

    `rows` and `few` count the rows of all devices together.
    """

    rows: int  # B
    row_length: int  # T
    examples: int  # P: of an update
    answers: int  # A: of an example
    few: int  # B of the smaller ones; the same as `rows` where there are none
    shards: int = 1  # how many devices, or groups of them, share the rows of a micro-batch
    alike: int | None = None  # texts up to this length turn alike: see `zoo.parts.rope.limit`
    ld_alpha: float | None = None  # what tokens count beyond the shortest answer: LD-DPO
    context: int = 1  # how many devices share the tokens of a row

    def listed(self, rows: int) -> int:
        """C, the length of a device's list of scores, for this many of its rows.

        Where rows are cut into stripes, one may have a score more than tokens of the streams at
        either end of it: the last token of a prompt is read for both answers.
        """
        own = self.row_length // self.context
        if self.context == 1:
            return rows * own
        more = 2 * own // stripes.width(self.row_length, self.context)
        return rows * (own + -(-more // CUT) * CUT)


Values = Any  # np.ndarray where it is built, jax.Array on the devices


class Packed(NamedTuple):
    """A micro-batch. P counts the examples of the update it belongs to, A the answers of each.

    All tokens of one device, its part of its rows, are a list, of which some are read for scores.
    These are numbered from 0 to C - 1, first those that there are, in the order of the rows.
    """

    tokens: Values  # int32 [B, T]
    positions: Values  # int32 [B, T]
    first: Values  # int32 [B, T]: token t sees the keys first[t] <= s < last[t] of its row
    last: Values  # int32 [B, T]
    lengths: Values  # int32 [B, T]: of the text that the token belongs to
    read_at: Values  # int32 [Z, C]: where in the list of tokens a score is read
    target: Values  # int32 [Z, C]: the token that is scored there
    owner: Values  # int32 [Z, C]: whose score it is, example * A + answer; -1: nobody's
    counts: Values  # int32 [Z]: how many scores there are
    scored: Values  # int32 [P, A]: how many of each answer, on all devices; 0: none is here
    weights: Values | None = None  # float32 [Z, C]: what each score counts; none: all count 1
    order: Values | None = None  # int32 [B, I]: where stripes of the row are stored; none: in order

    @property
    def is_here(self) -> Values:
        """Bool [P]: is this example of the update in this micro-batch?"""
        return (self.scored > 0).any(-1)


class Stream(NamedTuple):
    """A list of tokens, counted from its own beginning."""

    tokens: np.ndarray
    positions: np.ndarray
    first: np.ndarray  # `first` and `last` as in `Packed`
    last: np.ndarray
    length: int  # of its longest text
    read_at: np.ndarray
    target: np.ndarray
    answer: np.ndarray  # 0 to A - 1: whose score it is
    weights: np.ndarray | None = None  # what each score counts; none: all count 1


class Item(NamedTuple):
    """What is packed as one: its streams share a row, or take one each if that is too short."""

    row: int  # its number in the source
    streams: tuple[Stream, ...]


class Placed(NamedTuple):
    """Where a stream stands: streams of one row follow each other in order."""

    slot: int  # the number of its item in the update
    stream: Stream


def pack_rows(items: Sequence[Item], shape: Shape) -> list[list[list[Placed]]]:
    """Micro-batches of rows of streams, by best fit of the longest first.

    The streams of an item that takes several rows stand in one micro-batch.

    Raises:
      BadInput: a stream does not fit into a row, or an item needs more rows than a micro-batch has.
    """
    rows: list[list[Placed]] = []
    room: list[int] = []  # positions left in each row

    def put(row: int, slot: int, stream: Stream) -> None:
        while len(rows) <= row:
            rows.append([])
            room.append(shape.row_length)
        rows[row].append(Placed(slot, stream))
        room[row] -= _length([stream])
        if room[row] < 0:
            raise BadInput(
                f"row {items[slot].row} of the data has an answer that takes {_length([stream])} "
                f"positions with its prompt: raise --config.row_length={shape.row_length}"
            )

    whole: list[tuple[int, int, tuple[Stream, ...]]] = []
    for slot, (source_row, streams) in enumerate(items):
        size = _length(streams)
        if len(streams) == 1 or size <= shape.row_length:
            whole.append((size, slot, streams))
            continue
        if shape.rows < len(streams):
            raise BadInput(
                f"row {source_row} of the data is too long for one row and needs {len(streams)} "
                "rows in a micro-batch: raise --config.per_device_parallelism"
            )
        start = len(rows)
        if start % shape.rows + len(streams) > shape.rows:
            start += -start % shape.rows  # its last stream would stand in the next micro-batch
        for offset, stream in enumerate(streams):
            put(start + offset, slot, stream)
    apart = len(rows)
    whole.sort(key=lambda item: -item[0])
    for size, slot, streams in whole:
        fitting = [row for row, left in enumerate(room) if left >= size]
        row = min(fitting, key=lambda row: room[row], default=len(rows))
        for stream in streams:
            put(row, slot, stream)
    return _cut(rows, apart, shape)


def _cut(rows: list[list[Placed]], apart: int, shape: Shape) -> list[list[list[Placed]]]:
    """Rows -> micro-batches; the first `apart` hold items in several rows and stay in full ones."""
    full = max(len(rows) // shape.rows, -(-apart // shape.rows))
    rest = len(rows) - full * shape.rows
    small = max(-(-rest // shape.few), 0)
    if small * shape.few >= shape.rows:
        full, small = full + 1, 0
    sizes = [shape.rows] * full + [shape.few] * small
    rows += [[] for _ in range(sum(sizes) - len(rows))]
    starts = itertools.accumulate(sizes, initial=0)
    return [rows[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _length(streams: Sequence[Stream]) -> int:
    return sum(max(len(stream.tokens), len(stream.target)) for stream in streams)


def build(rows: Sequence[Sequence[Placed]], shape: Shape, shards: Sequence[int]) -> Packed:
    """The arrays of one micro-batch; only the rows of these of its shards, a process's own."""
    each = len(rows) // shape.shards  # rows of a device, or of those that share them
    here = [list(_laid(rows[shard * each + i], shape)) for shard in shards for i in range(each)]
    batch = _blank(each, len(shards), shape)
    for slot, stream in itertools.chain(*rows):
        batch.scored[slot] += np.bincount(stream.answer, minlength=shape.answers)
    for b, row in enumerate(here):
        for t, (_, stream) in row:
            at = slice(t, t + len(stream.tokens))
            batch.tokens[b, at] = stream.tokens
            batch.positions[b, at] = stream.positions
            batch.first[b, at] = stream.first + t
            batch.last[b, at] = stream.last + t
            batch.lengths[b, at] = stream.length
    if shape.context > 1:
        batch = _striped(batch, each, shape.context)
    for b, row in enumerate(here):
        for t, placed in row:
            _add_scores(batch, b, each, placed, placed.stream.read_at + t, shape)
    return batch


def _blank(each: int, shards: int, shape: Shape) -> Packed:
    """A micro-batch of nothing but padding."""
    B, T, Z, C = shards * each, shape.row_length, shards * shape.context, shape.listed(each)
    self_seen = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))  # padding sees itself
    return Packed(
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        first=self_seen.copy(),
        last=self_seen + 1,
        lengths=np.ones((B, T), np.int32),
        read_at=np.zeros((Z, C), np.int32),
        target=np.zeros((Z, C), np.int32),
        owner=np.full((Z, C), -1, np.int32),
        counts=np.zeros(Z, np.int32),
        scored=np.zeros((shape.examples, shape.answers), np.int32),
        weights=None if shape.ld_alpha is None else np.zeros((Z, C), np.float32),
    )


def _laid(row: Sequence[Placed], shape: Shape) -> Iterator[tuple[int, Placed]]:
    """The streams of a row, each with the place of its first token."""
    t = 0
    for placed in row:
        yield t, placed
        # Where rows are cut, every stream has a place for each of its scores.
        stream = placed.stream
        t += len(stream.tokens) if shape.context == 1 else _length([stream])


def _striped(batch: Packed, each: int, devices: int) -> Packed:
    """The tokens of a micro-batch as they are stored where devices share `each` rows."""
    groups = range(0, len(batch.tokens), each)
    own = [(batch.first[b : b + each], batch.last[b : b + each]) for b in groups]
    order = np.concatenate([stripes.dealt(*spans, devices) for spans in own])
    rows = batch.tokens, batch.positions, batch.first, batch.last, batch.lengths
    stored = [stripes.stored(array, order) for array in rows]
    return Packed(*stored, *batch[len(rows) :])._replace(order=order)


def _add_scores(
    batch: Packed, b: int, each: int, placed: Placed, read_at: np.ndarray, shape: Shape
) -> None:
    """Puts the scores that are read from these places of row b behind those of its devices."""
    stream, own = placed.stream, shape.row_length // shape.context
    if batch.order is not None:
        read_at = stripes.places(read_at, batch.order[b], shape.row_length)
    part, place = np.divmod(read_at, own)
    for i in np.unique(part):
        z, here = b // each * shape.context + i, part == i
        scores = slice(batch.counts[z], batch.counts[z] + here.sum())
        batch.read_at[z, scores] = place[here] + b % each * own
        batch.target[z, scores] = stream.target[here]
        batch.owner[z, scores] = placed.slot * shape.answers + stream.answer[here]
        if batch.weights is not None and stream.weights is not None:
            batch.weights[z, scores] = stream.weights[here]
        batch.counts[z] = scores.stop

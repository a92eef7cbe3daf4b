"""Lengths and devices -> the static shapes of micro-batches, so that little is padding."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.ids.examples import Example
from recipes.data.packed import packing, streams
from recipes.data.packed.packing import Item, Shape

# Updates that are packed to see how a shape would fill, and the step between row lengths, or their
# parts: the tiles of attention kernels are that wide.
LOOKED_AT, STEP = 6, 128
# Rows need not be longer, unless an answer is: some kernels hold a mask of row x row.
LONGEST = 2**12
# A fill that is this much less is worth it if fewer examples take several rows, or an update takes
# fewer micro-batches.
NEAR = 0.01


class Fill(NamedTuple):
    """How a shape fits the examples."""

    share: float  # stored tokens per position, the last micro-batches of updates included
    micro_batches: float  # per update


def fill(examples: Sequence[Example], shape: Shape) -> Fill:
    """How well a shape fills rows, over a few updates of examples from all over the list."""
    return _fill(_updates(examples, shape), shape)


def _updates(examples: Sequence[Example], shape: Shape) -> list[list[Item]]:
    """Outlines of a few updates; they depend on the length of a row, not on the count of rows."""
    updates = max(1, min(LOOKED_AT, len(examples) // shape.examples))
    again = -(-shape.examples // len(examples))  # an update may be longer than the list
    some = [(list(examples[i::updates]) * again)[: shape.examples] for i in range(updates)]
    return [[streams.outline(example, shape) for example in update] for update in some]


def _fill(updates: list[list[Item]], shape: Shape) -> Fill:
    stored = positions = count = 0
    for items in updates:
        micro_batches = packing.pack_rows(items, shape)
        stored += sum(len(p.stream.tokens) for b in micro_batches for row in b for p in row)
        positions += sum(len(rows) for rows in micro_batches) * shape.row_length
        count += len(micro_batches)
    return Fill(stored / positions, count / len(updates))


def choose(
    examples: Sequence[Example],
    *,
    per_update: int,
    shards: int,
    most: int,
    row_length: int | None = None,
    rows: int | None = None,
    alike: int | None = None,
    context: int = 1,
) -> Shape:
    """The shape that fills best with at most `most` positions a device, or what is left to choose.

    `rows` are those of a device, or of `context` devices that share them; `alike` as in `Shape`.
    Every answer must fit into a row; an example that does not takes a row for each of its answers.

    Raises:
      BadInput: there are such examples, and a micro-batch is to have fewer rows.
    """
    longest = max(map(streams.longest, examples))
    whole = max(map(streams.stored_length, examples))
    answers = max(len(example.answers) for example in examples)
    alone = np.array([streams.needed(example, alike) for example in examples])
    found, updates, outlined = [], [], 0
    most *= context
    most_here, step = min(most // (rows or 1), LONGEST), STEP * context
    for length in [row_length] if row_length else _lengths(longest, whole, most_here, step):
        probe = Shape(shards, length, per_update, answers, shards, shards, alike, context=context)
        # An example in several rows has them in one micro-batch, which then needs as many.
        least = 1 if shards >= answers or alone.max() <= length else -(-answers // shards)
        if rows and rows < least:
            continue
        probe = probe._replace(rows=least * shards, few=least * shards)
        if outlined < whole:  # in longer rows all examples are outlined alike
            updates, outlined = _updates(examples, probe), length
        needed = least * _fill(updates, probe).micro_batches  # rows of a device and update
        each = rows or max(least, _balanced(needed, max(1, most // length)))
        for few in {max(1, each // 4), max(1, each // 8)}:
            shape = probe._replace(rows=each * shards, few=few * shards)
            found.append((_fill(updates, shape), shape))
    if not found:
        raise BadInput(
            f"some examples do not fit into one row and need {answers} rows of a micro-batch: set "
            f"--config.per_device_parallelism={-(-answers // shards)}, or a longer "
            "--config.row_length"
        )
    best = max(filled.share for filled, _ in found)
    near = [(filled, shape) for filled, shape in found if filled.share >= best - NEAR]
    in_several = lambda shape: int((alone > shape.row_length).sum())
    order = lambda item: (in_several(item[1]), item[0].micro_batches, item[1].row_length)
    return min(near, key=order)[1]


def _lengths(longest: int, whole: int, most: int, step: int) -> Iterator[int]:
    """Row lengths worth a look: from the longest answer's on, in growing steps."""
    start = -(-longest // step) * step
    yield start
    length = max(start, -(-min(whole, most) // step) * step)
    while length <= max(most, start):
        yield length
        length += max(step, length // 4 // step * step)


def _balanced(needed: float, most: int) -> int:
    """Rows a micro-batch, so that the micro-batches of an update are few and alike."""
    return -(-int(-(-needed // 1)) // int(-(-needed // most)))

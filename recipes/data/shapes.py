"""Lengths and devices -> the static shapes of micro-batches, so that little is padding."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data import packing
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds

# Updates that are packed to see how a shape would fill, and the step between row lengths: the
# tiles of attention kernels are that wide.
LOOKED_AT, STEP = 6, 128
# Rows need not be longer, unless an answer is: some kernels hold a mask of row x row.
LONGEST = 2**12
# A fill that is this much less is worth it if fewer pairs are parted, or fewer micro-batches do.
NEAR = 0.01


class Fill(NamedTuple):
    """How a shape fits the pairs."""

    share: float  # stored tokens per position, the last micro-batches of updates included
    micro_batches: float  # per update


def fill(pairs: Sequence[PairIds], shape: Shape) -> Fill:
    """Over a few updates of pairs from all over the list."""
    stored = positions = count = 0
    updates = max(1, min(LOOKED_AT, len(pairs) // shape.pairs))
    again = -(-shape.pairs // len(pairs))  # an update may be longer than the list
    for i in range(updates):
        some = (list(pairs[i::updates]) * again)[: shape.pairs]
        micro_batches = packing.place(some, shape)
        stored += sum(len(p.stream.tokens) for b in micro_batches for row in b for p in row)
        positions += sum(len(rows) for rows in micro_batches) * shape.row_length
        count += len(micro_batches)
    return Fill(stored / positions, count / updates)


def choose(
    pairs: Sequence[PairIds],
    *,
    per_update: int,
    shards: int,
    most: int,
    row_length: int | None = None,
    rows: int | None = None,
    alike: int | None = None,
) -> Shape:
    """The shape that fills best with at most `most` positions a device, or what is left to choose.

    `rows` are those of a device; `alike` as in `Shape`. Every answer must fit into a row; a pair
    whose stream does not takes two.

    Raises:
      ValueError: there are such pairs, and a micro-batch is to have one row.
    """
    longest = max(
        len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) - 1 for pair in pairs
    )
    whole = max(map(packing.stored_length, pairs))
    found = []
    most_here = min(most // (rows or 1), LONGEST)
    for length in [row_length] if row_length else _lengths(longest, whole, most_here):
        # A pair in two rows has them in one micro-batch, which then needs two.
        probe = Shape(shards, length, per_update, shards, shards, alike)
        least = 1 if shards > 1 or all(packing.fits_a_row(pair, probe) for pair in pairs) else 2
        if rows and rows < least:
            continue
        probe = probe._replace(rows=least * shards, few=least * shards)
        needed = least * fill(pairs, probe).micro_batches  # rows of a device and update
        each = rows or max(least, _balanced(needed, max(1, most // length)))
        for few in {max(1, each // 4), max(1, each // 8)}:
            shape = Shape(each * shards, length, per_update, few * shards, shards, alike)
            found.append((fill(pairs, shape), shape))
    if not found:
        raise BadInput(
            "some pairs do not fit into one row and need two: set "
            "--config.per_device_parallelism=2, or a longer --config.row_length"
        )
    best = max(filled.share for filled, _ in found)
    near = [(filled, shape) for filled, shape in found if filled.share >= best - NEAR]
    in_two = lambda shape: sum(not packing.fits_a_row(pair, shape) for pair in pairs)
    order = lambda item: (in_two(item[1]), item[0].micro_batches, item[1].row_length)
    return min(near, key=order)[1]


def _lengths(longest: int, whole: int, most: int) -> Iterator[int]:
    """Row lengths worth a look: from the longest answer's on, in growing steps."""
    start = -(-longest // STEP) * STEP
    yield start
    length = max(start, -(-min(whole, most) // STEP) * STEP)
    while length <= max(most, start):
        yield length
        length += max(STEP, length // 4 // STEP * STEP)


def _balanced(needed: float, most: int) -> int:
    """Rows a micro-batch, so that the micro-batches of an update are few and alike."""
    return -(-int(-(-needed // 1)) // int(-(-needed // most)))

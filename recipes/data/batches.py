"""Pairs -> updates of exactly P pairs, packed into micro-batches of one static shape, by Grain."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from recipes.data import packing
from recipes.data.packing import Packed, Shape
from recipes.data.tokens import PairIds


class Update(NamedTuple):
    """The pairs of one update, in slots 0 to P - 1, and the micro-batches they are packed into."""

    rows: np.ndarray  # int64, at most P: the pairs' rows in the source
    micro_batches: list[Packed]
    real_tokens: int  # of both answers, each with its prompt
    stored_tokens: int
    chosen_tokens: int  # scored
    rejected_tokens: int


def shape_of(pairs: Sequence[PairIds], *, rows: int, row_length: int, per_update: int) -> Shape:
    """The shape of micro-batches with room for as many scores a row as these pairs need."""
    stored = sum(map(packing.stored_length, pairs))
    scored = sum(packing.scored(pair).sum() for pair in pairs)
    likely = 1.1 * row_length * scored / max(stored, 1)
    # Every pair must fit, in one row or with its two answers in two.
    longest = max(
        packing.scored(p).sum()
        if packing.stored_length(p) <= row_length
        else packing.scored(p).max()
        for p in pairs
    )
    room = max(min(likely, row_length), longest)
    return Shape(rows, row_length, -(-int(room) // 64) * 64, per_update)


def pack(pairs: Sequence[PairIds], shape: Shape, here: Sequence[int]) -> Update:
    """The micro-batches of an update: every process works out the same, and builds its own rows."""
    rows = packing.place(pairs, shape)
    count = -(-len(rows) // shape.rows)
    rows += [[] for _ in range(count * shape.rows - len(rows))]
    return Update(
        rows=np.array([pair.row for pair in pairs]),
        micro_batches=[
            packing.build(rows[i * shape.rows : (i + 1) * shape.rows], shape, here)
            for i in range(count)
        ],
        real_tokens=sum(map(packing.real_tokens, pairs)),
        stored_tokens=sum(len(placed.stream.tokens) for row in rows for placed in row),
        chosen_tokens=sum(int(pair.chosen_scored.sum()) for pair in pairs),
        rejected_tokens=sum(int(pair.rejected_scored.sum()) for pair in pairs),
    )


def training(
    pairs: Sequence[PairIds], shape: Shape, *, seed: int, here: Sequence[int]
) -> grain.MapDataset:
    """Element k is update k, of the pairs k * P to (k + 1) * P of an endless stream.

    Each epoch holds every pair once, in another order; an update may straddle two epochs. The
    element depends on nothing but k, the seed and the pairs: one integer is the place in the data.
    """
    return (
        grain.MapDataset.source(pairs)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(shape.pairs, batch_fn=list)
        .map(lambda update: pack(update, shape, here))
    )


def iterate(
    pairs: Sequence[PairIds], shape: Shape, rows: NamedSharding, *, seed: int, start: int
) -> Iterator[Update]:
    """The updates from `start` on, packed ahead in threads."""
    dataset = training(pairs, shape, seed=seed, here=rows_here(shape.rows, rows))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def first(pairs: Sequence[PairIds], shape: Shape, rows: NamedSharding) -> Update:
    """Some pairs to look at before training."""
    return pack(pairs[: shape.pairs], shape, rows_here(shape.rows, rows))


def in_order(pairs: Sequence[PairIds], shape: Shape, here: Sequence[int]) -> Iterator[Update]:
    """All pairs once, as they stand: for evaluation. The last element may hold fewer than P."""
    for start in range(0, len(pairs), shape.pairs):
        yield pack(pairs[start : start + shape.pairs], shape, here)


def rows_here(rows: int, sharding: NamedSharding) -> list[int]:
    """The rows of a batch on this process's devices, in order; on a pod they alternate."""
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    held = {row for index in parts if index is not None for row in range(*index[0].indices(rows))}
    return sorted(held)


def put(batch: Packed, rows: int, sharding: NamedSharding) -> Packed:
    """The micro-batch on the devices: its rows split, the list of its pairs on all of them."""
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def place(array: np.ndarray, where: NamedSharding, shape: tuple[int, ...]) -> jax.Array:
        return jax.make_array_from_process_local_data(where, array, shape)

    split = [place(a, sharding, (rows, *a.shape[1:])) for a in batch[:-1]]
    return Packed(*split, is_pair=place(batch.is_pair, everywhere, batch.is_pair.shape))

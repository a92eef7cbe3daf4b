"""Pairs -> updates of exactly P pairs, packed into micro-batches of one static shape, by Grain."""

from collections.abc import Iterator, Sequence
import itertools
from typing import NamedTuple

import grain
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from recipes.data import packing
from recipes.data.packing import Packed, Shape
from recipes.data.tokens import PairIds


class Place(NamedTuple):
    """How pairs are packed, and how the rows of a micro-batch are split over devices."""

    shape: Shape
    rows: NamedSharding


class Update(NamedTuple):
    """The pairs of one update, in slots 0 to P - 1, and the micro-batches they are packed into."""

    rows: np.ndarray  # int64, at most P: the pairs' rows in the source
    micro_batches: list[Packed]
    real_tokens: int  # of both answers, each with its prompt
    stored_tokens: int
    positions: int  # of the micro-batches, padding included
    chosen_tokens: int  # scored
    rejected_tokens: int
    scores: np.ndarray  # float [P, A], not a number where the data has none


def pack(pairs: Sequence[PairIds], shape: Shape, shards: Sequence[int]) -> Update:
    """The micro-batches of an update: every process works out the same, and builds its shards."""
    micro_batches = packing.place(pairs, shape)
    rows = list(itertools.chain(*micro_batches))
    return Update(
        rows=np.array([pair.row for pair in pairs]),
        micro_batches=[packing.build(rows, shape, shards) for rows in micro_batches],
        real_tokens=sum(map(packing.real_tokens, pairs)),
        stored_tokens=sum(len(placed.stream.tokens) for row in rows for placed in row),
        positions=len(rows) * shape.row_length,
        chosen_tokens=sum(int(pair.chosen_scored.sum()) for pair in pairs),
        rejected_tokens=sum(int(pair.rejected_scored.sum()) for pair in pairs),
        scores=np.array([pair.scores or (np.nan, np.nan) for pair in pairs]),
    )


def training(endless: grain.MapDataset, shape: Shape, *, shards: Sequence[int]) -> grain.MapDataset:
    """Element k is update k, of the pairs k * P to (k + 1) * P of an endless stream.

    The element depends on nothing but k and the stream: one integer is the place in the data.
    """
    return endless.batch(shape.pairs, batch_fn=list).map(lambda update: pack(update, shape, shards))


def iterate(endless: grain.MapDataset, place: Place, *, start: int) -> Iterator[Update]:
    """The updates from `start` on, packed ahead in threads."""
    dataset = training(endless, place.shape, shards=shards_here(place))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def in_order(pairs: Sequence[PairIds], place: Place) -> Iterator[Update]:
    """All pairs once, as they stand: for evaluation. The last element may hold fewer than P."""
    shards = shards_here(place)
    for start in range(0, len(pairs), place.shape.pairs):
        yield pack(pairs[start : start + place.shape.pairs], place.shape, shards)


def shards_here(place: Place) -> list[int]:
    """Which parts of a batch are on this process's devices, in order; on a pod they alternate."""
    count = place.shape.shards
    parts = place.rows.addressable_devices_indices_map((count,)).values()
    return sorted({i for index in parts if index for i in range(*index[0].indices(count))})


def put(batch: Packed, place: Place) -> Packed:
    """The micro-batch on the devices: its rows split, the list of its pairs on all of them."""
    here = len(batch.scores)

    def split(array: np.ndarray) -> jax.Array:
        whole = (len(array) // here * place.shape.shards, *array.shape[1:])
        return jax.make_array_from_process_local_data(place.rows, array, whole)

    is_pair = everywhere(batch.is_pair, place)
    return Packed(*map(split, batch[:-1]), is_pair=is_pair)


def everywhere(array: np.ndarray, place: Place) -> jax.Array:
    """An array that every process holds, on all devices."""
    whole = NamedSharding(place.rows.mesh, PartitionSpec())
    return jax.make_array_from_process_local_data(whole, array, array.shape)

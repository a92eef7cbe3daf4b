"""Examples -> updates of exactly P of them, packed into micro-batches of one static shape."""

from collections.abc import Callable, Iterator, Sequence
import itertools
from typing import Any, NamedTuple

import grain
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from numpy.typing import DTypeLike

from recipes.data.ids.examples import Example, called, ranks_of
from recipes.data.packed import packing, streams
from recipes.data.packed.packing import Packed, Shape


class Place(NamedTuple):
    """How examples are packed, and how the rows of a micro-batch are split over devices."""

    shape: Shape
    row_sharding: NamedSharding


class Update(NamedTuple):
    """The examples of one update, in slots 0 to P - 1, and the micro-batches they are packed into.

    At the end of a list there may be fewer than P.
    """

    source_rows: np.ndarray  # int64 [P]: their numbers in the source
    micro_batches: list[Packed]
    real_tokens: int  # of all answers, each with its prompt
    stored_tokens: int
    positions: int  # of the micro-batches, padding included
    scored: np.ndarray  # int [P, A]: scored tokens of each answer; 0: a shorter list has none
    ratings: np.ndarray  # float [P, A]: NaN where the data has none
    weights: np.ndarray  # float [P]: what the data says that an example's loss counts
    margins: np.ndarray  # float [P]: what it asks of its rewards
    names: tuple[str, ...]  # what the answers are called
    ranks: np.ndarray | None = None  # int [P, A]: of each in a list, 0 the best


class DataFields(NamedTuple):
    """What the data says about the examples of an update, on the devices."""

    tokens: jax.Array  # int32 [P, A]: scored tokens of each
    ratings: jax.Array  # float32 [P, A], NaN where there are none
    ranks: jax.Array | None = None  # int32 [P, A], of lists; pairs are ordered as they are
    weights: jax.Array | None = None  # float32 [P]: what the loss of an example counts; none: 1
    margins: jax.Array | None = None  # float32 [P]: what is asked of its rewards; none: 0


def pack(examples: Sequence[Example], shape: Shape, shards: Sequence[int]) -> Update:
    """The micro-batches of an update: every process packs the same, and builds its own shards."""
    items = [streams.item(example, shape) for example in examples]
    micro_batches = packing.pack_rows(items, shape)
    rows = list(itertools.chain(*micro_batches))
    return Update(
        source_rows=np.array([example.row for example in examples]),
        micro_batches=[packing.build(rows, shape, shards) for rows in micro_batches],
        real_tokens=sum(map(streams.real_tokens, examples)),
        stored_tokens=sum(len(placed.stream.tokens) for row in rows for placed in row),
        positions=len(rows) * shape.row_length,
        **example_fields(examples, shape.answers),
    )


def example_fields(examples: Sequence[Example], answers: int) -> dict[str, Any]:
    """What is known about the examples and their answers, by name as in `Update`."""

    def slots(absent: float | int, of: Callable[[Example], Sequence]) -> np.ndarray:
        held = [list(of(example)) for example in examples]
        return np.array([values + [absent] * (answers - len(values)) for values in held])

    return {
        "scored": slots(0, streams.scored_tokens),
        "ratings": slots(np.nan, lambda example: example.ratings or ()),
        "weights": np.array([example.worth.weight for example in examples]),
        "margins": np.array([example.worth.margin for example in examples]),
        "names": called(examples[0], answers),
        "ranks": slots(0, ranks_of) if answers > 2 else None,
    }


def training(endless: grain.MapDataset, shape: Shape, *, shards: Sequence[int]) -> grain.MapDataset:
    """Element k is update k, of the examples k * P to (k + 1) * P of an endless stream.

    The element depends on k and the stream alone: the position in the data is one integer.
    """
    # grain rounds the length of an endless stream up, past what an index can be, or down.
    updates = endless.batch(shape.examples, batch_fn=list, drop_remainder=True)
    return updates.map(lambda examples: pack(examples, shape, shards))


def iterate(endless: grain.MapDataset, place: Place, *, start: int) -> Iterator[Update]:
    """The updates from `start` on, packed ahead in threads."""
    dataset = training(endless, place.shape, shards=shards_here(place))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def in_order(examples: Sequence[Example], place: Place) -> Iterator[Update]:
    """All examples once, in order, for evaluation. The last update may hold fewer than P."""
    shards, P = shards_here(place), place.shape.examples
    for start in range(0, len(examples), P):
        yield pack(examples[start : start + P], place.shape, shards)


def shards_here(place: Place) -> list[int]:
    """Which parts of a batch are on this process's devices, in order; on a pod they alternate."""
    count = place.shape.shards
    parts = place.row_sharding.addressable_devices_indices_map((count,)).values()
    return sorted({i for index in parts if index for i in range(*index[0].indices(count))})


def put(batch: Packed, place: Place) -> Packed:
    """The micro-batch on the devices: its rows are split, `scored` is on all of them."""
    here = len(batch.counts) // place.shape.context

    def split(array: np.ndarray) -> jax.Array:
        whole = (len(array) // here * place.shape.shards, *array.shape[1:])
        return jax.make_array_from_process_local_data(place.row_sharding, array, whole)

    rows = batch._replace(scored=None)
    return jax.tree.map(split, rows)._replace(scored=put_replicated(batch.scored, place))


def data_fields(update: Update, place: Place) -> DataFields:
    """What the data says about the examples of an update and their answers."""

    def put(values: np.ndarray, dtype: DTypeLike) -> jax.Array:
        return put_replicated(values.astype(dtype), place)

    return DataFields(
        put(update.scored, np.int32),
        put(update.ratings, np.float32),
        None if update.ranks is None else put(update.ranks, np.int32),
        put(update.weights, np.float32),
        put(update.margins, np.float32),
    )


def put_replicated(array: np.ndarray, place: Place) -> jax.Array:
    """An array that every process holds, on all devices."""
    whole = NamedSharding(place.row_sharding.mesh, PartitionSpec())
    return jax.make_array_from_process_local_data(whole, array, array.shape)

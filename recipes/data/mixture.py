"""Several sources of examples, drawn by weight into one endless stream."""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import grain
import numpy as np

from recipes.data.ids.examples import Example


class Part(NamedTuple):
    """The training examples of one source. Their rows are numbered through all sources."""

    name: str
    weight: float | None  # its share of what is drawn, relative to the others'; None: its length
    examples: list[Example]
    last_row: int  # rows of the parts before it are smaller, of those after it larger


def numbered(examples: Sequence[Example], first_row: int) -> list[Example]:
    """The examples with `first_row` added to their rows."""
    if not first_row:
        return list(examples)
    return [one._replace(row=one.row + first_row) for one in examples]


def shares(parts: Sequence[Part]) -> list[float]:
    """The fraction of all drawn examples that each part contributes."""
    weights = [len(p.examples) if p.weight is None else p.weight for p in parts]
    return [weight / sum(weights) for weight in weights]


def endless(parts: Sequence[Part], seed: int) -> grain.MapDataset:
    """A stream of examples: element i depends on i, the seed and the parts alone.

    Each epoch of a part holds all of it once, in another order; parts take turns by weight. Without
    weights they are one.
    """
    lists = [part.examples for part in parts]
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        lists = [[*itertools.chain(*lists)]]
    streams = [
        grain.MapDataset.source(examples).seed(seed + i).shuffle().repeat()
        for i, examples in enumerate(lists)
    ]
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)


def first_rows(parts: Sequence[Part]) -> list[int]:
    """The number of the first row of each part."""
    return [0, *(part.last_row + 1 for part in parts)][: len(parts)]


def part_of(parts: Sequence[Part], rows: np.ndarray) -> np.ndarray:
    """The number of the part that each row is from."""
    return np.searchsorted([part.last_row for part in parts], rows)

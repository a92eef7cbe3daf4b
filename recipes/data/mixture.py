"""Several sources of examples, drawn by weight into one endless stream."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from recipes.data.ids.examples import Example


class Part(NamedTuple):
    """The training examples of one source. Their rows are numbered through all sources."""

    name: str
    weight: float  # its share of the examples drawn, relative to the others'
    examples: list[Example]
    last_row: int  # rows of the parts before it are smaller, of those after it larger


def numbered(examples: Sequence[Example], first_row: int) -> list[Example]:
    """The examples with `first_row` added to their rows."""
    if not first_row:
        return list(examples)
    return [one._replace(row=one.row + first_row) for one in examples]


def endless(parts: Sequence[Part], seed: int) -> grain.MapDataset:
    """A stream of examples: element i depends on i, the seed and the parts alone.

    Each epoch of a part holds all of it once, in another order; parts take turns by weight.
    """
    streams = [
        grain.MapDataset.source(part.examples).seed(seed + i).shuffle().repeat()
        for i, part in enumerate(parts)
    ]
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, [part.weight for part in parts])


def part_of(parts: Sequence[Part], rows: np.ndarray) -> np.ndarray:
    """The number of the part that each row is from."""
    return np.searchsorted([part.last_row for part in parts], rows)

"""The names of weights in Hugging Face files, as tables of plain strings.

A table maps each of our weights to (its HF name, its axes in the HF file): a weight with axes
"L D N H" and the entry ("model.layers.{L}.q_proj.weight", "(N H) D") is stacked from one tensor
per layer, and one with {L} and {E} from one per layer and expert. Where a weight has only some of
the model's layers, a third element gives their numbers: (3, 7, 11).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import re
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """How the files hold a weight: name, axes, and its layers' numbers unless they are 0, 1, 2."""

    name: str
    axes: str
    layers: Sequence[int] | None = None


Table = Mapping[str, Entry]
# (pattern, its replacement in the table's names, or None where such tensors are not read).
Names = Sequence[tuple[str, str | None]]


class Joined(NamedTuple):
    """Weights that the files hold side by side in one tensor, with all experts of a layer."""

    name: str
    paths: Sequence[str]
    turned: bool = False  # its last two axes are swapped


def of(entry: Entry, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every HF tensor of a weight, each with its index in the weight."""
    for index in np.ndindex(*shape[: len(stacked(entry.name))]):
        yield index, at(entry, index)


def at(entry: Entry, index: Sequence[int]) -> str:
    """The HF tensor of a layer (and expert) of a weight."""
    found = dict(zip(stacked(entry.name), index, strict=True))
    if entry.layers is not None:
        found["L"] = entry.layers[found["L"]]
    return entry.name.format(**found)


def stacked(name: str) -> list[str]:
    """The axis letters with one tensor per index; they come first in our axes."""
    return re.findall(r"\{(\w)\}", name)


def groups(hf_axes: str) -> list[str]:
    """Reads "(N H) D" as ["N H", "D"]; an axis of 1, "()", has no letters."""
    return [a or b for a, b in re.findall(r"\(([^)]*)\)|(\w+)", hf_axes)]


def known_as(name: str, names: Names) -> str | None:
    """The table's name for a tensor of a file; None: such tensors are not read."""
    for pattern, becomes in names:
        if re.search(pattern, name):
            return becomes and re.sub(pattern, becomes, name)
    return name


def renaming(named: Mapping[str, str], known: str) -> Callable[[str], str]:
    """A function from the table's names to a folder's, generalised from the one for `known`."""
    ours, theirs = known.split("."), named[known].split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    begins, instead = ("".join(f"{part}." for part in parts) for parts in (ours, theirs))

    def in_folder(name: str) -> str:
        if name in named or not name.startswith(begins):
            return named.get(name, name)
        return instead + name.removeprefix(begins)

    return in_folder

"""The repeating patterns that layers of several kinds form in a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Array

Index = TypeVar("Index", int, Array)


class Part(NamedTuple):
    """The layers of one scan: a pattern of kinds, repeated `times` times.

    Layer p of repetition i is layer `firsts[p] + i * steps[p]` of its kind.
    """

    kinds: tuple[str, ...]
    firsts: tuple[int, ...]
    steps: tuple[int, ...]
    times: int

    def layers(self, i: Index) -> list[tuple[str, Index]]:
        """The layers of repetition i: the kind of each, and its number within that kind."""
        of = zip(self.kinds, self.firsts, self.steps, strict=True)
        return [(kind, first + i * step) for kind, first, step in of]

    def split(self, times: int) -> tuple["Part", "Part"]:
        """Splits off the first `times` repetitions from the rest."""
        of = zip(self.firsts, self.steps, strict=True)
        later = tuple(first + times * step for first, step in of)
        rest = self._replace(firsts=later, times=self.times - times)
        return self._replace(times=times), rest


def schedule(kinds: Sequence[str]) -> tuple[Part, ...]:
    """Splits the kinds of all layers into repeating patterns, with any leading and trailing layers.

    "daabaaba" (one letter per kind) is d, then aab twice, then a. At each layer the pattern that
    covers the most layers is chosen, and among equals the shortest.
    """
    kinds, parts, passed = tuple(kinds), [], Counter()
    while (begin := passed.total()) < len(kinds):
        rest = kinds[begin:]
        covered = {n: n * _times(rest, n) for n in range(1, len(rest) + 1)}
        repeated = [n for n in covered if covered[n] > n]
        length = max(repeated, key=lambda n: (covered[n], -n), default=1)
        pattern, times = rest[:length], covered[length] // length
        before = [Counter(pattern[:p]) for p in range(length)]
        firsts = tuple(passed[kind] + before[p][kind] for p, kind in enumerate(pattern))
        parts.append(Part(pattern, firsts, tuple(map(pattern.count, pattern)), times))
        passed.update(pattern * times)
    return tuple(parts)


def _times(kinds: tuple[str, ...], length: int) -> int:
    """How often the first `length` kinds repeat at the start."""
    times = 1
    while kinds[times * length : (times + 1) * length] == kinds[:length]:
        times += 1
    return times


def numbers(kinds: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the layers of each kind within the model."""
    return {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in set(kinds)}


def of_kinds(
    named: Mapping[str, Mapping[str, tuple[str, str]]], model: str = "model"
) -> dict[str, tuple[str, str]]:
    """Turns tables of the weights in a layer of each kind into entries of HF_WEIGHTS."""
    return {
        f"blocks.{kind}.{ours}": (model + ".layers.{L}." + theirs, axes)
        for kind, own in named.items()
        for ours, (theirs, axes) in own.items()
    }

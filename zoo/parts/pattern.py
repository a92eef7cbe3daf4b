"""In which pattern the layers of a model follow each other, where they are of several kinds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Array

Index = TypeVar("Index", int, Array)


class Part(NamedTuple):
    """Layers that one scan goes through: a pattern of kinds, so many times.

    Layer p of repetition i is layer `firsts[p] + i * steps[p]` of its kind.
    """

    kinds: tuple[str, ...]
    firsts: tuple[int, ...]
    steps: tuple[int, ...]
    times: int

    def layers(self, i: Index) -> list[tuple[str, Index]]:
        """Repetition i: the kind of each layer, and which of its kind it is."""
        of = zip(self.kinds, self.firsts, self.steps, strict=True)
        return [(kind, first + i * step) for kind, first, step in of]

    def split(self, times: int) -> tuple["Part", "Part"]:
        """So many repetitions, and those after them."""
        of = zip(self.firsts, self.steps, strict=True)
        later = tuple(first + times * step for first, step in of)
        rest = self._replace(firsts=later, times=self.times - times)
        return self._replace(times=times), rest


def schedule(kinds: Sequence[str]) -> tuple[Part, ...]:
    """The kinds of all layers as patterns that repeat: what leads, the pattern, what is left over.

    "daabaaba" (a letter a kind) is d, then twice aab, then a. At each layer the pattern is taken
    that covers most, and of those the shortest.
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
    """How often the first `length` kinds stand one after the other."""
    times = 1
    while kinds[times * length : (times + 1) * length] == kinds[:length]:
        times += 1
    return times


def numbers(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Which layers of the model those of each kind are."""
    return {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in set(kinds)}


def of_kinds(
    named: Mapping[str, Mapping[str, tuple[str, str]]], model: str = "model"
) -> dict[str, tuple[str, str]]:
    """What a table says of the weights in a layer of each kind, as HF_WEIGHTS has it."""
    return {
        f"blocks.{kind}.{ours}": (model + ".layers.{L}." + theirs, axes)
        for kind, own in named.items()
        for ours, (theirs, axes) in own.items()
    }

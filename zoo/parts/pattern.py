"""In which pattern the layers of a model follow each other, where they are of several kinds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
from jaxtyping import Array
import numpy as np

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

    def places(self) -> list[tuple[str, int | None]]:
        """Within any repetition: the kind of each layer, and where `cut` puts it."""
        counted = [self.kinds[:p].count(kind) for p, kind in enumerate(self.kinds)]
        alone = [step == 1 for step in self.steps]
        return [(kind, None if one else count)
                for kind, one, count in zip(self.kinds, alone, counted, strict=True)]  # fmt: skip

    def cut(self, kind: str, stack: Array | np.ndarray) -> Array | np.ndarray:
        """Of a stack of this kind the layers of this part, by repetition.

        Where a repetition has several of them, by their place in it too: [times, places, …].
        """
        p = self.kinds.index(kind)
        first, step = self.firsts[p], self.steps[p]
        mine = jax.lax.slice_in_dim(stack, first, first + self.times * step)
        return mine if step == 1 else mine.reshape(self.times, step, *mine.shape[1:])


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

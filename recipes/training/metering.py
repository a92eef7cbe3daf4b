"""How fast a run is, by its own clock: tokens per second, fill, and where the time went."""

from collections.abc import Iterator, Sequence
import contextlib
import time

from jaxtyping import Int
import numpy as np

from recipes.data.packed.batches import Update
from recipes.training.compiling import Compiling


def lengths(scored: Int[np.ndarray, "examples A"], names: Sequence[str]) -> dict[str, int | float]:
    """Scored tokens per answer, on average."""
    return _named("length", scored, scored > 0, names)


def _named(
    what: str, values: np.ndarray, here: np.ndarray, names: Sequence[str]
) -> dict[str, int | float]:
    """A mean for each answer, by metric name, over the examples that have the answer."""
    sums, counts = np.where(here, values, 0).sum(0).tolist(), here.sum(0).tolist()
    told = zip(names, sums, counts, strict=True)
    return {f"{what}_{name}": total / count for name, total, count in told if count}


def in_words(seconds: float) -> str:
    """A time in words, with no more digits than an estimate deserves."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"


class Meter:
    """Speed and fill since the last read, measured without waiting for the devices."""

    def __init__(self, compiling: Compiling) -> None:
        self._compiling = compiling
        self._is_told = False  # whether the time left was given
        self._spent: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._since = time.perf_counter()
        self._updates: list[Update] = []
        self._waited = 0.0
        self._compiling.forget()

    def _trained(self) -> float:
        """Seconds of training, including waiting for data but not compiling."""
        return time.perf_counter() - self._since - self._compiling.seconds()

    def _is_known(self) -> bool:
        """Whether the time tells the speed; devices still compute while a program is compiled."""
        return self._compiling.seconds() < self._trained()

    def add(self, update: Update) -> None:
        """Counts an update."""
        self._updates.append(update._replace(micro_batches=[]))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the wait for the next update to be packed."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Stops the clock: evaluation, samples, saving and exporting are not training."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._since += seconds
        self._compiling.forget(since=start)
        self._spent[what] = self._spent.get(what, 0) + seconds

    def times(self) -> dict[str, float]:
        """Seconds since the last call, by what they went into."""
        self._spent["steps"] = self._trained() - self._waited
        self._spent["input"] = self._waited
        if compiling := self._compiling.seconds():
            self._spent["compiling"] = compiling
        return {f"time/{what}": self.time_of(what) for what in tuple(self._spent)}

    def time_of(self, what: str) -> float:
        """Seconds that went into pauses of this name since they were last read."""
        return self._spent.pop(what)

    def time_left(self, updates: int) -> str | None:
        """An estimate of the time left, in words, given once, as soon as the speed is known."""
        if self._is_told or not self._is_known():
            return None
        self._is_told = True
        each = self._trained() / len(self._updates)
        return f"about {in_words(each * updates)} remaining, plus evaluation and saving"

    def read(self) -> dict[str, int | float]:
        """Real tokens per second (all answers, each with its prompt), fill, mean lengths.

        `input_wait` is the share of the time that was spent waiting for data; the scores are the
        ratings of the answers in the data, if it has any. The speed is left out if most of the time
        went into compiling.
        """
        seconds, values = self._trained(), {}
        total = lambda name: sum(getattr(update, name) for update in self._updates)
        scored = np.concatenate([update.scored for update in self._updates])
        if self._is_known():
            values["tokens_per_second"] = total("real_tokens") / seconds
            values["input_wait"] = self._waited / seconds
        values |= {
            "pack_fill": total("stored_tokens") / total("positions"),
            **lengths(scored, self._updates[0].names),
        }
        ratings = np.concatenate([update.ratings for update in self._updates])
        values |= _named("score", ratings, ~np.isnan(ratings), self._updates[0].names)
        self._clear()
        return values

"""Seconds that go into compiling programs, as jax tells of them: they are not a step's own."""

from collections.abc import Iterator
import contextlib
import time
from typing import NamedTuple

import jax

EVENTS = "/jax/core/compile/"  # tracing, lowering, and XLA's own work or the read of its cache


class Span(NamedTuple):
    """From when to when, in seconds of `time.perf_counter`."""

    start: float
    end: float


class Compiling:
    """What was compiled since it was told to forget."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def hear(self, event: str, duration_secs: float, **_: object) -> None:
        """An event that has just ended; those that began within it are part of it."""
        if event.startswith(EVENTS):
            span = Span(time.perf_counter() - duration_secs, time.perf_counter())
            while self._spans and self._spans[-1].start >= span.start:
                self._spans.pop()
            self._spans.append(span)

    def seconds(self) -> float:
        """Seconds spent compiling so far."""
        return sum((span.end - span.start for span in self._spans), 0.0)

    def forget(self, since: float = 0.0) -> None:
        """Drops what began then or later, of what it has heard."""
        self._spans = [span for span in self._spans if span.start < since]


@contextlib.contextmanager
def heard() -> Iterator[Compiling]:
    """Counts what is compiled from here on."""
    compiling = Compiling()
    jax.monitoring.register_event_duration_secs_listener(compiling.hear)
    try:
        yield compiling
    finally:
        jax.monitoring.unregister_event_duration_listener(compiling.hear)

"""Checkpoints by the clock: after so many minutes, however many steps they were."""

import time

import jax

from checkpoints_io import processes


class Alarm:
    """Rings once so many minutes have passed since the last checkpoint, or the start.

    All processes get the same answer if they ask equally often: it rings for all of them one step
    after the first of their clocks has come so far, so that none waits for the others' clocks.
    """

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """A checkpoint is being written: the minutes begin again."""
        self._since = time.monotonic()
        self._asked: jax.Array | None = None

    def rings(self) -> bool:
        """Whether a checkpoint is due now."""
        if self._seconds is None:
            return False
        late = time.monotonic() - self._since >= self._seconds
        if jax.process_count() == 1:
            return late
        before, self._asked = self._asked, processes.any_says(late)
        return before is not None and bool(before)

"""A trace of some steps, by JAX's profiler."""

import jax
from jaxtyping import PyTree

from checkpoints_io import places


class Trace:
    """Begins before the first of these steps that is taken, and ends after the last."""

    def __init__(self, steps: range, folder: places.Place):
        self._steps, self._folder = steps, folder
        self._is_on = False

    def before(self, step: int) -> None:
        """Starts the trace, if this is its first step."""
        if step in self._steps and not self._is_on:
            jax.profiler.start_trace(self._folder.local())
            self._is_on = True

    def after(self, step: int, result: PyTree) -> None:
        """Ends the trace after its last step, once the devices have its result."""
        if self._is_on and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was traced; a run may end before the last of the steps."""
        if self._is_on:
            jax.profiler.stop_trace()
        self._is_on = False

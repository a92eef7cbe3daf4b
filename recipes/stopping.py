"""A run that is asked to stop: by SIGTERM, which comes before a machine is taken away, or Ctrl-C.

The step under way is finished and saved, and the program ends well: the same command goes on.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from recipes.prepare import say


@contextlib.contextmanager
def asked() -> Iterator[Callable[[int], bool]]:
    """Within it signals only ask; the function says behind each step whether the run is to end.

    All processes of a run are told the same, at the same step. A second Ctrl-C ends it at once.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signals come
        yield lambda _: False
        return
    several = jax.process_count() > 1
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            say("\nasked to stop: the step under way is finished and saved")
        received.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)  # which jax listens to, and tells the others

    # Of several processes jax itself waits for SIGTERM, and settles on a step for all of them.
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda _: bool(received)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)

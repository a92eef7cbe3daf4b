"""A run that is asked to stop: by SIGTERM, which comes before a machine is taken away, or Ctrl-C.

The step under way is finished and saved, and the program ends well: the same command goes on.
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import signal
import threading
from typing import Any

import jax
from jax import Array
from jax._src import distributed

from recipes.data.packing import Packed
from recipes.logps import Forward
from recipes.prepare import say


class Asked(Exception):
    """The run is to end, and nothing is wrong."""


@contextlib.contextmanager
def asked() -> Iterator[Callable[[], bool]]:
    """Within it signals only ask; the function says whether the run is to end.

    All processes of a run are told the same, if they ask equally often. `Asked` ends the block, and
    goes no further. A second Ctrl-C ends the run at once.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signals come
        yield lambda: False
        return
    several = jax.process_count() > 1
    received: list[int] = []
    agreed: list[int] = []
    times = itertools.count(1)
    # Of several processes jax itself waits for SIGTERM, and settles for all of them on one of the
    # times that they ask. Orbax asks it too, by the number of the step, and jax, which knows the
    # last number only, would wait for a time that is over: so Orbax finds nobody to ask.
    manager: Any = distributed.global_state.preemption_sync_manager

    def stop() -> bool:
        if not several:
            return bool(received)
        if not agreed and manager.reached_sync_point(at := next(times)):
            agreed.append(at)
        return bool(agreed)

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            say("\nasked to stop: the step under way, if there is one, is finished and saved")
        received.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)  # which jax listens to, and tells the others

    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(number, note) for number in numbers]
    distributed.global_state.preemption_sync_manager = None
    try:
        yield stop
    except Asked:
        say("stopped: the same command goes on")
    finally:
        distributed.global_state.preemption_sync_manager = manager
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


def heeding(stop: Callable[[], bool], forward: Forward) -> Forward:
    """A forward pass that raises `Asked`, in place of an answer, once the run is asked to stop."""

    def unless_asked(batch: Packed) -> Array:
        if stop():
            raise Asked
        return forward(batch)

    return unless_asked

"""A run that is asked to stop: by SIGTERM, which comes before a machine is taken away, or Ctrl-C.

The step under way is finished and saved, and the program ends well: the same command goes on.
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import os
import select
import signal
import threading
from typing import Any

import jax
from jax import Array
from jax._src import distributed

from recipes.data.packed.packing import Packed
from recipes.training.logps import Forward
from recipes.training.run import say

ASKED = (
    "\nasked to stop: the step under way, if there is one, is finished and saved; Ctrl-C once more "
    "ends the run at once"
)
# Seconds that a second Ctrl-C leaves the program to end by itself.
GRACE = 0.5


class Asked(Exception):
    """The run is to end, and nothing is wrong."""


@contextlib.contextmanager
def asked() -> Iterator[Callable[[], bool]]:
    """Within it signals only ask; the function says whether the run is to end.

    All processes of a run are told the same, if they ask equally often. `Asked` ends the block, and
    goes no further. A second Ctrl-C raises KeyboardInterrupt and, where that does not end the block
    within a second (a thread that waits for the devices or for a save sees no signals), it ends the
    process with status 130. Files and checkpoints that were not whole yet are left out.
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

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)  # which jax listens to, and tells the others

    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(number, note) for number in numbers]
    unwatch = _watch()
    distributed.global_state.preemption_sync_manager = None
    try:
        yield stop
    except Asked:
        say("stopped: the same command goes on")
    finally:
        distributed.global_state.preemption_sync_manager = manager
        unwatch()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


def _watch() -> Callable[[], None]:
    """Hears signals when they come, whatever the main thread waits for; returns how to end it."""
    heard, tell = os.pipe()
    os.set_blocking(tell, False)

    def watch() -> None:
        asked = False
        while came := os.read(heard, 1):
            if asked and came[0] == signal.SIGINT:
                # Ready: the block was left, and its end of the pipe closed, or a third one came.
                if not select.select([heard], [], [], GRACE)[0] or os.read(heard, 1):
                    os._exit(130)
                break
            if not asked and came[0] in (signal.SIGINT, signal.SIGTERM):
                asked = True
                # In a thread of its own: a terminal that was halted (Ctrl-S) takes no text.
                threading.Thread(target=say, args=(ASKED,), daemon=True).start()
        os.close(heard)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def unwatch() -> None:
        signal.set_wakeup_fd(before)
        os.close(tell)
        watcher.join()

    return unwatch


def heeding(stop: Callable[[], bool], forward: Forward) -> Forward:
    """A forward pass that raises `Asked`, in place of an answer, once the run is asked to stop."""

    def unless_asked(batch: Packed) -> Array:
        if stop():
            raise Asked
        return forward(batch)

    return unless_asked

"""Stopping a run on request: by SIGTERM, which precedes a machine's preemption, or by Ctrl-C.

The current step is finished and saved, and the program exits with status 75: the same command
resumes the run.
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

from recipes.data.packed.packing import Packed
from recipes.training.logps import Forward
from recipes.training.run import say

ASKED = "\nstop requested{by}: the current step, if any, is finished and saved{more}"
BY = {
    signal.SIGINT: ("", "; a second Ctrl-C ends the run at once"),
    signal.SIGTERM: (" by SIGTERM", ""),
}
# Seconds that the program has to end by itself after a second Ctrl-C.
GRACE = 0.5


class StopRequested(Exception):
    """The run was asked to stop; nothing is wrong."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Makes signals only ask the run to stop within the block; the function says if one did.

    All processes of a run get the same answer if they ask equally often. `StopRequested` ends the
    block and goes no further. A second Ctrl-C raises KeyboardInterrupt and, if that does not end
    the block within a second (a thread that waits for the devices or for a save sees no signals),
    ends the process with status 130. Incomplete files and checkpoints are discarded.
    """
    if threading.current_thread() is not threading.main_thread():  # only it gets signals
        yield lambda: False
        return
    several = jax.process_count() > 1
    received: list[int] = []
    agreed: list[int] = []
    times = itertools.count(1)
    manager, give_back = _taken_from_jax()

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
            signal.raise_signal(signal.SIGTERM)  # jax listens for it, and tells the other processes

    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(number, note) for number in numbers]
    unwatch = _watch()
    try:
        yield stop
    except StopRequested:
        say("stopped: the same command resumes the run")
    finally:
        give_back()
        unwatch()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


def _taken_from_jax() -> tuple[Any, Callable[[], None]]:
    """Jax's agreement on when all processes stop, hidden from Orbax; and how to put it back.

    With several processes jax itself listens for SIGTERM, and chooses a call at which all stop.
    Orbax would ask jax too, by step number; jax knows only the last number and would wait for a
    step that has passed. With one process it is None.

    This is the project's only private name of jax: a test fails if a version moves it.
    """
    from jax._src import distributed

    state = distributed.global_state
    manager, state.preemption_sync_manager = state.preemption_sync_manager, None
    return manager, lambda: setattr(state, "preemption_sync_manager", manager)


def _watch() -> Callable[[], None]:
    """Receives signals even while the main thread waits; returns how to stop watching."""
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
                by, more = BY[signal.Signals(came[0])]
                # In a thread of its own: a terminal that was halted (Ctrl-S) takes no text.
                threading.Thread(
                    target=say, args=(ASKED.format(by=by, more=more),), daemon=True
                ).start()
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
    """A forward pass that raises `StopRequested` instead once the run is asked to stop."""

    def unless_asked(batch: Packed) -> Array:
        if stop():
            raise StopRequested
        return forward(batch)

    return unless_asked

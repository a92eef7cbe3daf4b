"""Ends a run that hangs, so that its launcher can restart it.

A process that has stopped, a network that is gone or a disk that never answers leaves the others
waiting for ever, and their machines with them.
"""

from collections.abc import Callable, Iterator
import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import NoReturn

# Seconds after which a process ends that holds the interpreter's lock, and can say no sentence.
GRACE = 5
STDERR = 2


@contextlib.contextmanager
def over(minutes: float | None, stop: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Inside the block the process ends if `stop` is not called for this many minutes; None: never.

    Whatever takes long asks it after each of its parts, for it says whether the run is to stop:
    who asks is alive. The function is `stop`, watched.
    """
    if minutes is None:
        yield stop
        return
    bound, last, left = 60 * minutes, [time.monotonic()], threading.Event()

    def rely() -> None:  # where the thread below never runs again, one without the lock ends it all
        faulthandler.dump_traceback_later(bound + GRACE, exit=True, file=STDERR)

    def watch() -> None:
        remaining = bound
        while not left.wait(min(remaining, bound / 10)):
            remaining = last[0] + bound - time.monotonic()
            if remaining <= 0:
                end("a step, an exchange between processes, a save or an export hangs", minutes)
            rely()

    def alive() -> bool:
        last[0] = time.monotonic()
        return stop()

    watcher = threading.Thread(target=watch, name="watchdog", daemon=True)
    rely()
    watcher.start()
    try:
        yield alive
    finally:
        left.set()
        watcher.join()
        faulthandler.cancel_dump_traceback_later()


def check_save(seconds: float, minutes: float | None) -> None:
    """Ends the process where a save in the background has been under way for longer than that."""
    if minutes is not None and seconds > 60 * minutes:
        end("a save hangs in the background", minutes)


def end(what: str, minutes: float) -> NoReturn:
    """Ends the process with a sentence and the stack of every thread, status 1."""
    print(
        f"error: {what}: no progress for {minutes:g} minutes (--config.hang_minutes). The same "
        "command resumes from the newest checkpoint; raise the setting if this was not a hang. "
        "All threads:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=STDERR, all_threads=True)
    os._exit(1)

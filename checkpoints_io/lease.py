"""Alone in a place of a bucket, where no file can be locked: a lease that is renewed, or runs out.

Whoever wants to be alone writes an object of its own, and then lists all there are. Who sees none
that lives beside it is alone; any other takes its own back. Of two that come at once both may go
back, and try again. No bucket need know conditions for that, and its clock tells ages.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import random
import secrets
import socket
import sys
import threading
import time

from absl import logging
import fsspec

RENEWED, RUNS_OUT = 15.0, 60.0  # seconds


@contextlib.contextmanager
def held(
    fs: fsspec.AbstractFileSystem,
    room: str,
    *,
    otherwise: Callable[[], None],
    meanwhile: Callable[[], None],
) -> Iterator[None]:
    """No other process holds a lease in the room in the block.

    If one is seen to renew its own, `otherwise` raises, or this waits; one that died is waited for
    until its lease has run out. `meanwhile` is called from a thread after every renewal.
    """
    own = _taken(fs, room, otherwise)
    left = threading.Event()
    renewing = threading.Thread(target=_renew, args=(fs, own, left, meanwhile), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        left.set()
        renewing.join()
        with contextlib.suppress(Exception):  # then it runs out
            fs.rm_file(own)


def _taken(fs: fsspec.AbstractFileSystem, room: str, otherwise: Callable[[], None]) -> str:
    """The object of a lease that is this process's; the dead are cleared away."""
    seen: dict[str, float] = {}
    while True:
        own = f"{room}/{secrets.token_hex(8)}"  # another each time: only an owner renews one
        _write(fs, own)
        times = _times(fs, room)
        ages = {name: times[own] - at for name, at in times.items() if name != own}
        alive = {name: times[name] for name, age in ages.items() if age < RUNS_OUT}
        if not alive:
            for dead in ages:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(dead)
            return own
        fs.rm_file(own)
        if any(name in seen and at > seen[name] for name, at in alive.items()):
            otherwise()
        elif not seen:
            told = "%s: another process may be there: up to %.0f seconds until that is known"
            logging.warning(told, fs.unstrip_protocol(room), RUNS_OUT)
        seen = {name: seen.get(name, at) for name, at in alive.items()}
        time.sleep(random.uniform(0.1, 0.3) * RENEWED)


def _write(fs: fsspec.AbstractFileSystem, own: str) -> None:
    fs.pipe_file(own, f"{socket.gethostname()} {os.getpid()}\n".encode())


def _times(fs: fsspec.AbstractFileSystem, room: str) -> dict[str, float]:
    """When each was last renewed, in seconds."""
    found = {}
    for name in fs.ls(room, detail=False):
        with contextlib.suppress(FileNotFoundError):  # taken back meanwhile
            found[name] = fs.modified(name).timestamp()
    return found


def _renew(
    fs: fsspec.AbstractFileSystem,
    own: str,
    left: threading.Event,
    meanwhile: Callable[[], None],
) -> None:
    room = own.rpartition("/")[0]
    while not left.wait(RENEWED):
        # While the bucket cannot be reached it is tried again: another process may be as far off.
        with contextlib.suppress(Exception):
            try:
                there = own in fs.ls(room, detail=False)
            except FileNotFoundError:
                there = False
            if not there:
                _end(fs.unstrip_protocol(room))
            _write(fs, own)
            meanwhile()


def _end(room: str) -> None:
    """Ends this process: two that write to the same place would overwrite each other's work."""
    print(
        f"error: {room}: this process was paused, or could not reach the bucket, for more than "
        f"{RUNS_OUT:.0f} seconds, and another one has taken its place: it ends here",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

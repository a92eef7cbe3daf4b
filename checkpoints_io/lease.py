"""Exclusive use of a place in a bucket, where no file can be locked: a lease that is renewed.

A process that wants exclusive use writes an object of its own, and then lists all of them. If it
sees no other live one it holds the lease; otherwise it removes its own. Of two that come at once
both may withdraw, and try again. This needs no conditional writes, and ages are by the bucket's
clock.
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
    """Holds the only lease in the room for the duration of the block.

    If another process is seen to renew its own, `otherwise` raises, or this waits; the lease of a
    dead process is waited out. `meanwhile` is called repeatedly from a thread of its own, as a call
    may take longer than a lease lasts.
    """
    own = _taken(fs, room, otherwise)
    left = threading.Event()
    threads = [
        threading.Thread(target=_renew, args=(fs, own, left), daemon=True),
        threading.Thread(target=_repeat, args=(meanwhile, left), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        left.set()
        for thread in threads:
            thread.join()
        with contextlib.suppress(Exception):  # a lease that cannot be removed runs out
            fs.rm_file(own)


def _taken(fs: fsspec.AbstractFileSystem, room: str, otherwise: Callable[[], None]) -> str:
    """Waits for a lease and returns its object; expired leases are cleared away."""
    seen: dict[str, float] = {}
    while True:
        own = f"{room}/{secrets.token_hex(8)}"  # a new one each time: only its owner renews it
        _write(fs, own)
        times = _times(fs, room)
        alive = _alive(times, own)
        if not alive:
            for dead in times.keys() - {own}:
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


def _alive(times: dict[str, float], own: str) -> dict[str, float]:
    """The leases of other processes that have not run out."""
    return {name: at for name, at in times.items() if name != own and times[own] - at < RUNS_OUT}


def _times(fs: fsspec.AbstractFileSystem, room: str) -> dict[str, float]:
    """When each lease was last renewed, in seconds."""
    found = {}
    for name in fs.ls(room, detail=False):
        with contextlib.suppress(FileNotFoundError):  # removed in the meantime
            found[name] = fs.modified(name).timestamp()
    return found


def _repeat(meanwhile: Callable[[], None], left: threading.Event) -> None:
    while not left.wait(RENEWED):
        with contextlib.suppress(Exception):  # the next call does what this one did not
            meanwhile()


def _renew(fs: fsspec.AbstractFileSystem, own: str, left: threading.Event) -> None:
    room, renewed = own.rpartition("/")[0], time.monotonic()
    while not left.wait(RENEWED):
        # An unreachable bucket is tried again: other processes may not reach it either.
        with contextlib.suppress(Exception):
            try:
                there = own in fs.ls(room, detail=False)
            except FileNotFoundError:
                there = False
            if not there:
                _end(fs.unstrip_protocol(room))
            _write(fs, own)
            late, renewed = time.monotonic() - renewed > RUNS_OUT, time.monotonic()
            # Before a late renewal another process may have taken this one's place.
            if late and _alive(_times(fs, room), own):
                with contextlib.suppress(Exception):
                    fs.rm_file(own)
                _end(fs.unstrip_protocol(room))


def _end(room: str) -> None:
    """Ends this process: two that write to the same place would overwrite each other's work."""
    print(
        f"error: {room}: this process was paused, or could not reach the bucket, for more than "
        f"{RUNS_OUT:.0f} seconds, and another one has taken its place: it ends here",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

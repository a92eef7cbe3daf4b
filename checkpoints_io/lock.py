"""A file that one process at a time may hold, of all that see its disk."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import pathlib

from absl import logging


@contextlib.contextmanager
def held(path: pathlib.Path, *, otherwise: Callable[[], None]) -> Iterator[None]:
    """Within it no other process holds the file; where one does, `otherwise` raises, or it waits.

    On a disk that knows no locks all may hold it, and are told so.

    Raises:
      OSError: the file cannot be made.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            otherwise()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            told = "%s: no lock can be had (%s): see to it that no other process writes there"
            logging.warning(told, path, error.strerror)
        yield

"""A lock file that one process at a time may hold, among all that see its disk."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import pathlib

from absl import logging

from checkpoints_io.errors import StorageError


@contextlib.contextmanager
def held(path: pathlib.Path, *, otherwise: Callable[[], None]) -> Iterator[None]:
    """Locks the file for the block; if another process holds it, `otherwise` raises, or it waits.

    On a disk without locks every process may hold it, and a warning says so. The file's content is
    left alone.

    Raises:
      OSError: the file cannot be made, or is a link.
    """
    refuse_link(path)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            otherwise()
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError as error:
            told = "%s: it cannot be locked (%s): make sure that no other process writes there"
            logging.warning(told, path, error.strerror)
        yield
    finally:
        os.close(number)


def refuse_link(path: pathlib.Path, *, folder: bool = False) -> None:
    """Refuses a path to be written or removed that is neither an ordinary file or folder nor free.

    Raises:
      OSError: it is a link, through which something else would be changed, or not an ordinary file
        (or folder).
    """
    if path.is_symlink():
        raise StorageError(
            f"{path} is a link to {os.readlink(path)}, and that would be changed: remove the link, "
            "or put what it leads to in its place"
        )
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        kind = "folder" if folder else "file"
        raise StorageError(
            f"{path} is in the way of a {kind} that is to be written: move it elsewhere"
        )

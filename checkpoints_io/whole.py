"""Files and model folders that appear whole or not at all, and survive a loss of power."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import re
import secrets
import shutil
from typing import IO

from checkpoints_io import hf_folder, lock, processes
from checkpoints_io.errors import InTheWay, StorageError

NEW, OLD, LOCK = "new", "old", "lock"  # all that a scratch folder holds
# A folder with the first of these files is a model's, with the second one of adapters.
MARK, OF_ADAPTERS = MARKS = "config.json", hf_folder.ADAPTERS
ATTEMPTS = 3  # at a file whose unfinished form others cleared away


class BeingWritten(StorageError):
    """Another process is at it."""


def write(path: pathlib.Path, content: bytes | memoryview) -> None:
    """A file: what was there stays until the new one is on the disk.

    Raises:
      OSError: it cannot be written, or is a link; what was there is as it was.
    """
    lock.refuse_link(path)
    for again in range(ATTEMPTS):
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                _locked(file)  # its writer lives: see `clear`
                file.write(content)
                file.flush()
                if path.exists():
                    shutil.copymode(path, part)
                _to_disk(part)
                part.rename(path)
            break
        except FileNotFoundError:
            # Cleared before it was locked, or from a machine that the disk's locks do not reach.
            if again == ATTEMPTS - 1 or not path.parent.is_dir():
                raise
        finally:
            part.unlink(missing_ok=True)
    _to_disk(path.parent)


def clear(room: pathlib.Path) -> None:
    """Removes what killed writers left in a folder of ours; what a living one writes stays."""
    if room.is_symlink():  # not a folder of ours
        return
    for left in sorted(room.glob(".*.part")):
        if left.is_symlink():
            continue
        if left.is_dir() and {path.name for path in left.iterdir()} <= {NEW, OLD, LOCK}:
            with (
                contextlib.suppress(BeingWritten),
                _scratch(left.with_name(left.name[1 : -len(".part")])),
            ):
                pass
        elif left.is_file() and re.fullmatch(r"\..+\.[0-9a-f]{8}\.part", left.name):
            # Gone meanwhile, or of another user.
            with contextlib.suppress(OSError), left.open("r+b") as file:
                if _locked(file):
                    left.unlink()


def _locked(file: IO[bytes]) -> bool:
    """Does this process hold it now? Another one does, or the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def folder(path: pathlib.Path, mark: str = MARK) -> Iterator[pathlib.Path | None]:
    """A temporary folder beside `path` that takes its name, and its place, on success.

    What is there may be replaced if it has the file `mark`, by which such folders are known.
    Process 0 writes it; the others are given None. What a killed writer left is cleared away.

    Raises:
      FileExistsError: what is there now has no such file, and may be somebody's work.
      OSError: another process is writing it.
    """
    if not processes.is_first():
        yield None
        return

    with _scratch(path) as (fresh, old):
        refuse_other(path, (mark,))
        fresh.mkdir()
        yield fresh
        for written in (*fresh.iterdir(), fresh):
            _to_disk(written)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        _to_disk(path.parent)


def refuse_other(path: pathlib.Path, marks: tuple[str, ...] = MARKS) -> None:
    """A folder may replace another of its kind or an empty folder, and nothing else.

    Raises:
      FileExistsError: there is something else, which may be somebody's work.
    """
    if path.is_dir():
        known = any((path / mark).is_file() for mark in marks)
        if not known and any(path.iterdir()):
            what = "a model" if MARK in marks else "adapters"
            raise InTheWay(
                f"{path} holds something else than {what}: choose another folder, or move it "
                "elsewhere"
            )
    elif path.exists() or path.is_symlink():
        raise InTheWay(
            f"{path} is in the way of a model folder that is to be written: move it elsewhere"
        )


@contextlib.contextmanager
def _scratch(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Names for the folder that becomes `path` and the one it was: this process's alone, and empty.

    Raises:
      OSError: another process is writing `path`, or a link leads its scratch elsewhere.
    """
    scratch = path.parent / f".{path.name}.part"
    fresh, old = scratch / NEW, scratch / OLD
    lock.refuse_link(scratch, folder=True)

    def refuse() -> None:
        raise BeingWritten(f"{path} is being written by another process: wait for it")

    def put_back() -> None:
        if old.exists() and not path.exists():  # stopped, or killed, between the two renames
            old.rename(path)

    scratch.mkdir(parents=True, exist_ok=True)
    with lock.held(scratch / LOCK, otherwise=refuse):
        try:
            put_back()
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)
            yield fresh, old
        finally:
            put_back()
            shutil.rmtree(scratch, ignore_errors=True)


def _to_disk(path: pathlib.Path) -> None:
    """What the system still keeps in memory of a file, or of the names in a folder, is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some disks know it of files only
            raise
    finally:
        os.close(handle)

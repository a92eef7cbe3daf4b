"""Files and model folders that appear whole or not at all, and survive a power failure."""

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

NEW, OLD, LOCK = "new", "old", "lock"  # everything that a scratch folder holds
# A folder with the first of these files is a model's, with the second one of adapters.
MARK, OF_ADAPTERS = MARKS = "config.json", hf_folder.ADAPTERS
ATTEMPTS = 3  # at a file whose unfinished form others cleared away


class BeingWritten(StorageError):
    """Another process is writing the same folder."""


def write(path: pathlib.Path, content: bytes | memoryview) -> None:
    """Writes a file; the old one stays until the new one is on the disk.

    Raises:
      OSError: it cannot be written, or is a link; the old one is unchanged.
    """
    lock.refuse_link(path)
    for again in range(ATTEMPTS):
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                _locked(file)  # shows that its writer lives: see `clear`
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
    """Removes what killed writers left in a folder of ours, but not what a live one is writing."""
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
            # It is gone in the meantime, or belongs to another user.
            with contextlib.suppress(OSError), left.open("r+b") as file:
                if _locked(file):
                    left.unlink()


def _locked(file: IO[bytes]) -> bool:
    """Whether this process now holds the lock; not if another does or the disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def folder(path: pathlib.Path, mark: str = MARK) -> Iterator[pathlib.Path | None]:
    """A temporary folder beside `path` that takes its name, and its place, on success.

    An old folder may be replaced if it has the file `mark`, by which such folders are recognised.
    Process 0 writes it; the others get None. What a killed writer left is cleared away. Where
    `path` is a link to a folder, that folder is replaced and the link stays.

    Raises:
      FileExistsError: the old folder has no such file, and may be somebody's work.
      OSError: another process is writing it.
    """
    if not processes.is_first():
        yield None
        return

    while path.is_symlink() and path.is_dir():  # `resolve` would follow the links above it, too
        path = path.parent / path.readlink()
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
    """Refuses to replace anything but an empty folder or one of the same kind.

    Raises:
      FileExistsError: there is something else, which may be somebody's work.
    """
    if path.is_dir():
        known = any((path / mark).is_file() for mark in marks)
        if not known and any(path.iterdir()):
            what = "a model" if MARK in marks else "adapters"
            raise InTheWay(
                f"{path} holds something other than {what}: choose another folder, or move it "
                "elsewhere"
            )
    elif path.exists() or path.is_symlink():
        raise InTheWay(
            f"{path} is in the way of a model folder that is to be written: move it elsewhere"
        )


@contextlib.contextmanager
def _scratch(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Unused paths, for this process alone, of the folder to become `path` and the one it replaces.

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
    """Flushes a file, or the names in a folder, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some disks can only sync files
            raise
    finally:
        os.close(handle)

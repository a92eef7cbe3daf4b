"""Files and model folders that appear whole or not at all, and outlast a loss of power."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import secrets
import shutil

import jax

from checkpoints_io import lock


def write(path: pathlib.Path, content: bytes | memoryview) -> None:
    """A file: what was there stays until the new one is on the disk.

    Raises:
      OSError: it cannot be written; what was there is as it was.
    """
    while path.is_symlink():  # it stays one
        path = path.parent / path.readlink()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        if path.exists():
            shutil.copymode(path, part)
        _to_disk(part)
        part.rename(path)
        _to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A temporary folder beside `path` that takes its name, and its place, on success.

    Process 0 writes it; the others are given None. What a killed writer left is cleared away.

    Raises:
      FileExistsError: what is there now is not a model folder, and may be somebody's work.
      OSError: another process is writing it.
    """
    if jax.process_index():
        yield None
        return

    scratch = path.parent / f".{path.name}.part"
    fresh, old = scratch / "new", scratch / "old"

    def refuse() -> None:
        raise OSError(f"{path} is being written by another process: wait for it")

    def put_back() -> None:
        if old.exists() and not path.exists():  # stopped, or killed, between the two renames
            old.rename(path)

    scratch.mkdir(parents=True, exist_ok=True)
    with lock.held(scratch / "lock", otherwise=refuse):
        try:
            put_back()
            if path.exists() and not (path / "config.json").is_file() and any(path.iterdir()):
                raise FileExistsError(
                    f"{path} holds something else than a model: choose another folder"
                )
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)
            fresh.mkdir()
            yield fresh
            for written in (*fresh.iterdir(), fresh):
                _to_disk(written)
            if path.exists():
                path.rename(old)
            fresh.rename(path)
            _to_disk(path.parent)
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

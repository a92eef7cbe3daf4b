"""Where a run lives: a directory of a run, a cache or an export, behind a few verbs.

`at` gives the place of an address: a folder on a disk, or the objects of a bucket whose names begin
so (bucket.py). No verb needs what a bucket lacks: nothing that exists is renamed, no part of a file
is written, a folder need not exist before its files do. A name is relative to its place, with `/`
between folders.

A library that reads and writes for itself is given the `address` where it knows buckets too (jax's
compilation cache), `for_orbax()` where it knows some of them, and `local()` where it knows this
machine only.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import itertools
import os
import pathlib
import re
import shutil
from typing import NamedTuple, Protocol, runtime_checkable

from checkpoints_io import bucket, lock, whole
from checkpoints_io.errors import BadInput, StorageError


@runtime_checkable  # where the types of arguments are checked
class Place(Protocol):
    """The verbs. In messages a place is shown as its address.

    Any of them raises OSError where the disk or bucket cannot be used.
    """

    @property
    def address(self) -> str:
        """What `at` finds it by."""
        ...

    def __str__(self) -> str: ...

    def within(self, name: str) -> "Place":
        """A folder in it, which need not be there."""
        ...

    def make(self) -> None:
        """The folder is there when this returns, with those that it is in."""
        ...

    def names(self) -> list[str]:
        """The files and folders directly in it, sorted; none where there is no such folder."""
        ...

    def exists(self, name: str) -> bool:
        """Is there a file of that name, or anything below it?"""
        ...

    def read(self, name: str) -> bytes | None:
        """All of a file; None where there is none."""
        ...

    def mapped(self, name: str) -> memoryview | None:
        """The same, for a large file: on a disk it takes memory only where it is looked at."""
        ...

    def write_whole(self, name: str, content: bytes | memoryview) -> None:
        """A file: what was there stays until all of the new one is kept."""
        ...

    def whole_folder(
        self, mark: str = whole.MARK
    ) -> contextlib.AbstractContextManager[pathlib.Path | None]:
        """A folder of this machine whose files become those of the place on success.

        Until then what was there stays, and the file `mark`, by which such folders are known, is
        not there before the others. Process 0 is given it; the others are given None.

        Raises:
          FileExistsError: what is there now has no such file, and may be somebody's work.
        """
        ...

    def appending(
        self, name: str, begin: bytes
    ) -> contextlib.AbstractContextManager[Callable[[bytes], None]]:
        """A file that holds `begin`, and within the block what the function is given after it.

        Each addition outlasts the death of this process once the function returns. A bucket writes
        the whole file again for it: this is for records, which are small and seldom.
        """
        ...

    def remove(self, name: str) -> None:
        """A file, or a folder with all in it, if it is there."""
        ...

    def set_aside(self, name: str) -> None:
        """Hides a checkpoint that cannot be read from Orbax; nothing of it is lost.

        `unreadable-NAME` says so: on a disk that is its new name, in a bucket an object beside it,
        and it stays until a checkpoint of that name is written again.
        """
        ...

    def for_orbax(self) -> str:
        """Where Orbax writes its checkpoints: the address, or a folder of this machine instead.

        Raises:
          ValueError: it would be that folder, and several processes write, who must all see one; or
            Orbax would lose checkpoints there.
        """
        ...

    def bring(self, parts: Iterable[str], step: str | None = None) -> None:
        """That folder has these parts of the checkpoint, or of all, if it is a folder instead."""
        ...

    def put_up(self) -> None:
        """The place holds the checkpoints that this folder holds, each once it is whole."""
        ...

    def clear(self, *, checkpoints: bool = False) -> None:
        """Removes what killed writers left in it; what a living one writes there stays.

        Of a place for checkpoints a bucket's are removed that are not whole; Orbax does that on a
        disk.
        """
        ...

    def alone(self, *, otherwise: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Inside the block no other process is in such a block of this place.

        Where one is, `otherwise` raises, or this waits. A process that dies leaves its block: on a
        disk at once, on a bucket after a while.
        """
        ...

    def room(self) -> int | float:
        """Bytes that may still be written; infinity where there is no bound."""
        ...

    def taken(self) -> int:
        """Bytes of all files in it."""
        ...

    def refuse_odd(
        self,
        *,
        files: Iterable[str] = (),
        folders: Iterable[str] = (),
        models: Iterable[str] = (),
        trees: Iterable[str] = (),
    ) -> None:
        """What is to be written or removed must be where its name says, or not exist yet.

        Of `trees` that holds for all that is in them, at any depth. A bucket has no links.

        Raises:
          OSError: it is a link, through which something else would be changed, or of another kind.
          FileExistsError: one of `models` is a folder that holds something else than a model.
        """
        ...

    def local(self) -> str:
        """A folder of this machine, for writers that know no other kind (TensorBoard, a profile).

        On a disk it is the place itself; a bucket takes in what is there when `alone` is left.
        """
        ...


def at(address: str, flag: str = "") -> Place:
    """The place of an address, which `flag` gave; nothing is looked at or made.

    Raises:
      ValueError: there is no such kind of place.
    """
    if "://" in address:
        return bucket.at(address, f"{flag}={address}" if flag else address)
    return Disk(pathlib.Path(address).expanduser().absolute())


def beside(place: Place, name: str) -> Place:
    """Another place in the folder that this one is in."""
    return at(f"{place.address.rpartition('/')[0]}/{name}")


class Disk(NamedTuple):
    """A folder of a file system, by its whole path; `whole` and `lock` keep its promises."""

    path: pathlib.Path

    @property
    def address(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def within(self, name: str) -> Place:
        return Disk(self.path / name)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None  # a pipe would block

    def mapped(self, name: str) -> memoryview | None:
        import pyarrow  # Python's own mmap keeps a file open for each

        path = self.path / name
        if not path.is_file():
            return None
        return memoryview(pyarrow.memory_map(str(path)).read_buffer())

    def write_whole(self, name: str, content: bytes | memoryview) -> None:
        whole.write(self.path / name, content)

    def whole_folder(
        self, mark: str = whole.MARK
    ) -> contextlib.AbstractContextManager[pathlib.Path | None]:
        return whole.folder(self.path, mark)

    @contextlib.contextmanager
    def appending(self, name: str, begin: bytes) -> Iterator[Callable[[bytes], None]]:
        self.write_whole(name, begin)
        with (self.path / name).open("ab") as file:

            def add(content: bytes) -> None:
                file.write(content)
                file.flush()

            yield add

    def remove(self, name: str) -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        aside, again = self.path / f"unreadable-{name}", itertools.count(1)
        while aside.exists():  # it was unreadable once before
            aside = self.path / f"unreadable-{name}.{next(again)}"
        (self.path / name).rename(aside)

    def for_orbax(self) -> str:
        if odd := re.search(r"[][*?]", str(self.path.absolute())):
            raise BadInput(
                f"{self.path.absolute()} has a {odd[0]!r} in its path, which Orbax takes for a "
                "pattern, so that it loses checkpoints: choose a directory without [ ] * ?"
            )
        return self.address

    def bring(self, parts: Iterable[str], step: str | None = None) -> None:
        pass  # it is there

    def put_up(self) -> None:
        pass

    def clear(self, *, checkpoints: bool = False) -> None:
        del checkpoints
        whole.clear(self.path)

    def alone(self, *, otherwise: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        return lock.held(self.path / "lock", otherwise=otherwise)

    def room(self) -> int | float:
        return shutil.disk_usage(self.path).free

    def taken(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def refuse_odd(
        self,
        *,
        files: Iterable[str] = (),
        folders: Iterable[str] = (),
        models: Iterable[str] = (),
        trees: Iterable[str] = (),
    ) -> None:
        for name in files:
            lock.refuse_link(self.path / name)
        for name in folders:
            lock.refuse_link(self.path / name, folder=True)
        for name in models:
            whole.refuse_other(self.path / name)
        for name in trees:
            _refuse_odd_in(self.path / name)

    def local(self) -> str:
        return self.address


def _refuse_odd_in(tree: pathlib.Path) -> None:
    """Refuses links, which lead elsewhere, and pipes, which would block."""
    for folder, folders, files in os.walk(tree):
        for path in (pathlib.Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise StorageError(
                    f"{path} is a link to {os.readlink(path)}: put the file itself there"
                )
            if path.exists() and not path.is_file() and not path.is_dir():
                raise StorageError(f"{path} is neither a file nor a folder: move it elsewhere")

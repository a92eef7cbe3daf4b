"""Where a run lives: a directory of a run, a cache or an export, behind a few verbs.

`at` gives the place at an address: a folder on a disk, or the objects of a bucket with that prefix
(bucket.py). No verb needs what a bucket lacks: nothing that exists is renamed, files are not
written in part, and a folder need not exist before its files do. A name is relative to its place,
with `/` between folders.

A library that does its own reading and writing is given the `address` if it supports buckets too
(jax's compilation cache), `for_orbax()` if it supports some of them, and `local()` if it supports
only this machine.
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


@runtime_checkable  # for the checks of argument types
class Place(Protocol):
    """The verbs of a place; messages show it as its address.

    Any of them raises OSError if the disk or bucket cannot be used.
    """

    @property
    def address(self) -> str:
        """The address from which `at` makes it."""
        ...

    def __str__(self) -> str: ...

    def within(self, name: str) -> "Place":
        """A folder in it, which need not exist."""
        ...

    def make(self) -> None:
        """Creates the folder and its parents if they do not exist."""
        ...

    def names(self) -> list[str]:
        """The files and folders directly in it, sorted; none if there is no such folder."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name, or anything below it."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        ...

    def mapped(self, name: str) -> memoryview | None:
        """The content of a large file: on a disk it takes memory only where it is read."""
        ...

    def write_whole(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file; the old one stays until all of the new one is stored."""
        ...

    def whole_folder(
        self, mark: str = whole.MARK
    ) -> contextlib.AbstractContextManager[pathlib.Path | None]:
        """A folder on this machine whose files become those of the place on success.

        Until then the old content stays; the file `mark`, by which such folders are recognised,
        appears after the others. Process 0 gets the folder; the others get None.

        Raises:
          FileExistsError: the old content has no such file, and may be somebody's work.
        """
        ...

    def appending(
        self, name: str, begin: bytes
    ) -> contextlib.AbstractContextManager[Callable[[bytes], None]]:
        """Writes a file that holds `begin`, and gives the block a function that appends to it.

        Once the function returns, the addition survives the death of this process. A bucket
        rewrites the whole file for each: this is for records, which are small and infrequent.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all its contents, if it exists."""
        ...

    def set_aside(self, name: str) -> None:
        """Hides an unreadable checkpoint from Orbax, without losing any of it.

        It is marked by `unreadable-NAME`: on a disk its new name, in a bucket an object beside it.
        It stays until a checkpoint of that name is written again.
        """
        ...

    def for_orbax(self) -> str:
        """Where Orbax writes its checkpoints: the address, or a folder on this machine instead.

        Raises:
          ValueError: it would be a folder on this machine, but several processes write, which must
            share one; or Orbax would lose checkpoints there.
        """
        ...

    def bring(self, parts: Iterable[str], step: str | None = None) -> None:
        """Fetches parts of one checkpoint, or of all, if Orbax has a folder on this machine."""
        ...

    def put_up(self) -> None:
        """Uploads the checkpoints of that folder to the place, each once it is complete."""
        ...

    def clear(self, *, checkpoints: bool = False) -> None:
        """Removes what killed writers left in it, but not what a live one is writing.

        With `checkpoints`, incomplete ones are removed from a bucket; on a disk Orbax does that.
        """
        ...

    def alone(self, *, otherwise: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Gives the block exclusive use of the place among processes.

        If another process has it, `otherwise` raises, or this waits. A process that dies releases
        it: on a disk at once, in a bucket after a while.
        """
        ...

    def room(self) -> int | float:
        """Bytes that may still be written; infinity if there is no bound."""
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
        """Refuses links and special files among the paths to be written or removed.

        For `trees` that includes everything in them, at any depth. A bucket has no links.

        Raises:
          OSError: one is a link, through which something else would be changed, or a special file.
          FileExistsError: one of `models` is a folder that holds something other than a model.
        """
        ...

    def local(self) -> str:
        """A local folder, for writers that support no other kind (TensorBoard, profiles).

        On a disk it is the place itself; otherwise it is uploaded at the latest when `alone` ends.
        """
        ...


def at(address: str, flag: str = "") -> Place:
    """The place at an address, which `flag` gave; nothing is read or created.

    Raises:
      ValueError: there is no such kind of place.
    """
    if "://" in address:
        return bucket.at(address, f"{flag}={address}" if flag else address)
    return Disk(pathlib.Path(address).expanduser().absolute())


def beside(place: Place, name: str) -> Place:
    """Another place in this one's parent folder."""
    return at(f"{place.address.rpartition('/')[0]}/{name}")


class Disk(NamedTuple):
    """A folder in a file system, by its full path; built on `whole` and `lock`."""

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
        import pyarrow  # Python's own mmap keeps one open file per mapping

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
        while aside.exists():  # this step was set aside once before
            aside = self.path / f"unreadable-{name}.{next(again)}"
        (self.path / name).rename(aside)

    def for_orbax(self) -> str:
        if odd := re.search(r"[][*?]", str(self.path.absolute())):
            raise BadInput(
                f"{self.path.absolute()} has a {odd[0]!r} in its path, which Orbax takes for a "
                "pattern and so loses checkpoints: choose a directory without [ ] * ?"
            )
        return self.address

    def bring(self, parts: Iterable[str], step: str | None = None) -> None:
        pass  # the checkpoints are already in place

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

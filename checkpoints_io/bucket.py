"""A place in a bucket: objects reached by name, through fsspec.

A folder is a common prefix of object names, and an object is replaced as a whole. So an export
exists once its `config.json`, uploaded last, does, and a checkpoint once Orbax's last object does.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import itertools
import math
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

from absl import logging
import fsspec
import jax

from checkpoints_io import here, lease, processes, whole
from checkpoints_io.errors import BadInput, InTheWay, StorageError

IN_PLACE = ("gs",)  # kinds of bucket that Orbax writes to directly
# The keys under which the kinds of bucket report an object's version: each kind has one of these.
CHANGING = ("generation", "ETag", "etag", "LastModified", "created")
TRIES = 3
COMMITTED = "commit_success.txt"  # Orbax's last object, in a checkpoint and in each of its parts


class Bucket(NamedTuple):
    """The objects whose names begin with a given prefix."""

    url: str

    @property
    def address(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    @property
    def _fs(self) -> Any:  # an AbstractFileSystem, whose annotations cover every kind
        return _opened(self.url)[0]

    def _path(self, name: str = "") -> str:
        """The path of an object, as fsspec spells it."""
        return _opened(self.url)[1] + (f"/{name}" if name else "")

    def _below(self, name: str = "") -> dict[str, Any]:
        """All objects below the name, at any depth, by their full names."""
        with _told(self.url):
            return self._fs.find(self._path(name), detail=True)

    def within(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    def versions(self) -> dict[str, str]:
        """The objects directly in it, each with a version that changes with every write."""
        try:
            with _told(self.url):
                found = self._fs.ls(self._path(), detail=True)
        except FileNotFoundError:
            return {}
        own = f"{self._path()}/"
        return {
            one["name"].removeprefix(own): str([one["size"], *map(one.get, CHANGING)])
            for one in found
            if one["type"] == "file"
        }

    def fetch(self, name: str, path: pathlib.Path) -> None:
        """Downloads an object to a file on this machine."""
        with _told(self.url):
            self._fs.get_file(self._path(name), str(path))

    def make(self) -> None:
        pass  # a folder exists as soon as there is an object in it

    def names(self) -> list[str]:
        try:
            with _told(self.url):
                found = self._fs.ls(self._path(), detail=False)
        except FileNotFoundError:
            return []
        own = f"{self._path()}/"
        return sorted({one.removeprefix(own).strip("/") for one in found} - {"", self._path()})

    def exists(self, name: str) -> bool:
        try:
            with _told(self.url):
                self._fs.info(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes | None:
        try:
            with _told(self.url):
                return self._fs.cat_file(self._path(name))
        except (FileNotFoundError, IsADirectoryError):
            return None

    def mapped(self, name: str) -> memoryview | None:
        content = self.read(name)
        return None if content is None else memoryview(content)

    def write_whole(self, name: str, content: bytes | memoryview) -> None:
        with _told(self.url, writing=True):
            self._fs.pipe_file(self._path(name), bytes(content))

    @contextlib.contextmanager
    def whole_folder(self, mark: str = whole.MARK) -> Iterator[pathlib.Path | None]:
        if not processes.is_first():
            yield None
            return
        self._refuse_other(mark)
        with tempfile.TemporaryDirectory(prefix="going-up-") as folder:
            yield pathlib.Path(folder)
            room, _, own = self.url.rpartition("/")
            # A folder left half uploaded by a killed process is ours to replace.
            Bucket(room).write_whole(_half(own), b"")
            self.remove(mark)
            self._put(pathlib.Path(folder), mark)
            Bucket(room).remove(_half(own))

    def _put(self, folder: pathlib.Path, last: str) -> None:
        """Uploads the folder, `last` after all others, and deletes objects it does not have."""
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        own, left = f"{self._path()}/", files.keys() - {last}
        # A starting run may mistake the uploaded part for a killed process's, and clear it away.
        for _ in range(TRIES):
            with _told(self.url, writing=True):
                for name in sorted(left):
                    self._fs.put_file(str(files[name]), self._path(name))
            there = {path.removeprefix(own) for path in self._below()}
            if not (left := files.keys() - {last} - there):
                break
        else:
            raise StorageError(f"{self} lost {min(left)} after its upload: what deletes it?")
        with _told(self.url, writing=True):
            self._fs.put_file(str(files[last]), self._path(last))
        for name in there - files.keys():
            self.remove(name)

    @contextlib.contextmanager
    def appending(self, name: str, begin: bytes) -> Iterator[Callable[[bytes], None]]:
        content = bytearray(begin)

        def add(more: bytes) -> None:
            content.extend(more)
            self.write_whole(name, bytes(content))

        add(b"")
        yield add

    def remove(self, name: str) -> None:
        if below := [*self._below(name)]:
            with _told(self.url), contextlib.suppress(FileNotFoundError):
                self._fs.rm(below)

    def set_aside(self, name: str) -> None:
        aside, again = f"unreadable-{name}", itertools.count(1)
        while self.exists(aside):
            aside = f"unreadable-{name}.{next(again)}"
        told = f"{name} cannot be read; it stays until a checkpoint of that step is written again\n"
        self.write_whole(aside, told.encode())
        self.remove(f"{name}/{COMMITTED}")
        if not self._in_place:
            shutil.rmtree(here.copy(self.url) / name, ignore_errors=True)

    @property
    def _in_place(self) -> bool:
        return self.url.partition("://")[0] in IN_PLACE

    def for_orbax(self) -> str:
        if self._in_place:
            return self.url
        if jax.process_count() > 1:
            raise BadInput(
                f"{self}: several processes write a checkpoint together, which Orbax can on a "
                "shared file system and at gs:// only: give the directory there, or mount the "
                "bucket, or run one process"
            )
        return str(here.copy(self.url))

    def bring(self, parts: Iterable[str], step: str | None = None) -> None:
        if self._in_place:
            return
        wanted = {*parts, COMMITTED, "_CHECKPOINT_METADATA"}
        steps = self._whole() if step is None else [step]
        for path in self._below():
            name = pathlib.PurePosixPath(path).relative_to(self._path())
            copy = here.copy(self.url) / name
            if name.parts[0] in steps and {*name.parts[1:2]} <= wanted and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                with _told(self.url):
                    self._fs.get_file(path, str(copy))

    def put_up(self) -> None:
        if self._in_place:
            return
        copies = here.copy(self.url)
        steps, there = {path.parent.name for path in copies.glob(f"*/{COMMITTED}")}, self._whole()
        for step in sorted(steps.difference(there)):
            self.within(step)._put(copies / step, COMMITTED)
        for step in set(there).difference(steps):  # Orbax has removed it
            self.remove(f"{step}/{COMMITTED}")
            self.remove(step)

    def _whole(self) -> list[str]:
        """The complete checkpoints."""
        names = filter(str.isdecimal, self.names())
        return [name for name in names if self.exists(f"{name}/{COMMITTED}")]

    def clear(self, *, checkpoints: bool = False) -> None:
        there = self.names()
        for name in there:
            if checkpoints and name.isdecimal():  # by its step
                is_whole = self.exists(f"{name}/{COMMITTED}")
                if not is_whole and f"unreadable-{name}" not in there:
                    self.remove(name)
            elif name.startswith(".") and name.endswith(".part"):
                own = name[1 : -len(".part")]
                if not self._is_model(own):
                    self.remove(own)
                self.remove(name)

    @contextlib.contextmanager
    def alone(self, *, otherwise: Callable[[], None]) -> Iterator[None]:
        how = dict(otherwise=otherwise, meanwhile=self._take_in)
        with contextlib.ExitStack() as stack:
            with _told(self.url, writing=True):
                stack.enter_context(lease.held(self._fs, self._path("lock"), **how))
            try:
                yield
            finally:
                try:
                    self._take_in()
                except OSError as error:
                    logging.warning("files written for %s were not uploaded: %s", self, error)

    def _take_in(self) -> None:
        """Uploads the files that were written for it on this machine and have changed."""

        def put(path: pathlib.Path, url: str) -> None:
            with _told(url, writing=True):
                self._fs.put_file(str(path), _opened(url)[1])

        here.take_in(self.url, put)

    def room(self) -> int | float:
        return math.inf if self._in_place else shutil.disk_usage(tempfile.gettempdir()).free

    def taken(self) -> int:
        return sum(one["size"] for one in self._below().values())

    def refuse_odd(
        self,
        *,
        files: Iterable[str] = (),
        folders: Iterable[str] = (),
        models: Iterable[str] = (),
        trees: Iterable[str] = (),
    ) -> None:
        for name in models:
            self.within(name)._refuse_other(*whole.MARKS)

    def _refuse_other(self, *marks: str) -> None:
        if self.names() and not any(map(self.exists, marks)):
            room, _, own = self.url.rpartition("/")
            if not Bucket(room).exists(_half(own)):
                what = "a model" if whole.MARK in marks else "adapters"
                raise InTheWay(
                    f"{self} holds something other than {what}: choose another folder, or move it "
                    "elsewhere"
                )

    def _is_model(self, name: str) -> bool:
        return any(self.exists(f"{name}/{mark}") for mark in whole.MARKS)

    def local(self) -> str:
        return here.folder(self.url)


def at(address: str, told: str) -> Bucket:
    """The place at a URL; `told` says where the URL was given.

    Raises:
      ValueError: the kind of bucket is unknown, or the URL names a whole bucket.
    """
    kind, _, rest = address.rstrip("/").partition("://")
    kind = "gs" if kind == "gcs" else kind
    bucket, _, prefix = rest.partition("/")
    if kind in ("file", "local", "http", "https"):
        raise BadInput(f"{told} must be a path on this machine, or a folder in a bucket")
    if not bucket or not prefix:
        raise BadInput(f"{told} must name a folder in a bucket: {kind}://BUCKET/FOLDER")
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        raise BadInput(f"{told}: pip install 'nnx-zoo[cloud]' ({error})") from error
    except ValueError as error:
        raise BadInput(f"{told}: {kind}:// is not a known kind of bucket") from error
    return Bucket(f"{kind}://{rest}")


def _opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it, uncached: others' writes are seen at once."""
    conf = fsspec.config.conf.setdefault(url.partition("://")[0], {})
    conf.setdefault("use_listings_cache", False)
    return fsspec.core.url_to_fs(url)


def _half(name: str) -> str:
    return f".{name}.part"


@contextlib.contextmanager
def _told(url: str, *, writing: bool = False) -> Iterator[None]:
    """Turns a library's error about the bucket into a sentence, except that nothing is there."""
    try:
        yield
    except (StorageError, InTheWay):
        raise
    except Exception as error:  # of any kind: HTTP, accounts, the network
        if isinstance(error, FileNotFoundError | IsADirectoryError) and not writing:
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if isinstance(error, FileNotFoundError):
            said = f"there is no such bucket, or this account may not use it ({said})"
        raise StorageError(f"{url} cannot be used: {said}") from error

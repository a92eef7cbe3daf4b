"""A place as a bucket would be: names with content, no folders, no renames, no parts of files.

It shows that the verbs ask for nothing that a bucket lacks.
"""

from collections.abc import Iterator
import contextlib
import itertools
import math
import pathlib
import tempfile
from typing import NamedTuple

from checkpoints_io.errors import InTheWay

LAST = "config.json"  # readers of a model look for it first
COMMITTED = "commit_success.txt"  # by which Orbax knows a checkpoint of a bucket that is whole


class Bucket(NamedTuple):
    """What several places share."""

    objects: dict[str, bytes]
    leases: set[str]
    locals: dict[str, tempfile.TemporaryDirectory]


class InMemory(NamedTuple):
    """A prefix of the names in a bucket."""

    bucket: Bucket
    prefix: str

    @property
    def address(self):
        return f"mem://{self.prefix}"

    def __str__(self):
        return self.address

    def _key(self, name):
        return f"{self.prefix}/{name}"

    def _below(self):
        """What is in it, by its name here."""
        start, objects = f"{self.prefix}/", self.bucket.objects
        return {key[len(start) :]: objects[key] for key in objects if key.startswith(start)}

    def within(self, name):
        return self._replace(prefix=self._key(name))

    def make(self):
        pass

    def names(self):
        return sorted({name.partition("/")[0] for name in self._below()})

    def exists(self, name):
        return self._key(name) in self.bucket.objects or bool(self.within(name)._below())

    def read(self, name):
        return self.bucket.objects.get(self._key(name))

    def mapped(self, name):
        content = self.read(name)
        return None if content is None else memoryview(content)

    def write_whole(self, name, content):
        self.bucket.objects[self._key(name)] = bytes(content)

    @contextlib.contextmanager
    def whole_folder(self, mark=LAST) -> Iterator[pathlib.Path]:
        if self._below() and not self.exists(mark):
            raise InTheWay(f"{self} holds something else: move it elsewhere")
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            self._put(pathlib.Path(folder))

    def _put(self, folder):
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        if LAST in files:
            self.remove(LAST)
        for name in sorted(files, key=lambda name: name == LAST):
            self.write_whole(name, files[name].read_bytes())
        for name in self._below().keys() - files:
            self.remove(name)

    @contextlib.contextmanager
    def appending(self, name, begin):
        content = bytearray(begin)

        def add(more):
            content.extend(more)
            self.write_whole(name, content)

        add(b"")
        yield add

    def remove(self, name):
        for key in (self._key(name), *map(self.within(name)._key, self.within(name)._below())):
            self.bucket.objects.pop(key, None)

    def set_aside(self, name):
        aside, again = f"unreadable-{name}", itertools.count(1)
        while self.exists(aside):
            aside = f"unreadable-{name}.{next(again)}"
        self.remove(f"{name}/{COMMITTED}")
        self.write_whole(aside, b"")

    def clear(self):
        pass

    @contextlib.contextmanager
    def alone(self, *, otherwise):
        if self.prefix in self.bucket.leases:
            otherwise()
            raise AssertionError("nobody here waits for a lease")
        self.bucket.leases.add(self.prefix)
        try:
            yield
        finally:
            for prefix, folder in self.bucket.locals.items():
                if f"{prefix}/".startswith(f"{self.prefix}/"):
                    for path in pathlib.Path(folder.name).rglob("*"):
                        if path.is_file():
                            name = path.relative_to(folder.name).as_posix()
                            self.bucket.objects[f"{prefix}/{name}"] = path.read_bytes()
            self.bucket.leases.remove(self.prefix)

    def room(self):
        return math.inf

    def taken(self):
        return sum(map(len, self._below().values()))

    def refuse_odd(self, *, files=(), folders=(), models=(), trees=()):
        for name in models:
            model = self.within(name) if name else self
            if model._below() and not any(map(model.exists, (LAST, "adapter_config.json"))):
                raise InTheWay(f"{model} holds something else than a model: move it elsewhere")

    def local(self):
        return self.bucket.locals.setdefault(self.prefix, tempfile.TemporaryDirectory()).name

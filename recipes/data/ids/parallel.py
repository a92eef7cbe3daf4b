"""Tokenises a source with worker processes: in memory, or kept on disk for later starts."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import functools
import hashlib
import importlib.metadata
import os
import pathlib
from typing import Any, TypeVar

from checkpoints_io import hf_folder, places
from checkpoints_io.errors import BadInput, StorageError
from recipes import terminal
from recipes.data.chats import layouts
from recipes.data.ids import encode_rows, shards, token_cache
from recipes.data.ids.encode_rows import How, Ready
from recipes.data.ids.shards import Shard
from recipes.data.rows import sources
from recipes.data.rows.records import Row
from recipes.data.rows.source import Source
from zoo.text import template
from zoo.text.confined import Worker

Found = TypeVar("Found")
# The rows, and about how many bytes, that are tokenised at a time and kept in one file.
SHARD, BYTES = 2**13, 2**26
FEW = 2**10  # rows at a time if none are kept on disk: fewer are held before they are compact
MOST = 16  # workers
# Packages, and code of ours, that may tokenise differently in another version.
LIBRARIES = ("tokenizers", "sentencepiece", "regex", "jinja2")
CODE = [
    pathlib.Path(module.__file__ or "").parent
    for module in (sources, layouts, encode_rows, template)
]


class Crew:
    """A pool of workers, one per core, each started when it is needed and no other is free.

    They live for a `with` block, and are stopped at its end, whatever they are doing.
    """

    def __init__(self, how: How):
        self.how = how
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self.most = min(MOST, len(cores) if cores else os.cpu_count() or 1)
        self._free: list[Worker] = []
        self._all: list[Worker] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(self.most)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for one in self._all:
            one.close()
        self._threads.shutdown()

    def call(self, function: Callable[..., object], *given: object) -> Any:
        """Calls the function in a worker and returns its result, like `Worker.call`."""
        try:
            one = self._free.pop()
        except IndexError:
            one = worker(self.how)
            self._all.append(one)
        try:
            return one.call(function, *given)
        finally:
            self._free.append(one)

    def each(
        self, work: Callable[..., Found], given: Iterable[Sequence[object]]
    ) -> Iterator[Found]:
        """The results of `work(*one)` for each one given, in that order, from several threads."""
        running: collections.deque[concurrent.futures.Future[Found]] = collections.deque()
        for one in given:
            running.append(self._threads.submit(work, *one))
            if len(running) > self.most + 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def worker(how: How) -> Worker:
    """A worker whose errors name what it ran, and the flags that choose another."""
    texts = f"the chat template {how.chat_template} or " if how.chat_template else ""
    own = "" if how.chat_template else " or its chat template"
    return Worker(
        f"{texts}the tokenizer in {how.tokenizer}{own}",
        "leave this row out, or give another template (--config.chat_template) or tokenizer "
        "(--config.tokenizer)",
    )


def prepared(how: How, crew: Crew, cache: places.Place | None, *, plain: bool) -> Ready:
    """The facts about tokenizer and template, which are tried once and kept in the cache.

    Raises:
      FileNotFoundError, ValueError: one of them cannot be used.
      OSError: the cache cannot be written.
    """
    files = files_of(how)
    work = lambda: crew.call(encode_rows.prepare, how._asdict(), files, plain)
    if cache is None:
        stop_ids, stops = work()
    else:
        folder = token_cache.folder_of(cache, _how_identity(how) | {"plain": plain})
        stop_ids, stops = token_cache.fact(folder, "ready", work)
    return Ready(tuple(stop_ids), stops)


def in_memory(source: Source, how: How, crew: Crew) -> list[Shard]:
    """Tokenises all rows, keeping nothing on disk."""
    files = files_of(how)
    work = lambda first, rows: _tokenised(first, rows, source, how, files, crew)
    return [shards.from_bytes(one) for one in crew.each(work, _parts(source, FEW))]


def kept(source: Source, how: How, cache: places.Place, crew: Crew) -> list[Shard]:
    """The rows of a source, tokenised once: later starts map the files that the first one wrote.

    Raises:
      ValueError: the source was changed while it was read.
      OSError: the cache cannot be written, or not read back.
    """
    here = identity(source, how)
    folder = token_cache.folder_of(cache, here)
    if (found := token_cache.read_all(folder)) is not None:
        return found
    with token_cache.alone(folder):
        found = token_cache.read_all(folder)
        if found is None:
            firsts = _write(folder, source, how, crew)
            if identity(source, how) != here:
                token_cache.clear(folder)
                raise BadInput(f"{source.path}, or its tokenizer, changed while it was read")
            token_cache.finish(folder, firsts)
            found = token_cache.read_all(folder)
    if found is None:
        raise StorageError(f"what was just written to {folder} cannot be read back: check the disk")
    return found


def _write(folder: places.Place, source: Source, how: How, crew: Crew) -> list[int]:
    """Writes the files that are missing, and returns the first row of every file."""
    files = files_of(how)

    def work(first: int, rows: Sequence[Row]) -> int:
        name = token_cache.name_of(first)
        known = token_cache.read(folder, name)
        if known is None or known.counts.rows != len(rows):
            token_cache.write(folder, name, _tokenised(first, rows, source, how, files, crew))
        return first

    return list(crew.each(work, _parts(source, SHARD)))


def _tokenised(
    first: int, rows: Sequence[Row], source: Source, how: How, files: str, crew: Crew
) -> bytes:
    """Tokenises some rows into a shard, as bytes."""
    plain = [(row.where, row.fields, row.reason, row.size, row.cells) for row in rows]
    given = plain, first, source, how._asdict(), files
    return crew.call(encode_rows.encode_rows, *given)


def _parts(source: Source, most: int) -> Iterator[tuple[int, list[Row]]]:
    """The rows in parts of a fixed size, each with the number of its first row."""
    rows = sources.read(source.path, layouts.wanted(dict(source.columns), single=source.single))
    part: list[Row] = []
    first = size = 0
    told = f"reading {source.path}"
    for row in terminal.bar(rows, desc=told, delay=2, leave=False, unit=" rows"):
        part.append(row)
        size += row.size
        if len(part) == most or size >= BYTES:
            yield first, part
            first, part, size = first + len(part), [], 0
    if part:
        yield first, part


def files_of(how: How) -> str:
    """A hash of the tokenizer's and the template's files."""
    folder = pathlib.Path(how.tokenizer)
    paths = sorted(path for name in hf_folder.COMPANIONS for path in folder.glob(name))
    paths.append(folder / "config.json")
    if how.chat_template:
        paths.append(pathlib.Path(how.chat_template).expanduser())
    return _hash(path for path in paths if path.is_file())


def identity(source: Source, how: How) -> dict[str, object]:
    """All that the ids of a source depend on, without settings that only decide when to stop."""
    return {
        "source": sources.identity(source.path),
        "layout": source.layout,
        "columns": dict(source.columns),
        "guessed": source.guessed,
        "labelled": source.labelled,
        **_how_identity(how),
    }


def _how_identity(how: How) -> dict[str, object]:
    chosen = how._asdict()
    for name in ("tokenizer", "chat_template", "max_malformed_fraction"):
        del chosen[name]
    return {
        "files": files_of(how),
        "how": chosen,
        "code": _hash(path for folder in CODE for path in sorted(folder.glob("*.py"))),
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _hash(paths: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()

"""Rows -> pairs as ids, counted: in memory, or kept on disk by as many processes as there are."""

from collections.abc import Iterator, Sequence
import concurrent.futures
from concurrent.futures import process
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tqdm

from checkpoints_io import hf_folder
from recipes.data import chat, counts, layouts, sources, token_cache, tokenizer, tokens
from recipes.data.files import Row
from recipes.data.token_cache import Shard

SHARD = 2**13  # rows that are kept in one file, and tokenised by one process at a time


class Source(NamedTuple):
    """Rows, and how their columns are read."""

    path: str  # a file, several by `*`, or a hub dataset
    layout: str | None = None  # None: recognised
    columns: tuple[tuple[str, str], ...] = ()  # our name, theirs


class How(NamedTuple):
    """All else that decides what a row becomes."""

    tokenizer: str  # a folder
    chat_template: str | None  # a file that replaces the tokenizer's
    scored_turns: str
    date: str | None
    max_length: int
    over_length: str
    max_malformed_fraction: float


def in_memory(source: Source, how: How) -> list[Shard]:
    """What becomes of all rows, with nothing kept."""
    return [_encoded(rows, first, source, how) for first, rows in _parts(source)]


def kept(source: Source, how: How, cache: pathlib.Path) -> list[Shard]:
    """The same, tokenised once: a later start maps what an earlier one kept in the directory.

    Raises:
      OSError: it cannot be written, or not be read again.
    """
    folder = token_cache.folder_of(cache, _identity(source, how))
    with token_cache.alone(folder):
        shards = token_cache.read_all(folder)
        if shards is None:
            _tokenise(folder, source, how)
            shards = token_cache.read_all(folder)
    if shards is None:
        raise OSError(f"what was just written to {folder} cannot be read: is the disk sound?")
    return shards


def _parts(source: Source) -> Iterator[tuple[int, list[Row]]]:
    """The rows, so many at a time, with the number of the first."""
    rows = sources.read(source.path)
    shown = iter(tqdm.tqdm(rows, f"reading {source.path}", delay=2, leave=False, unit=" rows"))
    first = 0
    while part := list(itertools.islice(shown, SHARD)):
        yield first, part
        first += len(part)


def _tokenise(folder: pathlib.Path, source: Source, how: How) -> None:
    """Writes what is not there yet: the first file from here, the others from more processes."""
    firsts: list[int] = []
    running: set[concurrent.futures.Future] = set()
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = None
    try:
        for first, rows in _parts(source):
            firsts.append(first)
            if token_cache.read(token_cache.path_of(folder, first)) is not None:
                continue
            if first == 0 or here == 1:
                _tokenise_part(folder, first, rows, source, how)
                continue
            if pool is None:  # not forked: the threads of jax would not come along
                context = multiprocessing.get_context("spawn")
                pool = concurrent.futures.ProcessPoolExecutor(min(here, 16), context)
            running.add(pool.submit(_tokenise_part, folder, first, rows, source, how))
            if len(running) > 2 * here:
                done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                _ = [one.result() for one in done]
        _ = [one.result() for one in running]
    except process.BrokenProcessPool as error:
        raise RuntimeError(
            f"a process that tokenised {source.path} died, perhaps for want of memory; what is "
            "done is kept: start again, or with fewer cores (taskset)"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    token_cache.finish(folder, firsts)


def _tokenise_part(
    folder: pathlib.Path, first: int, rows: Sequence[Row], source: Source, how: How
) -> None:
    token_cache.write(token_cache.path_of(folder, first), _encoded(rows, first, source, how))


def _encoded(rows: Sequence[Row], first: int, source: Source, how: How) -> Shard:
    """What becomes of some rows, of which the first has this number."""
    own, talk = ready(how, plain=source.layout in layouts.PLAIN)
    layout, columns = layouts.LAYOUTS[source.layout or ""].read, dict(source.columns)
    told = counts.none()._replace(rows=len(rows))
    ids, keys = [], []
    for number, row in enumerate(rows, start=first):
        reasons = told.malformed
        try:
            if row.fields is None:
                raise ValueError(row.reason)
            pair = layout(layouts.renamed(row.fields, columns))
            reasons = told.dropped
            found = tokens.encode(
                pair, own, talk, row=number, max_length=how.max_length, over_length=how.over_length
            )
        except ValueError as error:
            reason = str(error)
            # An equal pair is a sound row that says nothing.
            reasons = told.dropped if reason == "chosen equals rejected" else reasons
            reasons[reason] += 1
            told.first.setdefault(reason, row.where)
            continue
        ids.append(found)
        keys.append(prompt_key(pair.prompt))
        told.notes.update(found.notes)
    return Shard(ids, np.array(keys, np.uint64), told)


@functools.lru_cache(maxsize=4)
def ready(how: How, *, plain: bool) -> tuple[tokenizer.Tokenizer, chat.Chat | None]:
    """The tokenizer and, unless the texts are plain, the chat template.

    Raises:
      FileNotFoundError, ValueError: one of them cannot be used.
    """
    own = tokenizer.load(pathlib.Path(how.tokenizer), how.chat_template)
    if plain:
        chat.check_plain(own)
        return own, None
    return own, chat.prepared(own, scored_turns=how.scored_turns, date=how.date)


def prompt_key(prompt: layouts.Turns | str) -> int:
    """A number below 2**64 that stands for a prompt."""
    text = json.dumps(prompt, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _identity(source: Source, how: How) -> dict[str, Any]:
    """What the ids of a source depend on; what only decides whether to stop is not in it."""
    folder = pathlib.Path(how.tokenizer)
    names = [name for name in hf_folder.COMPANIONS if name != "config.json"]
    paths = sorted(path for name in [*names, "config.json"] for path in folder.glob(name))
    if how.chat_template:
        paths.append(pathlib.Path(how.chat_template).expanduser())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    libraries = ("tokenizers", "sentencepiece", "jinja2", "nnx-zoo")
    chosen = how._asdict()
    for name in ("tokenizer", "chat_template", "max_malformed_fraction"):
        del chosen[name]
    return {
        "source": sources.identity(source.path),
        "layout": source.layout,
        "columns": dict(source.columns),
        "tokenizer": files,
        "how": chosen,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }

"""A source tokenised: in memory, or kept on disk by as many processes as there are cores."""

from collections.abc import Iterator, Sequence
import concurrent.futures
from concurrent.futures import process
import multiprocessing
import os
import signal
import threading
import time

from checkpoints_io import places
from checkpoints_io.errors import BadInput, RunFailed, StorageError
from recipes import terminal
from recipes.data import layouts, sources, token_cache, tokenise
from recipes.data.records import Row
from recipes.data.source import Source
from recipes.data.token_cache import Shard
from recipes.data.tokenise import How

# Rows, and about how many bytes of them, that are tokenised at a time and kept in one file.
SHARD, BYTES = 2**13, 2**26
FEW = 2**10  # rows at a time where none are kept: less to hold before they are compact


def in_memory(source: Source, how: How) -> list[Shard]:
    """What becomes of all rows, with nothing kept."""
    given = source, how, tokenise.files_of(how)
    parts = (tokenise.encode(rows, first, *given) for first, rows in _parts(source, FEW))
    return [token_cache.compact(part) for part in parts]


def kept(source: Source, how: How, cache: places.Place) -> list[Shard]:
    """The same, tokenised once: a later start maps what an earlier one kept in the directory.

    Raises:
      ValueError: the source was changed while it was read.
      OSError: the cache cannot be written, or not be read again.
    """
    identity = tokenise.identity(source, how)
    folder = token_cache.folder_of(cache, identity)
    if (shards := token_cache.read_all(folder)) is not None:
        return shards
    with token_cache.alone(folder):
        shards = token_cache.read_all(folder)
        if shards is None:
            firsts = _tokenise(folder, source, how)
            if tokenise.identity(source, how) != identity:
                token_cache.clear(folder)
                raise BadInput(f"{source.path}, or its tokenizer, changed while it was read")
            token_cache.finish(folder, firsts)
            shards = token_cache.read_all(folder)
    if shards is None:
        raise StorageError(f"what was just written to {folder} cannot be read: is the disk sound?")
    return shards


def _parts(source: Source, most: int) -> Iterator[tuple[int, list[Row]]]:
    """The rows, so many at a time, with the number of the first."""
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


def _tokenise(folder: places.Place, source: Source, how: How) -> list[int]:
    """Writes what is not there yet: the first file from here, the others from more processes."""
    files = tokenise.files_of(how)
    firsts: list[int] = []
    running: set[concurrent.futures.Future] = set()
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = None
    try:
        for first, rows in _parts(source, SHARD):
            firsts.append(first)
            known = token_cache.read(folder, token_cache.name_of(first))
            if known is not None and known.counts.rows == len(rows):
                continue
            if first == 0 or here == 1:
                _tokenise_part(folder, first, rows, source, how, files)
                continue
            if pool is None:  # not forked: the threads of jax would not come along
                pool = concurrent.futures.ProcessPoolExecutor(
                    min(here, 16),
                    multiprocessing.get_context("spawn"),
                    initializer=_end_with,
                    initargs=(os.getpid(),),
                )
            running.add(pool.submit(_tokenise_part, folder, first, rows, source, how, files))
            if len(running) > min(here, 16) + 2:
                done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                _come_back(done)
        _come_back(running)
    except process.BrokenProcessPool as error:
        raise RunFailed(
            f"a process that tokenised {source.path} died: for want of memory, or because the "
            'script that began it lacks `if __name__ == "__main__":`. What is done is kept; start '
            "again, on fewer cores (taskset) if memory is short"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return firsts


def _tokenise_part(
    folder: places.Place, first: int, rows: Sequence[Row], source: Source, how: How, files: str
) -> None:
    shard = tokenise.encode(rows, first, source, how, files)
    token_cache.write(folder, token_cache.name_of(first), shard)


def _come_back(done: set[concurrent.futures.Future]) -> None:
    for one in done:
        try:
            one.result()
        except (ValueError, OSError) as error:
            # A sentence of ours, from another process.
            raise (StorageError if isinstance(error, OSError) else BadInput)(str(error)) from error


def _end_with(parent: int) -> None:
    """A process that was killed takes those it began along."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is meant for them too: no tracebacks

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

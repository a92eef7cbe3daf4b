"""A disk cache of pairs as ids: safetensors files, each written whole and mapped when read.

A folder is for one source, one tokenizer and template, and one way to read them. Each file holds a
fixed number of the source's rows; `done.json` is written after the last of them.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import hashlib
import json
import re
from typing import Any

from checkpoints_io import places
from checkpoints_io.errors import StorageError
from recipes import terminal
from recipes.data.ids import shards
from recipes.data.ids.shards import Shard

FORMAT, SUFFIX = 3, ".safetensors"


def folder_of(directory: places.Place, identity: dict[str, object]) -> places.Place:
    """The folder for this `identity`, created if it does not exist.

    Raises:
      OSError: the directory cannot be used.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, indent=1)
    folder = directory.within(hashlib.sha256(text.encode()).hexdigest()[:16])
    with _told(folder):
        folder.make()
        clear_rooms(directory)
        if not folder.exists("identity.json"):
            folder.write_whole("identity.json", text.encode())
    return folder


def clear_rooms(directory: places.Place) -> None:
    """Removes what killed writers left in a cache's folders, whose names are hashes."""
    for room in directory.names():
        if re.fullmatch("[0-9a-f]{16}", room):
            directory.within(room).clear()


@contextlib.contextmanager
def alone(folder: places.Place) -> Iterator[None]:
    """Keeps other processes from writing there in the block; if one is, this waits and says so."""
    told = f"waiting for another process that is tokenising the same data, in {folder}"
    with contextlib.ExitStack() as stack:
        with _told(folder):
            stack.enter_context(folder.alone(otherwise=lambda: terminal.write(told)))
        yield


def fact(folder: places.Place, name: str, work: Callable[[], object]) -> Any:
    """A value that is computed once and kept in the folder under this name, as JSON.

    Raises:
      OSError: the disk is full, or cannot be written.
    """
    with contextlib.suppress(OSError, ValueError):
        if (content := folder.read(f"{name}.json")) is not None:
            return json.loads(content)
    found = work()
    with _told(folder):
        folder.write_whole(f"{name}.json", json.dumps(found).encode())
    return found


def name_of(first: int) -> str:
    """The name of the file that begins with this row of the source."""
    return f"{first:09d}{SUFFIX}"


def write(folder: places.Place, name: str, content: bytes) -> None:
    """Writes one file, made by `shards.to_bytes`, which appears when it is complete.

    Raises:
      OSError: the disk is full, or cannot be written.
    """
    with _told(folder):
        folder.write_whole(name, content)


def read(folder: places.Place, name: str) -> Shard | None:
    """Reads what `write` wrote; None if that cannot be read, or does not exist.

    The arrays are views of the file: they take memory only while they are used.
    """
    try:
        content = folder.mapped(name)
        return None if content is None else shards.from_bytes(content)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None


def finish(folder: places.Place, firsts: Sequence[int]) -> None:
    """Records that these files are all of them."""
    digests = {name_of(first): _digest(folder, name_of(first)) for first in firsts}
    with _told(folder):
        folder.write_whole("done.json", json.dumps(digests).encode())


def clear(folder: places.Place) -> None:
    """Marks the contents of the folder as incomplete."""
    for name in folder.names():
        if name.endswith(SUFFIX):
            folder.remove(name)


def read_all(folder: places.Place) -> list[Shard] | None:
    """All shards, if the folder is complete; a file that has changed is removed."""
    try:
        done = folder.read("done.json")
        digests = json.loads(done) if done is not None else None
    except (OSError, ValueError):
        return None
    if not isinstance(digests, dict):
        return None
    there = set(folder.names())
    found = []
    for name, digest in digests.items():
        shard = None
        if name in there and _digest(folder, name) == digest:
            shard = read(folder, name)
        if shard is not None:
            found.append(shard)
        elif name in there:
            folder.remove(name)
    return found if len(found) == len(digests) else None


def _digest(folder: places.Place, name: str) -> str | None:
    try:
        content = folder.read(name)
    except OSError:
        return None
    return hashlib.sha256(content).hexdigest() if content is not None else None


@contextlib.contextmanager
def _told(folder: places.Place) -> Iterator[None]:
    """Turns an error of the disk into an error for the user."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"tokens cannot be kept in {folder} ({error.strerror or error}): free some space, "
            "choose another --config.token_cache, or unset it"
        ) from error

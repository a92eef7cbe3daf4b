"""What a source names: files, here or far away, or a dataset on the hub -> rows."""

from collections.abc import Iterator
import hashlib
import pathlib
import re
from typing import Any

import fsspec

from recipes.data import files, tables
from recipes.data.records import Row

HUB = r"[\w-][\w.-]*/[\w-][\w.-]*(:[^:@]+){0,2}(@.+)?"


def read(source: str, wanted: frozenset[str] | None = None) -> Iterator[Row]:
    """The rows of a source, in its order, with the columns that are wanted; by default all.

    Files are named by a path, with `*` for several, here or behind gs://, s3:// and what else
    fsspec knows; a hub dataset as `owner/name:subset:split@revision`, of which only `owner/name`
    must be there.

    Raises:
      FileNotFoundError: there is no such file, nor such a dataset within reach.
      ValueError: the kind of a file is not known.
    """
    if _is_hub(source):
        return _hub_rows(source, wanted)
    file_system, paths = _found(source)
    return _rows(file_system, paths, source, wanted)


def identity(source: str) -> dict[str, Any]:
    """What tells the present contents of a source from others: of each file, its name and a hash.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    if _is_hub(source):
        return {"hub": source, "fingerprint": _hub(source)._fingerprint}
    file_system, paths = _found(source)
    return {"files": {path: _hash(file_system, path) for path in paths}}


def _rows(
    file_system: Any, paths: list[str], source: str, wanted: frozenset[str] | None
) -> Iterator[Row]:
    for path in paths:
        name = path if "://" not in source else file_system.unstrip_protocol(path)
        yield from files.rows(str(name), file_system.open(path, "rb"), wanted)


def _is_hub(source: str) -> bool:
    path = pathlib.Path(source).expanduser()
    named = files.kind_of(source) is not None or path.exists()
    return not named and bool(re.fullmatch(HUB, source))


def _found(source: str) -> tuple[Any, list[str]]:
    """The file system of a source, and its files in order."""
    try:
        here = source if "://" in source else str(pathlib.Path(source).expanduser())
        file_system, path = fsspec.core.url_to_fs(here)
        found = [path] if file_system.exists(path) else []
        if not found and re.search(r"[*?\[]", source):
            found = sorted(file_system.glob(path))
    except ImportError as error:
        raise ValueError(f"{source!r} needs a library: pip install -e '.[cloud]'") from error
    except Exception as error:  # each file system raises its own
        raise FileNotFoundError(
            f"{source!r} cannot be reached ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if not found:
        raise FileNotFoundError(f"there is no data file {source!r}")
    for path in found:
        if "file" in file_system.protocol and not pathlib.Path(path).exists():
            raise FileNotFoundError(f"{path} is a link that leads nowhere")
        if file_system.isdir(path):
            raise ValueError(f"{path} is a folder: name its files, as in {source}/*.jsonl")
        if files.kind_of(path) is None:
            raise ValueError(f"{path} is none of {', '.join(files.SUFFIXES)}")
        if "file" in file_system.protocol and not pathlib.Path(path).is_file():
            raise ValueError(f"{path} is no ordinary file")
    return file_system, found


def _hash(file_system: Any, path: str) -> str:
    """Of the bytes; of buckets, what they say that changes with them."""
    if {"gs", "s3"} & set(file_system.protocol):
        return str(file_system.ukey(path))
    digest = hashlib.sha256()
    with file_system.open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _hub_rows(source: str, wanted: frozenset[str] | None) -> Iterator[Row]:
    number = 0
    for table in _hub(source).with_format("arrow").iter(tables.AT_ONCE):
        for batch in table.combine_chunks().to_batches():
            yield from tables.batch_rows(source, number, batch, wanted)
            number += len(batch)


def _hub(source: str) -> Any:
    import datasets  # two seconds to import, and only hub ids need it

    named, _, revision = source.partition("@")
    name, *parts = named.split(":")
    split = parts.pop() if parts else "train"
    try:
        return datasets.load_dataset(name, *parts, split=split, revision=revision or None)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no file {source!r} here, and the hub did not give a dataset of that name "
            f"({type(error).__name__}): check the name, the network, and your token if it is gated"
        ) from error
    except ValueError as error:
        raise ValueError(f"the dataset {source!r} could not be read: {error}") from error

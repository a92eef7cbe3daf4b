"""Reads the rows of a source, which names files, local or remote, or a dataset on the hub."""

import collections
from collections.abc import Iterator
import fnmatch
import functools
import glob
import hashlib
import itertools
import os
import re
from typing import Any

import fsspec

from checkpoints_io.errors import BadInput, NotFound
from recipes.data.rows import formats, records, tables
from recipes.data.rows.records import Row

# A part is a subset or a split, which may be a slice: `train[:10%]`.
HUB = r"[\w-][\w.-]*/[\w-][\w.-]*(:([^:@\[\]]|\[[^@\[\]]*\])+){0,2}(@.+)?"
FileSystem = Any  # fsspec's, known by its methods: its own types are less precise
# In a folder that `datasets` saved: its description, and what was computed from it.
NO_DATA = re.compile(r"(^|/)((dataset_infos?|dataset_dict|state)\.json|cache-[^/]*\.arrow)$")
# Words in a path that name a split, as `datasets` reads them.
SPLIT = re.compile(
    r"(?<![a-z0-9])(train|validation|valid|val|dev|test|eval|held_?out)(?:ing|uation)?"
    r"(_prefs|_sft|_gen)?(?![a-z0-9])"  # UltraFeedback's and UltraChat's splits are six
)


def read(source: str, wanted: frozenset[str] | None = None) -> Iterator[Row]:
    """The rows of a source, in its order, with the columns that are wanted; by default all.

    Files are named by a path, with `*` for several, locally or at gs://, s3:// and whatever else
    fsspec supports, or by their folder; a hub dataset as `owner/name:subset:split@revision`, of
    which only `owner/name` is required.

    Raises:
      FileNotFoundError: there is no such file, and no such dataset can be reached.
      ValueError: the kind of a file is not known.
    """
    if _is_hub(source):
        return _hub_rows(source, wanted)
    file_system, paths = _found(source)
    return _rows(file_system, paths, wanted)


def read_texts(source: str) -> Iterator[Row]:
    """The `text` of every row, or for .txt files the whole of each.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    if not source.lower().partition("?")[0].endswith(".txt"):
        yield from read(source, frozenset({"text"}))
        return
    file_system, paths = _named(source)
    if not paths:
        raise NotFound(f"there is no file {source!r}")
    for path in paths:
        with file_system.open(path, "rb") as file:
            yield records.from_text(path, file.read(records.LONGEST + 1))


def identity(source: str) -> dict[str, object]:
    """What identifies the present contents of a source: the name and a hash of each file.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """
    if _is_hub(source):
        return {"hub": source, "fingerprint": _hub(source)._fingerprint}
    file_system, paths = _found(source)
    return {"files": {path: _hash(file_system, path) for path in paths}}


def _rows(
    file_system: FileSystem, paths: list[str], wanted: frozenset[str] | None
) -> Iterator[Row]:
    for path in paths:
        name = path if "file" in file_system.protocol else file_system.unstrip_protocol(path)
        yield from formats.rows(str(name), file_system.open(path, "rb"), wanted)


def hub_id(source: str) -> str | None:
    """The `owner/name` of a source that is a dataset on the hub; None for other sources."""
    return re.split("[:@]", source)[0] if _is_hub(source) else None


def _is_hub(source: str) -> bool:
    named = formats.kind_of(source) is not None or _is_here(source)
    return not named and bool(re.fullmatch(HUB, source))


def _is_here(source: str) -> bool:
    return os.path.exists(os.path.expanduser(source))


def _found(source: str) -> tuple[FileSystem, list[str]]:
    """The file system of a source, and its files in order."""
    file_system, found = _named(source)
    if not found:
        raise NotFound(f"there is no data file {source!r}")
    local = "file" in file_system.protocol
    if len(found) == 1 and _is_folder(file_system, found[0]):
        found = _within(file_system, found[0], source)
    for path in found:
        if local and not os.path.exists(path):
            raise NotFound(f"{path} is a broken link")
        if _is_folder(file_system, path):
            raise BadInput(f"{path} is a folder, one of several matches of {source!r}: name one")
        if formats.kind_of(path) is None:
            raise BadInput(f"{path} does not end in one of {', '.join(formats.SUFFIXES)}")
        if local and not os.path.isfile(path):
            raise BadInput(f"{path} is not a regular file: give a file or a folder")
    return file_system, found


def _is_folder(file_system: FileSystem, path: str) -> bool:
    """Whether a path is a folder; web servers are not asked, as they would send the whole file."""
    return "http" not in file_system.protocol and file_system.isdir(path)


def _named(source: str) -> tuple[FileSystem, list[str]]:
    """The files of this name; if there are none, those that its pattern matches.

    A path is a URL, or a chain of them, only if it has `://` and is not a local file.
    """
    try:
        if _is_here(source) or "://" not in source:
            file_system = fsspec.filesystem("file")
            path = os.path.abspath(os.path.expanduser(source))
        else:
            file_system, path = fsspec.core.url_to_fs(source)
        if file_system.exists(path):
            return file_system, [path]
        if not re.search(r"[*?\[]", source):
            return file_system, []
        parts = path.split("/")
        while parts and not file_system.exists("/".join(parts)):
            parts.pop()
        begin = "/".join(parts)  # it exists, so its brackets are not a pattern
        rest = path[len(begin) :]
        for pattern in (rest, rest.replace("[", "[[]")):
            matched = file_system.glob(glob.escape(begin) + pattern)
            if shown := [name for name in matched if not os.path.basename(name).startswith(".")]:
                return file_system, sorted(shown)
        return file_system, []
    except ImportError as error:
        raise BadInput(f"{source!r} needs a library: pip install -e '.[cloud]'") from error
    except Exception as error:  # each file system raises its own errors
        raise NotFound(
            f"{source!r} cannot be reached ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _within(file_system: FileSystem, folder: str, source: str) -> list[str]:
    """The data files of a folder and its subfolders, if they are of one kind and one split."""
    inner = lambda path: path[len(folder) :].lstrip("/")
    hidden = lambda path: re.search(r"(^|/)[._]", inner(path)) or NO_DATA.search(path)
    found = sorted(path for path in file_system.find(folder) if not hidden(path))
    found = [path for path in found if formats.kind_of(path)]
    if not found:
        raise NotFound(f"{source} is a folder without data: {', '.join(formats.SUFFIXES)}")
    plain = lambda path: re.sub(r"\.(gz|zst)$", "", formats.kind_of(path) or "")
    split = lambda path: "".join((SPLIT.findall(inner(path).lower()) or [("no split",)])[-1])
    for what, sort in (("kinds", plain), ("splits", split)):
        counted = collections.Counter(map(sort, found))
        if len(counted) > 1:
            trained = (name for name in ("train", "train_prefs", "train_sft") if name in counted)
            chosen = next(trained, counted.most_common(1)[0][0])
            some = [inner(path) for path in found if sort(path) == chosen]
            others = [inner(path) for path in found if sort(path) != chosen]
            told = ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))
            raise BadInput(
                f"{source} is a folder with files of several {what} ({told}): name the ones to "
                f"read, as in {os.path.join(source, _pattern(some, others))}"
            )
    return found


def _pattern(some: list[str], others: list[str]) -> str:
    """A source for just these files, not the others: their folder, a pattern, or the first."""
    folders = [os.path.dirname(path) for path in some]
    shared = os.path.commonpath(folders)
    if shared and not any(path.startswith(f"{shared}/") for path in others):
        return shared
    letters = zip(*(os.path.basename(path) for path in some), strict=False)
    alike = itertools.takewhile(lambda several: len(set(several)) == 1, letters)
    begin = "".join(letter for letter, *_ in alike)
    kinds = {formats.kind_of(path) for path in some}
    end = kinds.pop() if len(kinds) == 1 else ""
    inside = f"{shared}/" if set(folders) == {shared} and shared else "*/" * some[0].count("/")
    for pattern in (f"{inside}*{end}", f"{inside}{begin}*{end}", f"{inside}{begin}"):
        fits = [_fits(path, pattern) for path in (*some, *others)]
        if all(fits[: len(some)]) and not any(fits[len(some) :]):
            return pattern
    return some[0]


def _fits(path: str, pattern: str) -> bool:
    both = list(zip(path.split("/"), pattern.split("/"), strict=False))
    return path.count("/") == pattern.count("/") and all(itertools.starmap(fnmatch.fnmatch, both))


def _hash(file_system: FileSystem, path: str) -> str:
    """A hash of a file's bytes; in buckets, of metadata that changes with them."""
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


# A start reads a source several times, and each load of a dataset would ask the hub again. Once
# loaded, a dataset is mapped and does not change.
@functools.cache
def _hub(source: str) -> Any:
    import datasets  # two seconds to import, and only hub ids need it

    named, _, revision = source.partition("@")
    name, *parts = re.split(r":(?![^\[]*\])", named)  # `train[:10%]` is one
    split = parts.pop() if parts else "train"
    try:
        return datasets.load_dataset(name, *parts, split=split, revision=revision or None)
    except OSError as error:
        raise NotFound(
            f"there is no file {source!r} here, and no dataset of that name could be loaded from "
            f"the hub ({type(error).__name__}): check the name, the network, and, for a gated "
            "dataset, your token"
        ) from error
    except ValueError as error:
        raise BadInput(f"the dataset {source!r} could not be read: {error}") from error

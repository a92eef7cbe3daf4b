"""Where rows come from: a local file or a dataset on the hub -> rows that know their place."""

from collections.abc import Iterator
import gzip
import json
import pathlib
import re
from typing import Any, NamedTuple
import zlib

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class Row(NamedTuple):
    """One record of a dataset."""

    where: str  # "pairs.jsonl:17", for messages
    fields: dict[str, Any] | None  # None: the line holds no JSON object


def read(source: str) -> Iterator[Row]:
    """The rows of a local file, or of a hub dataset written `owner/name[:split][@revision]`.

    Raises:
      FileNotFoundError: there is no such file, nor such a dataset within reach.
      ValueError: the file's kind is not known, or it holds something else.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            return _jsonl(path)
        if path.suffix == ".json":
            return _json(path)
        if path.suffix == ".parquet":
            return _table(path.name, _parquet(path))
        raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")
    if source.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[^@]+)?(@.+)?", source):
        raise FileNotFoundError(f"there is no data file {source!r}")
    return _table(source, _hub(source))


def _jsonl(path: pathlib.Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(f"{path}:{number}", _object(line))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json(path: pathlib.Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} should hold a JSON list of rows; one row a line is .jsonl")
    for number, row in enumerate(rows):
        yield Row(f"{path}[{number}]", row if isinstance(row, dict) else None)


def _table(name: str, rows) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield Row(f"{name}[{number}]", row)


def _parquet(path: pathlib.Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _hub(source: str):
    import datasets  # two seconds to import, and only hub ids need it

    name, _, revision = source.partition("@")
    name, _, split = name.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train", revision=revision or None)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no file {source!r} here, and the hub did not give a dataset of that name "
            f"({type(error).__name__}): check the name, the network, and your token if it is gated"
        ) from error
    except ValueError as error:
        raise ValueError(f"the dataset {source!r} could not be read: {error}") from error

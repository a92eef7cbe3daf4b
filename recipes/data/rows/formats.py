"""The kinds of data files, one function each, from an open file to rows that know their place.

A row that cannot be read becomes a row with a reason, and so does the rest of a truncated file.
"""

from collections.abc import Callable, Iterator
import gzip
import io
import pathlib
import shutil
import tempfile

import pyarrow

from checkpoints_io.errors import BadInput
from recipes.data.rows import delimited, json_files, records, tables
from recipes.data.rows.records import File, Row, Wanted


def array_record(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Reads records that are JSON objects, by path, so that a remote file is downloaded first."""
    from array_record.python import array_record_module

    number = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = getattr(file, "name", None)
        if not isinstance(path, str):
            path = str(pathlib.Path(scratch, "fetched.array_record"))
            with open(path, "wb") as here:
                shutil.copyfileobj(file, here)
        try:
            reader = array_record_module.ArrayRecordReader(path)
            if not (count := reader.num_records()):  # also 0 for a truncated file
                raise BadInput("it is truncated, or holds no records")
            for start in range(0, count, tables.AT_ONCE):
                for record in reader.read(start, min(start + tables.AT_ONCE, count)):
                    yield records.from_json(f"{name}[{number}]", record, wanted)
                    number += 1
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            yield records.torn(f"{name}[{number}]", error)


KINDS: dict[str, Callable[[str, File, Wanted], Iterator[Row]]] = {
    ".jsonl": json_files.lines,
    ".json": json_files.whole_list,
    ".csv": delimited.comma,
    ".tsv": delimited.tab,
    ".parquet": tables.parquet,
    ".arrow": tables.arrow,
    ".array_record": array_record,
    ".arrayrecord": array_record,
}
COMPRESSED = (".gz", ".zst")
TEXTS = (".jsonl", ".json", ".csv", ".tsv")  # which may be compressed
SUFFIXES = (*KINDS, *(f"{kind}{c}" for kind in TEXTS for c in COMPRESSED))


def kind_of(name: str) -> str | None:
    """The longest of SUFFIXES that a file's name, or a URL's before its query, ends in."""
    ends = name.lower(), name.lower().partition("?")[0] if "://" in name else ""
    fits = (suffix for suffix in SUFFIXES if any(end.endswith(suffix) for end in ends))
    return max(fits, key=len, default=None)


def rows(name: str, opened: File, wanted: Wanted = None) -> Iterator[Row]:
    """The rows of an open file of a known kind, which is closed afterwards."""
    kind = kind_of(name) or ""
    file = opened
    with opened:
        if kind.endswith(".gz"):
            file = gzip.open(file)  # noqa: SIM115, closed with what it reads
        elif kind.endswith(".zst"):
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
            file = io.BufferedReader(stream)
        for suffix in COMPRESSED:
            kind = kind.removesuffix(suffix)
        yield from KINDS[kind](name, file, wanted)

"""The kinds of data files, a function each: an open file in, rows that know their place out.

A row that cannot be read is a row with a reason. So is what is left of a file that breaks off.
"""

from collections.abc import Callable, Iterator
import gzip
import io
import json
import pathlib
import re
import shutil
import tempfile
from typing import Any, NamedTuple
import zlib

import pyarrow
import pyarrow.compute
import pyarrow.parquet

LONGEST = 2**24  # bytes of one row
LARGEST = 2**30  # of one JSON list
AT_ONCE = 512  # rows of a table in memory, or fewer: of all of them each might be very long
DEEPEST, MOST = 64, 10**5  # lists within lists in one row, and lists in all
SPACE = re.compile(r"[ \t\r\n]*")
File = Any  # open, of bytes; what fsspec gives are files by their methods alone
BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, OSError)  # what compressed files raise


class Row(NamedTuple):
    """One record of a dataset."""

    where: str  # "pairs.jsonl:17", for messages
    fields: dict[str, Any] | None  # of the columns that are wanted
    reason: str = ""  # why it has no fields
    unread: tuple[str, ...] = ()  # its other columns
    size: int = 0  # bytes, about


Wanted = frozenset[str] | None  # columns; None: all


def json_lines(name: str, file: File, wanted: Wanted, before: int = 0) -> Iterator[Row]:
    """One JSON object a line; empty lines are none. `before` lines were read already."""
    number = before
    try:
        while line := file.readline(LONGEST + 1):
            number += 1
            rest = line  # the last line may lack its end, and then nothing follows
            while not rest.endswith(b"\n") and (rest := file.readline(LONGEST)):
                pass
            if len(line) > LONGEST:
                yield _too_long(f"{name}:{number}")
            elif line.strip():
                yield _parsed(f"{name}:{number}", line, wanted)
    except BROKEN as error:
        yield _torn(f"{name}:{number + 1}", error)


def json_list(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """A JSON list of objects; a file of JSON lines that is named so is read as one."""
    blank = 0
    try:
        while (first := file.readline(LONGEST)) and not first.strip():
            blank += 1
        if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from json_lines(name, _Behind(first, file), wanted, blank)
            return
        whole = first + file.read(LARGEST)
        if len(whole) >= LARGEST:
            yield Row(name, None, f"a list of more than {LARGEST >> 30} GiB: make it JSON lines")
            return
        text = whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Row(f"{name}, byte {error.start}", None, "not valid UTF-8")
        return
    except BROKEN as error:
        yield _torn(name, error)
        return
    decoder, number = json.JSONDecoder(), 0
    after_space: Callable[[int], int] = lambda at: SPACE.match(text, at).end()  # type: ignore
    at = after_space(text.index("[") + 1)
    while text[at : at + 1] != "]":
        where = f"{name}[{number}]"
        try:
            value, end = decoder.raw_decode(text, at)
            end = after_space(end)
            if text[end : end + 1] not in ("]", ","):
                raise ValueError("neither a comma nor the end of the list")
        except (ValueError, RecursionError):
            line = blank + text.count("\n", 0, at) + 1
            yield Row(f"{where}, line {line}", None, "not valid JSON, from here to the end")
            return
        yield _row(where, value, end - at, wanted) if end - at <= LONGEST else _too_long(where)
        at, number = after_space(end + (text[end] == ",")), number + 1
    if text[at + 1 :].strip():
        yield Row(name, None, "more than one JSON list")


class _Behind:
    """A file whose first line was read already."""

    def __init__(self, first: bytes, file: File):
        self._first, self._file = first, file

    def readline(self, size: int | None = -1) -> bytes:
        """As of any file."""
        first, self._first = self._first, b""
        return first or self._file.readline(-1 if size is None else size)


def parquet(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """A table, by row groups. What a column is compressed to says nothing of what it unfolds to."""
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = _distinct(table.schema_arrow.names)
        read = [column for column in names if wanted is None or column in wanted]
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).total_byte_size  # of a column it might not say
            some = min(max(LARGEST // max(size, 1), 8), AT_ONCE)
            for batch in table.iter_batches(some, row_groups=[group], columns=read):
                yield from _batch(name, number, batch, names)
                number += len(batch)
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        yield _torn(f"{name}[{number}]", error)


def arrow(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Arrow's own format: the stream that `datasets` saves, or a file with an index."""
    number = 0
    try:
        if file.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            for start in range(0, len(batch), AT_ONCE):
                yield from batch_rows(name, number + start, batch.slice(start, AT_ONCE), wanted)
            number += len(batch)
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        yield _torn(f"{name}[{number}]", error)


def batch_rows(name: str, first: int, batch: pyarrow.RecordBatch, wanted: Wanted) -> Iterator[Row]:
    """Rows of a table, of which the first has this number."""
    names = _distinct(batch.schema.names)
    read = batch.select([c for c in names if wanted is None or c in wanted])
    yield from _batch(name, first, read, names)


def _distinct(names: list[str]) -> list[str]:
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several columns are named {min(twice)!r}")
    return names


def _batch(name: str, first: int, batch: pyarrow.RecordBatch, columns: list[str]) -> Iterator[Row]:
    try:
        size, found = _values(batch)
    except (ValueError, OverflowError, pyarrow.ArrowException):  # which of the rows is it?
        if len(batch) == 1:
            yield Row(f"{name}[{first}]", None, "a value that cannot be read")
            return
        half = len(batch) // 2
        yield from _batch(name, first, batch.slice(0, half), columns)
        yield from _batch(name, first + half, batch.slice(half), columns)
        return
    unread = tuple(column for column in columns if column not in batch.schema.names)
    for number, fields in enumerate(found, start=first):
        where = f"{name}[{number}]"
        if fields is None:
            yield _too_long(where)
        else:
            yield _row(where, fields, size // len(batch), None)._replace(unread=unread)


def _values(batch: pyarrow.RecordBatch) -> tuple[int, list[Any]]:
    """About how many bytes they are, and the rows; None for one that is too long."""
    batch.validate(full=True)  # a stranger's offsets may lead anywhere
    if (size := sum(map(_bytes, batch.columns))) > LONGEST:
        if len(batch) > 1:
            raise ValueError("too much at once")
        return size, [None]
    return size, batch.to_pylist()


def _bytes(column: pyarrow.Array) -> int:
    """Once unfolded: a dictionary names a text of megabytes in a byte."""
    if not isinstance(column, pyarrow.DictionaryArray):
        if "dictionary<" in str(column.type):
            raise ValueError("a dictionary within a list")
        return column.nbytes
    compute: Any = pyarrow.compute
    lengths = compute.binary_length(column.dictionary)
    return compute.sum(lengths.take(column.indices)).as_py() or 0


def array_record(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Records that are JSON objects. They are read by their path, so a far file is fetched."""
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
            if not (count := reader.num_records()):  # what it says of a file that breaks off
                raise ValueError("it breaks off, or holds no records")
            for start in range(0, count, AT_ONCE):
                for record in reader.read(start, min(start + AT_ONCE, count)):
                    yield _parsed(f"{name}[{number}]", record, wanted)
                    number += 1
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            yield _torn(f"{name}[{number}]", error)


KINDS: dict[str, Callable[[str, File, Wanted], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".parquet": parquet,
    ".arrow": arrow,
    ".array_record": array_record,
    ".arrayrecord": array_record,
}
COMPRESSED = (".gz", ".zst")
SUFFIXES = (*KINDS, *(f"{kind}{c}" for kind in (".jsonl", ".json") for c in COMPRESSED))


def kind_of(name: str) -> str | None:
    """The longest of SUFFIXES that a file's name ends in."""
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)


def rows(name: str, opened: File, wanted: Wanted = None) -> Iterator[Row]:
    """The rows of an open file of a known kind, closed behind them."""
    kind = kind_of(name) or ""
    file = opened
    with opened:
        if kind.endswith(".gz"):
            file = gzip.open(file)  # noqa: SIM115, closed with what it reads
        elif kind.endswith(".zst"):
            stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
            file = io.BufferedReader(stream)
        for suffix in COMPRESSED:
            kind = kind.removesuffix(suffix)
        yield from KINDS[kind](name, file, wanted)


def _parsed(where: str, line: bytes, wanted: Wanted) -> Row:
    if len(line) > LONGEST:
        return _too_long(where)
    if line.count(b"[") + line.count(b"{") > MOST:
        return Row(where, None, f"more than {MOST} lists")
    try:
        return _row(where, json.loads(line.decode("utf-8-sig")), len(line), wanted)
    except UnicodeDecodeError:
        return Row(where, None, "not valid UTF-8")
    except (ValueError, RecursionError):
        return Row(where, None, "not valid JSON")


def _row(where: str, value: Any, size: int, wanted: Wanted) -> Row:
    if not isinstance(value, dict):
        return Row(where, None, "not a JSON object")
    unread = () if wanted is None else tuple(name for name in value if name not in wanted)
    if unread:
        value = {name: field for name, field in value.items() if name not in unread}
    if not _is_flat(value):
        return Row(where, None, f"deeper than {DEEPEST} lists")
    return Row(where, value, unread=unread, size=size)


def _is_flat(value: Any) -> bool:
    """Is it nested no deeper than DEEPEST?"""
    level = [value]
    for _ in range(DEEPEST):
        inner = [x.values() if isinstance(x, dict) else x for x in level]
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return True
    return False


def _too_long(where: str) -> Row:
    return Row(where, None, f"longer than {LONGEST >> 20} MiB")


def _torn(where: str, error: Exception) -> Row:
    told = str(error).strip().splitlines() or [type(error).__name__]
    return Row(where, None, f"the file cannot be read from here on: {told[0][:200]}")

"""Rows of CSV and TSV files: a header, then cells of text; an empty cell is a missing one."""

from collections.abc import Iterator
import csv
import io
import itertools

from recipes.data.rows import records
from recipes.data.rows.records import File, Row, Wanted


def comma(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Reads CSV files; many spreadsheets separate cells by semicolons, so the header decides."""
    yield from _rows(name, file, wanted, ",;\t")


def tab(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Reads TSV files."""
    yield from _rows(name, file, wanted, "\t")


def _rows(name: str, file: File, wanted: Wanted, delimiters: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), records.LONGEST + 1))  # `_Lines` has its own
    number = 0
    try:
        lines = _Lines(file)
        first = next((line for line in lines if line.strip()), "")
        delimiter = max(delimiters, key=first.count)
        table = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        cells = next(table, [])
        header = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, start=1)]
        records.distinct(header)
        while True:
            number = lines.number + 1
            lines.size = 0
            try:
                cells = next(table, None)
            except (csv.Error, _TooLong) as error:
                where = f"{name}:{number}" + f"-{lines.number}" * (lines.number > number)
                told = Row(where, None, f"not valid CSV: {error}")
                yield records.too_long(where) if isinstance(error, _TooLong) else told
                continue
            if cells is None:
                return
            if cells:
                yield _row(f"{name}:{number}", header, cells, wanted)
    except (ValueError, csv.Error, *records.BROKEN) as error:
        yield records.torn(f"{name}:{number + 1}", error)


def _row(where: str, header: list[str], cells: list[str], wanted: Wanted) -> Row:
    if len(cells) != len(header):
        return Row(where, None, "more or fewer cells than the header")
    try:
        size = len("".join(cells).encode())
    except UnicodeEncodeError:  # a surrogate, for bytes that are not text
        return Row(where, None, "not valid UTF-8")
    fields = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    row = records.from_value(where, fields, size, wanted)
    return row._replace(fields=records.without_nulls(row.fields), cells=True)


class _TooLong(Exception):
    """A record with more characters than a row may have."""


class _Lines:
    """The lines of a file as text, with the bounds that `csv` lacks; an error does not end it."""

    def __init__(self, file: File):
        buffered = io.BufferedReader(file)
        encoding = "utf-16" if buffered.peek(2)[:2] in records.UTF16 else "utf-8-sig"
        self._text = io.TextIOWrapper(buffered, encoding, "surrogateescape", newline="")
        self.number = 0  # lines read
        self.size = 0  # characters of the record

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(records.LONGEST + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.size += len(line)
        rest = line
        while not rest.endswith(("\n", "\r")) and (rest := self._text.readline(records.LONGEST)):
            self.size += len(rest)
        if self.size > records.LONGEST:
            raise _TooLong
        return line

"""Rows of JSON files: an object per line, or a list of them; only one row in memory at a time."""

from collections.abc import Iterator
import itertools
import re

from checkpoints_io.errors import BadInput
from recipes.data.rows import records
from recipes.data.rows.records import File, Row, Wanted

AT_ONCE = 2**20  # bytes of a list
# A string, a bracket or a comma; of a string that does not end here, only its quote.
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


def lines(name: str, file: File, wanted: Wanted, before: int = 0) -> Iterator[Row]:
    """Reads one JSON object per line, skipping empty lines; `before` lines were read already."""
    number, is_first = before, True
    try:
        while line := file.readline(records.LONGEST + 1):
            number += 1
            rest = line  # the last line may lack its end, and then nothing follows
            while not rest.endswith(b"\n") and (rest := file.readline(records.LONGEST)):
                pass
            if len(line) > records.LONGEST:
                yield records.too_long(f"{name}:{number}")
            elif line.strip():
                row = records.from_json(f"{name}:{number}", line, wanted)
                yield (
                    row
                    if row.fields is not None
                    else row._replace(reason=row.reason + (_instead(line) if is_first else ""))
                )
                is_first = False
    except records.BROKEN as error:
        yield records.torn(f"{name}:{number + 1}", error)


def _instead(first: bytes) -> str:
    """What to do with a file whose first line is not an object."""
    begins = first.removeprefix(b"\xef\xbb\xbf").strip()
    if begins[:1] == b"[":
        return ", but a list: name the file .json, or write one object on each line"
    return ": each line must be a whole object" if begins == b"{" else ""


def whole_list(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Reads a JSON list of objects; a .json file of JSON lines is read as such."""
    blank, number = 0, 0
    try:
        while (first := file.readline(AT_ONCE)) and not first.strip():
            blank += first.endswith(b"\n")
        text = first.removeprefix(b"\xef\xbb\xbf").lstrip()
        if text.strip() == b"{":
            raise BadInput(
                "it begins with an object that spans several lines, but must be a list of "
                "objects or have one object per line"
            )
        if not text.startswith(b"["):
            if not first.endswith(b"\n"):
                first += file.readline(records.LONGEST + 1 - len(first))
            yield from lines(name, _Behind(first, file), wanted, blank)
            return
        for line, element in _elements(text[1:], file, blank + 1):
            where = f"{name}[{number}]"
            row = records.from_json(where, element or b"", wanted)
            if element is None:
                row = records.too_long(where)
            yield row if row.fields is not None else row._replace(where=f"{where}, line {line}")
            number += 1
    except (ValueError, *records.BROKEN) as error:
        yield records.torn(f"{name}[{number}]", error)


def _elements(begun: bytes, file: File, line: int) -> Iterator[tuple[int, bytes | None]]:
    """The values of a list whose bracket was read, each with its line; None: it is too long.

    Raises:
      ValueError: the list cannot be read to its end; the message says why.
    """
    held, start, at, depth, long = b"", 0, 0, 0, False
    begins = line
    chunks = itertools.chain([begun], iter(lambda: file.read(AT_ONCE), b""))
    for more in chunks:
        held, at, start = held[start:] + more, at - start, 0
        for token in TOKEN.finditer(held, at):
            mark, at = token[0], token.end()
            if mark == b'"':
                at = token.start()
                break
            if mark in (b"[", b"{"):
                depth += 1
            elif mark in (b"]", b"}") and depth:
                depth -= 1
            elif mark in (b"]", b",") and not depth:
                value = held[start : token.start()]
                begins = begins if long else line + _blank_lines(value)
                line += value.count(b"\n")
                if value.strip() or long or mark == b",":
                    yield begins, None if long else value.strip()
                start, long = at, False
                if mark == b"]":
                    if held[at:].strip() or any(map(bytes.strip, chunks)):
                        raise BadInput("more than one JSON list")
                    return
        else:
            at = len(held)
        if len(held) - start > records.LONGEST:  # what was read of it is dropped
            begins = begins if long else line + _blank_lines(held[start:])
            text = held[at:]  # a string that continues after its quote
            if len(text) > records.LONGEST:
                odd = len(text) - len(text.rstrip(b"\\"))
                text = b'"' + b"\\" * (odd % 2)
            line += held.count(b"\n", start) - text.count(b"\n")
            held, start, at, long = text, 0, 0, True
    raise BadInput("the list does not end")


def _blank_lines(value: bytes) -> int:
    return value.count(b"\n", 0, len(value) - len(value.lstrip()))


class _Behind:
    """A file whose first line was read already."""

    def __init__(self, first: bytes, file: File):
        self._first, self._file = first, file

    def readline(self, size: int | None = -1) -> bytes:
        """The next line of the file, the first one as it was read already."""
        first, self._first = self._first, b""
        return first or self._file.readline(-1 if size is None else size)

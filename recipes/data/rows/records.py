"""A row of a dataset that knows its place, and the rules for every kind of file."""

import gzip
import json
from typing import Any, NamedTuple
import zlib

from checkpoints_io.errors import BadInput

LONGEST = 2**24  # bytes of one row
DEEPEST, MOST = 64, 10**5  # lists within lists in one row, and lists in all
File = Any  # an open binary file; fsspec's only have the methods of one
Wanted = frozenset[str] | None  # columns; None: all
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns not of text
BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, OSError)  # what compressed files raise
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how its files begin


class Row(NamedTuple):
    """One record of a dataset."""

    where: str  # "pairs.jsonl:17", for messages
    fields: dict[str, object] | None  # the columns that are wanted, without those that hold null
    reason: str = ""  # why it has no fields
    unread: tuple[str, ...] = ()  # its other columns
    size: int = 0  # approximate bytes
    cells: bool = False  # its fields are cells of text, whatever they stand for


def from_json(where: str, text: bytes, wanted: Wanted) -> Row:
    """The row that a JSON text holds."""
    if len(text) > LONGEST:
        return too_long(where)
    try:
        value = parsed(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return _no_utf8(where, text)
    except ValueError as error:
        return Row(where, None, str(error))
    row = from_value(where, value, len(text), wanted)
    return row._replace(fields=without_nulls(row.fields)) if b"null" in text else row


def from_text(where: str, text: bytes) -> Row:
    """The row that contains this `text`."""
    if len(text) > LONGEST:
        return too_long(where)
    try:
        return Row(where, {"text": text.decode("utf-8-sig")}, size=len(text))
    except UnicodeDecodeError:
        return _no_utf8(where, text)


def from_value(where: str, value: object, size: int, wanted: Wanted) -> Row:
    """The row that is this object, if it is one."""
    if not isinstance(value, dict):
        return Row(where, None, "not a JSON object")
    unread = () if wanted is None else tuple(name for name in value if name not in wanted)
    if unread:
        value = {name: field for name, field in value.items() if name not in unread}
    if not _is_flat(value):
        return Row(where, None, f"nested deeper than {DEEPEST} lists")
    return Row(where, value, unread=unread, size=size)


def parsed(text: str) -> object:
    """The value of a JSON text.

    Raises:
      ValueError: it is not JSON, names a key twice, or holds too many lists.
    """
    if text.count("[") + text.count("{") > MOST:
        raise BadInput(f"more than {MOST} lists")
    try:
        return DECODER.decode(text)
    except _Twice as error:
        raise BadInput(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadInput("not valid JSON") from error


def without_nulls(value: object) -> Any:
    """A value without the keys of objects that hold null.

    Arrow gives all objects of a column the same keys, and fills in nulls. Its files cannot tell
    whether a null was written or filled in, so it makes no difference in any kind of file.
    """
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    return [without_nulls(x) for x in value] if isinstance(value, list) else value


def distinct(names: list[str]) -> list[str]:
    """The names of columns, which must differ.

    Raises:
      ValueError: a name occurs twice.
    """
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadInput(f"several columns are named {min(twice)!r}")
    return names


def too_long(where: str) -> Row:
    """A row that is not read because of its size."""
    return Row(where, None, f"longer than {LONGEST >> 20} MiB")


def _no_utf8(where: str, text: bytes) -> Row:
    utf16 = text.startswith(UTF16)
    return Row(where, None, "UTF-16: save it as UTF-8" if utf16 else "not valid UTF-8")


def torn(where: str, error: Exception) -> Row:
    """The row that stands for the unreadable rest of a file."""
    told = str(error).strip().splitlines() or [type(error).__name__]
    return Row(where, None, f"the file cannot be read from here on: {told[0][:200]}")


class _Twice(BadInput):
    """A key that an object names twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice("a key that occurs twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would build one a row


def _is_flat(value: dict) -> bool:
    """Whether a value is nested no deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [x.values() if isinstance(x, dict) else x for x in level]
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return True
    return False

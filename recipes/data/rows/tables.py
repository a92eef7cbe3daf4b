"""Reads rows of Parquet and Arrow files as the JSON they stand for, a few in memory at a time."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from checkpoints_io.errors import BadInput
from recipes.data.rows import records
from recipes.data.rows.records import File, Row, Wanted

AT_ONCE = 512  # rows in memory at most; fewer if they are very long
ROOM = 2**30  # bytes of a row group, unfolded
FAILURES = (OSError, ValueError, MemoryError, RecursionError, pyarrow.ArrowException)
# Converts a value that is not null; None: it is already what JSON would give.
Plain = Callable[[Any], object] | None
types: Any = pyarrow.types
compute: Any = pyarrow.compute
TEXT = (types.is_string, types.is_large_string, types.is_string_view)
BINARY = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)


def parquet(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Reads a table by row groups; compressed sizes say nothing about the size in memory."""
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = records.distinct(table.schema_arrow.names)
        read = [column for column in names if wanted is None or column in wanted]
        encoded = any("dictionary<" in str(table.schema_arrow.field(name).type) for name in read)
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).total_byte_size  # a column may not give it
            some = min(max(ROOM // max(size, 1), 8), AT_ONCE)
            if encoded:  # each batch comes with its group's whole dictionary
                some = max(some, table.metadata.row_group(group).num_rows // 16)
            for batch in table.iter_batches(some, row_groups=[group], columns=read):
                for start in range(0, len(batch), AT_ONCE):
                    yield from _rows(name, number + start, batch.slice(start, AT_ONCE), names)
                number += len(batch)
    except FAILURES as error:
        yield records.torn(f"{name}[{number}]", error)


def arrow(name: str, file: File, wanted: Wanted) -> Iterator[Row]:
    """Reads Arrow's own format: the stream that `datasets` saves, or a file with an index."""
    number = 0
    try:
        if file.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            for row in batch_rows(name, number, batch, wanted):
                yield row
                number += 1
    except FAILURES as error:
        yield records.torn(f"{name}[{number}]", error)


def batch_rows(name: str, first: int, batch: pyarrow.RecordBatch, wanted: Wanted) -> Iterator[Row]:
    """Rows of a table, of which the first has this number."""
    names = records.distinct(batch.schema.names)
    read = batch.select([c for c in names if wanted is None or c in wanted])
    try:
        read.validate(full=True)  # untrusted offsets may point anywhere
    except pyarrow.ArrowInvalid:  # find out which row is at fault
        if "dictionary<" in str(batch.schema):
            raise  # it may be all of them, and finding each would take long
        if len(batch) == 1:
            yield Row(f"{name}[{first}]", None, "a value that cannot be read")
            return
        half = len(batch) // 2
        yield from batch_rows(name, first, batch.slice(0, half), wanted)
        yield from batch_rows(name, first + half, batch.slice(half), wanted)
        return
    for start in range(0, len(read), AT_ONCE):
        yield from _rows(name, first + start, read.slice(start, AT_ONCE), names)


def _rows(name: str, first: int, batch: pyarrow.RecordBatch, columns: list[str]) -> Iterator[Row]:
    """Rows of a valid table, split in halves around an unreadable value, or if it is too large."""
    for i, field in enumerate(batch.schema):
        if field.name.lower() in records.MEDIA and "binary" in str(field.type):
            batch = batch.set_column(i, field.name, _holds(batch.column(i)))
    plain = {field.name: _plain(field.type, field.name) for field in batch.schema}
    size = sum(map(_unfolded, batch.columns))
    try:
        found = batch.to_pylist() if size <= records.LONGEST else None
        found = found and [_object(fields.items(), plain) for fields in found]
    except (ValueError, OverflowError, RecursionError, pyarrow.ArrowException):
        found, size = None, 0
    if found is not None:
        unread = tuple(column for column in columns if column not in batch.schema.names)
        for number, fields in enumerate(found, start=first):
            row = records.from_value(f"{name}[{number}]", fields, size // len(found), None)
            yield row._replace(unread=unread)
    elif len(batch) > 1:
        half = len(batch) // 2
        yield from _rows(name, first, batch.slice(0, half), columns)
        yield from _rows(name, first + half, batch.slice(half), columns)
    elif size:
        yield records.too_long(f"{name}[{first}]")
    else:
        yield Row(f"{name}[{first}]", None, "a value that cannot be read")


def _holds(array: pyarrow.Array) -> pyarrow.Array:
    """True for each value that holds something, else null, as images and audio are not read."""
    kind = array.type
    if _is_list(kind):
        some = compute.greater(compute.list_value_length(array), 0)
    elif types.is_struct(kind):  # as in `datasets`: its bytes, or its path
        some = functools.reduce(compute.or_, map(compute.is_valid, array.flatten()))
    else:
        some = array.is_valid()
    return compute.if_else(compute.fill_null(some, False), True, None)


def _plain(kind: pyarrow.DataType, column: str) -> Plain:
    """Converts a value of this type to what a JSON file would say.

    Raises:
      ValueError: JSON has no such type, or its size is not known in advance.
    """
    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name == "arrow.json":  # `datasets` writes columns of varying type so
            return lambda text: records.without_nulls(records.parsed(text))
        return _plain(kind.storage_type, column)
    if types.is_dictionary(kind):
        return _plain(kind.value_type, column)
    if types.is_struct(kind):
        inner = {kind.field(i).name: _plain(kind.field(i).type, column) for i in range(len(kind))}
        return lambda fields: _object(fields.items(), inner)
    if types.is_map(kind):
        by_value = _plain(kind.item_type, column)
        return lambda pairs: _object(pairs, dict.fromkeys(_keys(pairs), by_value))
    if _is_list(kind):
        each = _plain(kind.value_type, column)
        return each and (lambda values: [x if x is None else each(x) for x in values])
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return lambda time: time.isoformat()
    if types.is_decimal(kind):
        return int if kind.scale <= 0 else float
    if _is_binary(kind):
        return lambda text: text.decode("utf-8")
    if _is_text(kind) or _is_number(kind) or types.is_null(kind):
        return None
    raise BadInput(f"the column {column!r} holds {str(kind)[:40]}, which is not read")


def _object(pairs: Any, inner: dict[str, Plain]) -> dict[str, object]:
    """An object without nulls, those that Arrow filled in and others, as in `records.from_json`."""
    found = ((name, x, inner[name]) for name, x in pairs if x is not None)
    return {name: x if function is None else function(x) for name, x, function in found}


def _keys(pairs: list[tuple[Any, object]]) -> list[str]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys) or not all(isinstance(key, str) for key in keys):
        raise BadInput("keys of an object must be strings, each only once")
    return keys


def _unfolded(array: pyarrow.Array) -> int:
    """Bytes once expanded: a dictionary or view refers to a text of megabytes in a few bytes."""
    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _unfolded(array.storage)
    if types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return len(array) * (8 if _is_number(kind.value_type) else array.dictionary.nbytes + 1)
        at = array.indices.drop_null().to_numpy()
        return len(array) + int(_lengths(array.dictionary, at).sum())
    if _is_text(kind) or _is_binary(kind):
        at = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
        return len(array) + int(_lengths(array, at).sum())
    if types.is_struct(kind):
        return sum(map(_unfolded, array.flatten()))
    if types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        parts = (array.keys, array.items)
        return sum(_unfolded(part.slice(first, last - first)) for part in parts)
    if _is_list(kind):
        count = compute.sum(compute.list_value_length(array)).as_py() or 0
        return count if count > records.LONGEST else count + _unfolded(array.flatten())
    return array.nbytes


def _lengths(texts: pyarrow.Array, at: np.ndarray) -> np.ndarray:
    """The lengths in bytes of the texts at these indices, which must exist."""
    kind, at = texts.type, at.astype(np.int64) + texts.offset
    if not len(at):
        return at
    if types.is_fixed_size_binary(kind):
        return np.full(len(at), kind.byte_width)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return np.frombuffer(texts.buffers()[1], np.int32)[4 * at].astype(np.int64)
    large = types.is_large_string(kind) or types.is_large_binary(kind)
    offsets = np.frombuffer(texts.buffers()[1], np.int64 if large else np.int32)
    return (offsets[at + 1] - offsets[at]).astype(np.int64)


def _is_list(kind: pyarrow.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    return any(check(kind) for check in BINARY)


def _is_text(kind: pyarrow.DataType) -> bool:
    return any(check(kind) for check in TEXT)


def _is_number(kind: pyarrow.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)

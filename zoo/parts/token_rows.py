"""Converts a caller's tokens, lists or arrays of equal or different lengths, to rows of ids."""

from collections.abc import Iterator, Mapping, Sequence, Set
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from checkpoints_io.errors import BadInput

# One text, [T], or rows of one text each, [B, T]; the rows of a list may differ in length.
Tokens = Array | np.ndarray | Sequence[object]
Lengths = Array | np.ndarray | Sequence[object]  # [B]


class Rows(NamedTuple):
    """Token ids with one text per row."""

    ids: Int[Array, "B T"]
    lengths: Int[Array, " B"] | None  # unset: every row is full
    is_one_text: bool  # [T] was given


def read(tokens: Tokens, lengths: Lengths | None, vocabulary: int) -> Rows:
    """Converts tokens to rows of ids; under jit only shapes and dtypes are checked, not values.

    Raises:
      ValueError: they are not ids of this vocabulary, or `lengths` do not fit the rows.
    """
    refuse_others(tokens)
    if isinstance(tokens, Sequence) and len(set(counts := _counts(tokens))) > 1:
        if lengths is not None:
            raise BadInput(
                "the rows are lists, which have lengths of their own: leave `lengths` out"
            )
        tokens, lengths = _padded(tokens), counts
    array = tokens if isinstance(tokens, Array) else _as_numpy(tokens)
    if array.ndim not in (1, 2) or not array.size:
        raise BadInput(
            "tokens are the ids of one text, [T], or of several, [B, T], not of the shape "
            f"{list(array.shape)}"
        )
    ids = array if array.ndim == 2 else array[None]
    if lengths is not None:
        lengths = _checked(lengths, *ids.shape)
        of_numpy = isinstance(ids, np.ndarray) and isinstance(lengths, np.ndarray)
        # Padding after the end of a text need not be an id.
        real = np.arange(ids.shape[1]) < lengths[:, None]
        ids = np.where(real, ids, 0) if of_numpy else jnp.where(real, ids, 0)
        lengths = jnp.asarray(lengths)
    check_ids(ids, vocabulary)
    return Rows(jnp.asarray(ids).astype(jnp.int32), lengths, array.ndim == 1)


def cut(texts: Any, lengths: Lengths | None) -> list[np.ndarray]:
    """The ids of each text, without padding.

    Raises:
      ValueError: `lengths` do not fit the rows of an array.
    """
    if lengths is None:
        return [_as_numpy(text) for text in texts]
    rows = _as_numpy(texts)
    if rows.ndim != 2:
        raise BadInput("`lengths` say where the rows of an array [B, T] end: leave them out")
    ends = np.asarray(_checked(lengths, *rows.shape)).tolist()
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def check_several(texts: Any, what: str) -> None:
    """Refuses strings, or the ids of a single text, where several texts are expected.

    Raises:
      ValueError: they are not a list of lists of ids, or one of them is empty.
    """
    refuse_others(texts)
    if any(np.ndim(text) == 0 for text in texts):
        raise BadInput(f"{what} are lists of ids, and these are the ids of one: write [ids]")
    if not all(len(text) for text in texts):
        raise BadInput(f"{what} have at least one token each, and one of these is empty")
    if any(isinstance(text[0], Sequence) or np.ndim(text[0]) for text in texts):
        raise BadInput(f"{what} are lists of ids, and these are lists of such lists")


def refuse_others(tokens: object) -> None:
    """Refuses what holds no ids, or not by their places: text, dicts, generators.

    Raises:
      ValueError: it is such, or a row of it is.
    """
    rows = tokens if isinstance(tokens, Sequence) else ()
    kinds = {type(tokens), *map(type, rows)}
    if any(issubclass(kind, str | bytes) for kind in kinds):
        raise BadInput(f"tokens are ids, and {tokens!r:.60} is text: encode it with the tokenizer")
    for kind in kinds:
        if issubclass(kind, Mapping):
            raise BadInput(f'tokens are ids, and not a {kind.__name__}: give its ["input_ids"]')
        if issubclass(kind, Iterator):
            raise BadInput(f"tokens are lists of ids, and not a {kind.__name__}: give list() of it")


def as_given(
    x: Float[Array, "*L B T D"], lengths: Int[Array, " B"] | None, *, is_one_text: bool
) -> Float[Array, "..."]:
    """Sets results after the ends of texts to zero, and drops the B axis of a single text."""
    if lengths is not None:
        real = jnp.arange(x.shape[-2]) < lengths[:, None]
        x = jnp.where(real[..., None], x, 0)
    return x[..., 0, :, :] if is_one_text else x


def check_length(T: int, config: Any) -> None:
    """Refuses a text of T tokens that is too long to be computed as in the original model.

    Raises:
      ValueError: it is too long.
    """
    if (most := config.longest_text) and most < T:
        raise BadInput(f"a text of {T} tokens: this {config.model_type} reads at most {most} here")


def stop_ids(given: Any) -> tuple[int, ...]:
    """Converts stop ids, in any kind of list, to Python integers.

    Raises:
      ValueError: they are not ids.
    """
    try:
        listed = isinstance(given, Sequence | Set) or np.ndim(given) == 1
        ids = tuple(map(operator.index, given)) if listed else (-1,)
    except (TypeError, ValueError):
        ids = (-1,)
    if not all(0 <= i < 2**31 for i in ids):
        raise BadInput(f"stop_ids are ids in a list, like [2], and not {given!r:.60}")
    return ids


def check_ids(tokens: Array | np.ndarray, vocabulary: int) -> None:
    """Refuses ids that have no embedding; under jit values cannot be checked.

    Raises:
      ValueError: some id has no embedding.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise BadInput(f"tokens are ids, so integers, and these are {tokens.dtype}")
    if not np.size(tokens) or not _can_be_looked_at(tokens):
        return
    ids = np.asarray(tokens)
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise BadInput(
            f"token id {low} is below 0: rows that are padded need `lengths`, and labels are no ids"
        )
    if high >= vocabulary:
        raise BadInput(
            f"token id {high} is beyond the model's {vocabulary} ids: is this another model's "
            "tokenizer?"
        )


def _can_be_looked_at(x: Array | np.ndarray) -> bool:
    """Whether values can be read: not under jit, nor if other processes hold parts of the array."""
    return not isinstance(x, jax.core.Tracer) and (
        not isinstance(x, jax.Array) or x.is_fully_addressable
    )


def _as_numpy(tokens: object) -> np.ndarray:
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError) as error:
        raise BadInput(f"tokens cannot be read as an array of ids: {error}") from error
    # Of another order of bytes, or where numpy would make floats of them beside others.
    if array.dtype.kind == "u" and array.dtype.itemsize == 8:
        return np.minimum(array, np.uint64(2**62)).astype(np.int64)
    foreign = array.dtype.kind in "iu" and not array.dtype.isnative
    return array.astype(np.int64) if foreign else array


def _counts(tokens: Sequence[Any]) -> list[int]:
    """The number of tokens in each row; empty for a single text."""
    are_rows = all(isinstance(row, Sequence) or np.ndim(row) for row in tokens)
    return [len(row) for row in tokens] if are_rows else []


def _padded(rows: Sequence[object]) -> np.ndarray:
    arrays = [_as_numpy(row) for row in rows]
    if odd := [i for i, row in enumerate(arrays) if row.ndim != 1 or not row.size]:
        raise BadInput(f"row {odd[0]} is not a text of one token or more: {rows[odd[0]]!r:.60}")
    padded = np.zeros((len(rows), max(map(len, arrays))), np.result_type(*arrays))
    for into, row in zip(padded, arrays, strict=True):
        into[: len(row)] = row
    return padded


def _checked(lengths: Lengths, B: int, T: int) -> Array | np.ndarray:
    array = lengths if isinstance(lengths, Array) else _as_numpy(lengths)
    if array.shape != (B,) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise BadInput(
            f"lengths are {B} integers, one for each row, and not {array.dtype} of the shape "
            f"{list(array.shape)}"
        )
    if _can_be_looked_at(array):
        for row, length in enumerate(np.asarray(array).tolist()):
            if not 1 <= length <= T:
                raise BadInput(f"lengths: row {row} has {T} tokens, so 1 to {T}, not {length}")
    return array

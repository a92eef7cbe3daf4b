"""Token positions and attention masks: packing, causality, shared prompts, sliding windows."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Spans(NamedTuple):
    """The position of every token in its text, and the range of keys that it sees.

    Token t sees the keys s of its row with `first[t] <= s < last[t]`. A range must not be empty:
    padding sees itself. `lengths` are the full lengths of the texts, which some rotary embeddings
    need. Keys are counted in row order. If a row is split over devices, its tokens may be stored in
    another order: stripe i of I is stored at `order[i]`.
    """

    positions: Int[Array, "B T"]
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    lengths: Int[Array, "B T"]
    order: Int[Array, "B I"] | None = None


class Window(NamedTuple):
    """A sliding window: of the keys in its span, a token sees those less than `width` back.

    Distance is in positions; such keys need not be adjacent in storage: see
    `recipes/data/packed/streams.py`.
    """

    width: Int[Array, ""]
    queries: Int[Array, "B T"]  # positions of the tokens, or of the starts of their chunks
    keys: Int[Array, "B S"]


def causal(B: int, T: int, lengths: Int[Array, " B"] | None = None) -> Spans:
    """Causal spans of one text per row, of `lengths` or all T tokens: token t sees 0 to t."""
    steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    whole = jnp.full(B, T) if lengths is None else lengths
    whole = jnp.broadcast_to(whole[:, None].astype(jnp.int32), (B, T))
    return Spans(steps, jnp.zeros_like(steps), steps + 1, whole)


def last(positions: Int[Array, " B"]) -> Spans:
    """The spans of a decoding step: only the last token of each text, which sees all before it."""
    at = positions[:, None]
    return Spans(at, jnp.zeros_like(at), at + 1, at + 1)


def in_order(
    stored: Shaped[Array, "B S *each"], order: Int[Array, "B I"] | None
) -> Shaped[Array, "B S *each"]:
    """Puts per-token values of whole rows from stored order into row order."""
    if order is None:
        return stored
    striped = stored.reshape(*order.shape, -1)
    rows = jnp.arange(len(order))[:, None]
    # `order` is a permutation, so the transpose need not handle two stripes adding up.
    found = striped.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
    return found.reshape(stored.shape)


def seen(
    first: Int[Array, "*B T"],
    last: Int[Array, "*B T"],
    keys: Int[Array, " S"],
    window: Window | None = None,
) -> Bool[Array, "*B T S"]:
    """The attention mask: which of `keys`, counted from the start of the row, each token sees."""
    mask = (first[..., None] <= keys) & (keys < last[..., None])
    if window is not None:
        back = window.queries[..., None] - window.keys[..., None, :]
        mask &= back < window.width
    return mask

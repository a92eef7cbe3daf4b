"""Where tokens stand and what they see: packing, causality, a shared prompt, sliding windows."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Spans(NamedTuple):
    """Of every token in a row: its place in its text, and the run of keys it sees.

    Token t sees the keys s of its row with `first[t] <= s < last[t]`. A run must not be empty:
    padding sees itself. `lengths` are those of whole texts, which some rotary positions ask for.
    Keys are counted in the order of the row. Where devices share it, its tokens may be stored in
    another one: stripe i of I is where `order[i]` says.
    """

    positions: Int[Array, "B T"]
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    lengths: Int[Array, "B T"]
    order: Int[Array, "B I"] | None = None


class Window(NamedTuple):
    """Of the keys in its run, a token sees those that are less than `width` positions back.

    In stored order these need not be neighbours: see `recipes/data/packed/streams.py`.
    """

    width: Int[Array, ""]
    queries: Int[Array, "B T"]  # positions, of tokens or of where their chunks begin
    keys: Int[Array, "B S"]


def causal(B: int, T: int, lengths: Int[Array, " B"] | None = None) -> Spans:
    """Each row is one text, with its `lengths` or all of T: token t sees tokens 0 to t."""
    steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    whole = jnp.full(B, T) if lengths is None else lengths
    whole = jnp.broadcast_to(whole[:, None].astype(jnp.int32), (B, T))
    return Spans(steps, jnp.zeros_like(steps), steps + 1, whole)


def last(positions: Int[Array, " B"]) -> Spans:
    """Of each text its last token alone, with all tokens before it."""
    at = positions[:, None]
    return Spans(at, jnp.zeros_like(at), at + 1, at + 1)


def in_order(
    stored: Shaped[Array, "B S *each"], order: Int[Array, "B I"] | None
) -> Shaped[Array, "B S *each"]:
    """What is stored of the tokens of whole rows, as keys are counted."""
    if order is None:
        return stored
    striped = stored.reshape(*order.shape, -1)
    rows = jnp.arange(len(order))[:, None]
    # A permutation: its transpose need not expect that two stripes are added up.
    found = striped.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
    return found.reshape(stored.shape)


def seen(
    first: Int[Array, "*B T"],
    last: Int[Array, "*B T"],
    keys: Int[Array, " S"],
    window: Window | None = None,
) -> Bool[Array, "*B T S"]:
    """Which of `keys`, counted from the row's beginning, each token sees."""
    mask = (first[..., None] <= keys) & (keys < last[..., None])
    if window is not None:
        back = window.queries[..., None] - window.keys[..., None, :]
        mask &= back < window.width
    return mask

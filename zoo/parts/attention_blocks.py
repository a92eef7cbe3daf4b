"""Attention tile by tile, in plain XLA: only tiles that hold visible keys are computed.

Memory is linear in the length of a row, and so is time while texts are short: a row of packed texts
costs as much as its texts do. This runs on every platform.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.parts import last_step, layers, remat, spans

# Queries and keys per tile. On CPUs, 64 is faster than 32, 128 and 256.
BLOCK = 64
UNSEEN = -1e30  # a masked score; -inf would give 0 / 0 where a query sees no key of a tile

Row = Float[Array, "T K G H"]
Mixed = Float[Array, "T K G U"]
Tiles = Float[Array, "I K block H"]
QueryTiles = Float[Array, "I K G block H"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K U"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    window: spans.Window | None,
    sinks: Float[Array, " N"] | None,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N U"]:
    """The same as `attention.dense`, one row and one tile at a time.

    Source: https://arxiv.org/abs/2205.14135, Algorithms 1 and 4.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    extra = -T % BLOCK
    if extra or k.shape[1] % BLOCK:
        longer = lambda x: jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2))
        itself = jnp.broadcast_to(jnp.arange(T, T + extra, dtype=first.dtype), (B, extra))
        q, k, v = longer(q), longer(k), longer(v)
        first = jnp.concatenate([first, itself], 1)
        last = jnp.concatenate([last, itself + 1], 1)
        if window is not None:
            window = spans.Window(window.width, longer(window.queries), longer(window.keys))
    grouped = q.reshape(B, T + extra, K, N // K, H)
    heads = None if sinks is None else sinks.astype(jnp.float32).reshape(K, N // K)
    positions = None if window is None else (window.queries, window.keys)

    def row(parts: tuple) -> Mixed:
        *arrays, places = parts
        looking = None if window is None else spans.Window(window.width, *places)
        return _row(*arrays, looking, heads, scale, softcap)

    out = jax.lax.map(row, (grouped, k, v, first, last, positions))
    return out[:, :T].reshape(B, T, N, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _row(
    q: Row, k: Array, v: Array, first: Array, last: Array,
    window: spans.Window | None, sinks: Array | None, scale: float, softcap: float | None,
) -> Mixed:  # fmt: skip
    return _forward(q, k, v, first, last, window, sinks, scale, softcap)[0]


def _forward(
    q: Row, k: Array, v: Array, first: Array, last: Array,
    window: spans.Window | None, sinks: Array | None, scale: float, softcap: float | None,
) -> tuple:  # fmt: skip
    keys, values, key_places = _tiles(k), _tiles(v), _key_places(len(k), window)

    def of_queries(tile: tuple) -> tuple:
        q, places = tile

        def add(j: Array | int, sofar: tuple) -> tuple:
            top, total, mixed = sofar
            seen = _seen(places, key_places, j, window)
            scores = _scores(q, keys[j], seen, scale, softcap)
            higher = jnp.maximum(top, scores.max(-1))
            shares, shrunk = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            fresh = layers.dot("KGts,KsU->KGtU", shares.astype(v.dtype), values[j], jnp.float32)
            return higher, total * shrunk + shares.sum(-1), mixed * shrunk[..., None] + fresh

        none = jnp.zeros(q.shape[:-1], jnp.float32)
        # A sink acts as a first key that has a score but no value.
        begin = (none + UNSEEN, none) if sinks is None else (none + sinks[..., None], none + 1)
        begin = *begin, jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32)
        top, total, mixed = _over_tiles(places, key_places, window, add, begin)
        return mixed / total[..., None], top + jnp.log(total)

    out, logsum = jax.lax.map(of_queries, (_query_tiles(q), _query_places(first, last, window)))
    out = remat.as_attention(_as_row(out, q.dtype))
    logsum = remat.as_attention(logsum)
    return out, (q, k, v, first, last, window, sinks, out, logsum)


def _backward(scale: float, softcap: float | None, kept: tuple, gradient: Mixed) -> tuple:
    q, k, v, first, last, window, sinks, out, logsum = kept
    keys, values, key_places = _tiles(k), _tiles(v), _key_places(len(k), window)
    # Each query's output times its gradient: the term that the softmax gradient subtracts.
    common = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    common = jnp.moveaxis(_lanes(common), 1, -1)

    def of_queries(sums: tuple, tile: tuple) -> tuple:
        q, gradient, common, logsum, places = tile

        def add(j: Array | int, sofar: tuple) -> tuple:
            dq, dk, dv = sofar
            seen = _seen(places, key_places, j, window)
            scores = _scores(q, keys[j], seen, scale, softcap)
            shares = jnp.exp(scores - logsum[..., None])
            toward = layers.dot("KGtU,KsU->KGts", gradient, values[j], jnp.float32)
            moved = shares * (toward - common[..., None]) * scale
            if softcap:  # the derivative of tanh
                moved *= jnp.where(seen, 1 - (scores / softcap) ** 2, 0)
            moved = moved.astype(q.dtype)
            dv = dv.at[j].add(
                layers.dot("KGts,KGtU->KsU", shares.astype(q.dtype), gradient, jnp.float32)
            )
            dk = dk.at[j].add(layers.dot("KGts,KGtH->KsH", moved, q, jnp.float32))
            return dq + layers.dot("KGts,KsH->KGtH", moved, keys[j], jnp.float32), dk, dv

        begin = jnp.zeros(q.shape, jnp.float32), *sums
        dq, dk, dv = _over_tiles(places, key_places, window, add, begin)
        return (dk, dv), dq

    none = lambda x: jnp.zeros(x.shape, jnp.float32)
    places = _query_places(first, last, window)
    tiles = _query_tiles(q), _query_tiles(gradient), common, logsum, places
    (dk, dv), dq = jax.lax.scan(of_queries, (none(keys), none(values)), tiles)
    flat = lambda x, like: jnp.moveaxis(x, 2, 1).reshape(like.shape).astype(like.dtype)
    of_sinks = None
    if sinks is not None:
        of_sinks = -(jnp.exp(sinks[..., None] - logsum) * common).sum((0, -1))
    return _as_row(dq, q.dtype), flat(dk, k), flat(dv, v), None, None, None, of_sinks


_row.defvjp(_forward, _backward)


def _lanes(x: Array) -> Array:
    """Reshapes [T, ...] into blocks, [T / BLOCK, BLOCK, ...]."""
    return x.reshape(-1, BLOCK, *x.shape[1:])


def _tiles(x: Float[Array, "T K H"]) -> Tiles:
    return jnp.moveaxis(_lanes(x), 2, 1)


def _query_tiles(x: Row) -> QueryTiles:
    return jnp.moveaxis(_lanes(x), 1, 3)


def _as_row(x: QueryTiles, dtype: jax.typing.DTypeLike) -> Row:
    by_tile = jnp.moveaxis(x, 3, 1)
    return by_tile.reshape(-1, *by_tile.shape[2:]).astype(dtype)


class Places(NamedTuple):
    """The spans of a tile of queries, and their positions if there is a window."""

    first: Int[Array, "*I block"]
    last: Int[Array, "*I block"]
    positions: Int[Array, "*I block"] | None


def _query_places(first: Array, last: Array, window: spans.Window | None) -> Places:
    positions = None if window is None else _lanes(window.queries)
    return Places(_lanes(first), _lanes(last), positions)


def _key_places(S: int, window: spans.Window | None) -> tuple[Array, Array | None]:
    """The indices of each tile's keys in the row, and their positions in their texts."""
    return _lanes(jnp.arange(S)), None if window is None else _lanes(window.keys)


def _seen(
    places: Places, keys: tuple[Array, Array | None], j: Array | int, window: spans.Window | None
) -> Bool[Array, "t s"]:
    stored, positions = keys
    looking = None
    if window is not None:
        assert positions is not None and places.positions is not None
        looking = spans.Window(window.width, places.positions, positions[j])
    return spans.seen(places.first, places.last, stored[j], looking)


def _over_tiles(
    places: Places, keys: tuple, window: spans.Window | None, add: Callable, begin: tuple
) -> tuple:
    """Accumulates over the tiles of keys that any of these queries sees."""
    lowest = places.first.min() // BLOCK
    highest = (places.last.max() + BLOCK - 1) // BLOCK
    if window is None:
        return jax.lax.fori_loop(lowest, highest, add, begin)
    # A window can skip whole tiles anywhere within a span, not just at its ends.
    look = lambda j, sofar: jax.lax.cond(
        _seen(places, keys, j, window).any(), add, lambda _, sofar: sofar, j, sofar
    )
    return jax.lax.fori_loop(lowest, highest, look, begin)


def _scores(
    q: Float[Array, "K G t H"],
    k: Float[Array, "K s H"],
    seen: Bool[Array, "t s"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "K G t s"]:
    scores = layers.dot("KGtH,KsH->KGts", q, k, jnp.float32) * scale
    return jnp.where(seen, last_step.capped(scores, softcap), UNSEEN)

"""Attention tile by tile, in plain XLA: only tiles that hold visible keys are computed.

Memory grows with the length of a row and not with its square, and so does time, as long as texts
are short: a row of packed texts costs what its texts cost. Runs on every platform.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo import layers

# Queries and keys of a tile. On CPUs, 64 is faster than 32, 128 and 256.
BLOCK = 64
UNSEEN = -1e30  # a score; minus infinity would make 0 / 0 where a tile shows a query nothing

Row = Float[Array, "T K G H"]
Tiles = Float[Array, "I K block H"]
QueryTiles = Float[Array, "I K G block H"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """As `attention.dense`, row after row, each row tile after tile.

    Source: https://arxiv.org/abs/2205.14135, Algorithms 1 and 4.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    if extra := -T % BLOCK:
        longer = lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
        itself = jnp.broadcast_to(jnp.arange(T, T + extra, dtype=first.dtype), (B, extra))
        q, k, v = longer(q), longer(k), longer(v)
        first = jnp.concatenate([first, itself], 1)
        last = jnp.concatenate([last, itself + 1], 1)
    grouped = q.reshape(B, T + extra, K, N // K, H)
    row = lambda parts: _row(*parts, scale)
    out = jax.lax.map(row, (grouped, k, v, first, last))
    return out[:, :T].reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _row(q: Row, k: Array, v: Array, first: Array, last: Array, scale: float) -> Row:
    return _forward(q, k, v, first, last, scale)[0]


def _forward(q: Row, k: Array, v: Array, first: Array, last: Array, scale: float) -> tuple:
    keys, values = _tiles(k), _tiles(v)

    def of_queries(tile: tuple) -> tuple:
        q, first, last = tile

        def add(j: Array, sofar: tuple) -> tuple:
            top, total, mixed = sofar
            scores = _scores(q, keys[j], j, first, last, scale)
            higher = jnp.maximum(top, scores.max(-1))
            shares, shrunk = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            fresh = layers.dot("KGts,KsH->KGtH", shares.astype(v.dtype), values[j], jnp.float32)
            return higher, total * shrunk + shares.sum(-1), mixed * shrunk[..., None] + fresh

        none = jnp.zeros(q.shape[:-1], jnp.float32)
        begin = none + UNSEEN, none, jnp.zeros(q.shape, jnp.float32)
        top, total, mixed = jax.lax.fori_loop(*_seen_tiles(first, last), add, begin)
        return mixed / total[..., None], top + jnp.log(total)

    out, logsum = jax.lax.map(of_queries, (_query_tiles(q), _lanes(first), _lanes(last)))
    out = checkpoint_name(_as_row(out, q), "attention")
    logsum = checkpoint_name(logsum, "attention")
    return out, (q, k, v, first, last, out, logsum)


def _backward(scale: float, kept: tuple, gradient: Row) -> tuple:
    q, k, v, first, last, out, logsum = kept
    keys, values = _tiles(k), _tiles(v)
    # How much each query's output already agrees with its gradient: what softmax takes off.
    common = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    common = jnp.moveaxis(_lanes(common), 1, -1)

    def of_queries(sums: tuple, tile: tuple) -> tuple:
        q, gradient, common, logsum, first, last = tile

        def add(j: Array, sofar: tuple) -> tuple:
            dq, dk, dv = sofar
            scores = _scores(q, keys[j], j, first, last, scale)
            shares = jnp.exp(scores - logsum[..., None])
            toward = layers.dot("KGtH,KsH->KGts", gradient, values[j], jnp.float32)
            moved = (shares * (toward - common[..., None]) * scale).astype(q.dtype)
            dv = dv.at[j].add(
                layers.dot("KGts,KGtH->KsH", shares.astype(q.dtype), gradient, jnp.float32)
            )
            dk = dk.at[j].add(layers.dot("KGts,KGtH->KsH", moved, q, jnp.float32))
            return dq + layers.dot("KGts,KsH->KGtH", moved, keys[j], jnp.float32), dk, dv

        begin = jnp.zeros(q.shape, jnp.float32), *sums
        dq, dk, dv = jax.lax.fori_loop(*_seen_tiles(first, last), add, begin)
        return (dk, dv), dq

    none = jnp.zeros(keys.shape, jnp.float32)
    tiles = _query_tiles(q), _query_tiles(gradient), common, logsum, _lanes(first), _lanes(last)
    (dk, dv), dq = jax.lax.scan(of_queries, (none, none), tiles)
    flat = lambda x: jnp.moveaxis(x, 2, 1).reshape(k.shape).astype(k.dtype)
    return _as_row(dq, q), flat(dk), flat(dv), None, None


_row.defvjp(_forward, _backward)


def _lanes(x: Array) -> Array:
    """[T, ...] -> [T / BLOCK, BLOCK, ...]."""
    return x.reshape(-1, BLOCK, *x.shape[1:])


def _tiles(x: Float[Array, "T K H"]) -> Tiles:
    return jnp.moveaxis(_lanes(x), 2, 1)


def _query_tiles(x: Row) -> QueryTiles:
    return jnp.moveaxis(_lanes(x), 1, 3)


def _as_row(x: QueryTiles, like: Row) -> Row:
    return jnp.moveaxis(x, 3, 1).reshape(like.shape).astype(like.dtype)


def _seen_tiles(first: Int[Array, " t"], last: Int[Array, " t"]) -> tuple[Array, Array]:
    """From which tile of keys to which, the last not included."""
    return first.min() // BLOCK, (last.max() + BLOCK - 1) // BLOCK


def _scores(
    q: Float[Array, "K G t H"],
    k: Float[Array, "K s H"],
    j: Int[Array, ""],
    first: Int[Array, " t"],
    last: Int[Array, " t"],
    scale: float,
) -> Float[Array, "K G t s"]:
    s = j * BLOCK + jnp.arange(BLOCK)
    seen = (first[:, None] <= s) & (s < last[:, None])
    return jnp.where(seen, layers.dot("KGtH,KsH->KGts", q, k, jnp.float32) * scale, UNSEEN)

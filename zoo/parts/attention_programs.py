"""The bodies of the kernels in attention_triton.py, in Pallas' Triton dialect.

Each gets its inputs by name, and then the references to its outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.parts import dialect, last_step
from zoo.parts.dialect import Ref

UNSEEN = -1e30  # a masked score; -inf would give 0 / 0 where a query sees no key of a tile

Given = dict[str, Ref]  # the inputs, by name


class Tile(NamedTuple):
    """The queries and keys per program and step, its warps, and its pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class How(NamedTuple):
    """The compile-time settings of a kernel."""

    scale: float
    softcap: float | None
    interpret: bool


def mix(how: How, tile: Tile, given: Given, out: Ref, logsum: Ref) -> None:
    """Computes the output of a tile of queries of one head."""
    q = given["q"][...]

    def add(j: Array, sofar: tuple) -> tuple:
        top, total, mixed = sofar
        here = pl.ds(j * tile.keys, tile.keys)
        values = given["v"][here, :]
        scores = _scores(how, q, given["k"][here, :], _seen(given, slice(None), here, j, tile))
        higher = jnp.maximum(top, scores.max(1))
        shares, shrunk = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        fresh = dialect.product(shares.astype(values.dtype), values)
        return higher, total * shrunk + shares.sum(1), mixed * shrunk[:, None] + fresh

    none = jnp.zeros(tile.queries, jnp.float32)
    begin = none + UNSEEN, none
    if "sinks" in given:  # acts as a first key that has a score but no value
        begin = none + given["sinks"][0].astype(jnp.float32), none + 1
    begin = *begin, jnp.zeros((tile.queries, q.shape[1]), jnp.float32)
    top, total, mixed = _over_keys(given, tile, add, begin)
    out[...] = (mixed / total[:, None]).astype(out.dtype)
    logsum[...] = top + jnp.log(total)


def pull_queries(how: How, tile: Tile, given: Given, of_q: Ref) -> None:
    """Computes the gradient of a tile of queries of one head."""
    q, gradient, logsum, delta = (given[name][...] for name in ("q", "gradient", "logsum", "delta"))

    def add(j: Array, sofar: tuple) -> tuple:
        here = pl.ds(j * tile.keys, tile.keys)
        keys = given["k"][here, :]
        scores = _scores(how, q, keys, _seen(given, slice(None), here, j, tile))
        _, of_scores = _of_scores(how, scores, gradient, given["v"][here, :], logsum, delta)
        return (sofar[0] + dialect.product(of_scores.astype(keys.dtype), keys),)

    begin = (jnp.zeros(q.shape, jnp.float32),)
    of_q[...] = _over_keys(given, tile, add, begin)[0].astype(of_q.dtype)


def pull_keys(how: How, tile: Tile, given: Given, of_k: Ref, of_v: Ref) -> None:
    """Computes the gradients of a tile of keys and values, over all heads that share them."""
    keys, values = given["k"][...], given["v"][...]
    j = pl.program_id(0)

    def of_head(n: Array, sums: tuple) -> tuple:
        def add(i: Array, sums: tuple) -> tuple:
            of_k, of_v = sums
            here = pl.ds(i * tile.queries, tile.queries)
            q, gradient = given["q"][here, n, :], given["gradient"][here, n, :]
            logsum, delta = given["logsum"][n, here], given["delta"][n, here]
            scores = _scores(how, q, keys, _seen(given, here, slice(None), j, tile))
            shares, of_scores = _of_scores(how, scores, gradient, values, logsum, delta)
            of_v += dialect.product(shares.astype(q.dtype).T, gradient)
            return of_k + dialect.product(of_scores.astype(q.dtype).T, q), of_v

        seen = lambda i: _seen(given, pl.ds(i * tile.queries, tile.queries), slice(None), j, tile)
        return _over(given, given["begin"][0], given["end"][0], seen, add, sums)

    none = jnp.zeros(keys.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, given["q"].shape[1], of_head, (none, none))
    of_k[...], of_v[...] = (x.astype(keys.dtype) for x in sums)


def _scores(
    how: How, q: Float[Array, "t H"], k: Float[Array, "s H"], seen: Bool[Array, "t s"]
) -> Float[Array, "t s"]:
    return jnp.where(
        seen, last_step.capped(dialect.product(q, k.T) * how.scale, how.softcap), UNSEEN
    )


def _of_scores(
    how: How,
    scores: Float[Array, "t s"],
    gradient: Float[Array, "t H"],
    values: Float[Array, "s H"],
    logsum: Float[Array, " t"],
    delta: Float[Array, " t"],
) -> tuple[Float[Array, "t s"], Float[Array, "t s"]]:
    """The attention weights, and the gradient of the products of queries and keys."""
    shares = jnp.exp(scores - logsum[:, None])
    of_scores = shares * (dialect.product(gradient, values.T) - delta[:, None]) * how.scale
    if how.softcap:  # the derivative of tanh; masked keys have weight 0
        of_scores *= jnp.where(shares > 0, 1 - (scores / how.softcap) ** 2, 0)
    return shares, of_scores


def _seen(given: Given, queries: Ref, keys: Ref, j: Array, tile: Tile) -> Array:
    """The mask of the keys of tile j that each of the queries sees."""
    stored = j * tile.keys + jnp.arange(tile.keys)
    first, last = given["first"][queries], given["last"][queries]
    seen = (first[:, None] <= stored[None]) & (stored[None] < last[:, None])
    if "width" in given:
        back = given["at"][queries][:, None] - given["keys_at"][keys][None]
        seen &= back < given["width"][0]
    return seen


def _over_keys(given: Given, tile: Tile, add: Callable, begin: tuple) -> tuple:
    """Accumulates over the tiles of keys that any query of the program sees."""
    lowest = jnp.min(given["first"][...]) // tile.keys
    highest = (jnp.max(given["last"][...]) + tile.keys - 1) // tile.keys
    here = lambda j: pl.ds(j * tile.keys, tile.keys)
    seen = lambda j: _seen(given, slice(None), here(j), j, tile)
    return _over(given, lowest, highest, seen, add, begin)


def _over(
    given: Given, lowest: Array, highest: Array, seen: Callable, add: Callable, begin: tuple
) -> tuple:
    """Loops over tiles; a window can skip whole ones anywhere within a span."""
    if "width" not in given:
        return jax.lax.fori_loop(lowest, highest, add, begin)
    look = lambda i, sofar: jax.lax.cond(
        jnp.max(seen(i).astype(jnp.int32)) > 0, add, lambda _, sofar: sofar, i, sofar
    )
    return jax.lax.fori_loop(lowest, highest, look, begin)

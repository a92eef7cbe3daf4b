"""Attention on GPUs, in Pallas' Triton dialect: only tiles with visible keys are computed.

It supports spans, windows, soft caps and sinks, and allocates nothing of size T x S. For short
texts in long rows it does a fraction of the work of a kernel that takes a mask.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import attention_programs, remat, spans
from zoo.parts.attention_programs import How, Tile
from zoo.parts.dialect import Ref

Query = Float[Array, "B T N H"]
Key = Float[Array, "B S K H"]
Bound = Int[Array, "B T"]
Specs = Callable[[Array], pl.BlockSpec]  # of an array, by its shape
Places = tuple[Array, Array, Array]  # a window: its width, positions of queries, and of keys

LONGEST = 64  # the largest side of a tile: rows are padded to multiples of it


def attend(
    q: Query,
    k: Key,
    v: Key,
    first: Bound,
    last: Bound,
    window: spans.Window | None,
    sinks: Float[Array, " N"] | None,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Query:
    """The same as `attention.dense`. `interpret` runs it on any platform, slowly.

    Source: https://arxiv.org/abs/2307.08691, Algorithms 1 and 2, over a tile's own span of keys.
    """
    T, H = q.shape[1], q.shape[3]
    wide = pl.next_power_of_2(max(H, 16)) - H  # sizes that the dialect's products need
    short = lambda x: [(0, 0), (0, -x.shape[1] % LONGEST)] + [(0, 0)] * (x.ndim - 2)
    room = lambda x: jnp.pad(jnp.pad(x, [(0, 0)] * 3 + [(0, wide)]), short(x))
    # A padding query sees what the last one sees, and takes no gradient.
    again = lambda x: jnp.pad(x, short(x), mode="edge")
    places = None
    if window is not None:
        places = window.width, again(window.queries), again(window.keys)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)  # its gradient accumulates in float32
    how = How(scale, softcap, interpret)
    out = _attended(how, room(q), room(k), room(v), again(first), again(last), places, sinks)
    return out[:, :T, :, :H]


def _tile(x: Query, kernel: str) -> Tile:
    """The fastest tile on an H200 that also fits the 99 KiB of shared memory of smaller GPUs."""
    bytes_ = x.shape[3] * x.dtype.itemsize
    if bytes_ <= 256:
        return Tile(64, 64, 4, 3 if kernel == "mix" else 2)
    if bytes_ <= 512:
        return Tile(64 if kernel == "mix" else 32, 32, 4, 2)
    return Tile(32 if kernel == "mix" else 16, 16, 4, 1)  # heads of 512, not timed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attended(
    how: How, q: Query, k: Key, v: Key, first: Bound, last: Bound,
    places: Places | None, sinks: Array | None,
) -> Query:  # fmt: skip
    return _forward(how, q, k, v, first, last, places, sinks)[0]


def _forward(
    how: How, q: Query, k: Key, v: Key, first: Bound, last: Bound,
    places: Places | None, sinks: Array | None,
) -> tuple:  # fmt: skip
    B, T, N, _ = q.shape
    tile = _tile(q, "mix")
    own, whole, lines = _of_queries(tile.queries, N // k.shape[2])
    by_head = pl.BlockSpec((1,), lambda i, n, b: (n,))
    out, logsum = _called(
        attention_programs.mix, how, tile, (T // tile.queries, N, B),
        dict(q=(q, own), k=(k, whole), v=(v, whole), sinks=(sinks, by_head))
        | _bounds(first, last, places, tile.queries),
        [(q, own), (jax.ShapeDtypeStruct((B, N, T), jnp.float32), lines)],
    )  # fmt: skip
    out, logsum = remat.as_attention(out), remat.as_attention(logsum)
    return out, (q, k, v, first, last, places, sinks, out, logsum)


def _backward(how: How, kept: tuple, gradient: Query) -> tuple:
    q, k, v, first, last, places, sinks, out, logsum = kept
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    # Each query's output times its gradient: the term that the softmax gradient subtracts.
    delta = jnp.einsum("BTNH,BTNH->BNT", gradient, out, preferred_element_type=jnp.float32)
    tile = _tile(q, "pull_queries")
    own, whole, lines = _of_queries(tile.queries, N // K)
    (of_q,) = _called(
        attention_programs.pull_queries, how, tile, (T // tile.queries, N, B),
        dict(q=(q, own), k=(k, whole), v=(v, whole), gradient=(gradient, own),
             logsum=(logsum, lines), delta=(delta, lines))
        | _bounds(first, last, places, tile.queries),
        [(q, own)],
    )  # fmt: skip
    tile = _tile(q, "pull_keys")
    own = pl.BlockSpec((None, tile.keys, None, H), lambda j, h, b: (b, j, h, 0))
    group = pl.BlockSpec((None, T, N // K, H), lambda j, h, b: (b, 0, h, 0))
    lines = pl.BlockSpec((None, N // K, T), lambda j, h, b: (b, h, 0))
    reach = _reach(first, last, S, tile)
    of_tile = pl.BlockSpec((None, 1), lambda j, h, b: (b, j))
    of_k, of_v = _called(
        attention_programs.pull_keys, how, tile, (S // tile.keys, K, B),
        dict(q=(q, group), k=(k, own), v=(v, own), gradient=(gradient, group),
             logsum=(logsum, lines), delta=(delta, lines),
             begin=(reach[0], of_tile), end=(reach[1], of_tile))
        | _bounds(first, last, places, T, tile.keys),
        [(k, own), (v, own)],
    )  # fmt: skip
    of_sinks = None
    if sinks is not None:
        of_sinks = -(jnp.exp(sinks[:, None] - logsum) * delta).sum((0, 2))
    return of_q, of_k, of_v, None, None, None, of_sinks


_attended.defvjp(_forward, _backward)


def _reach(first: Bound, last: Bound, S: int, tile: Tile) -> tuple[Array, Array]:
    """For each tile of keys, the range of query tiles that may see it: [B, S / keys]."""
    B, T = first.shape
    by_tile = lambda x: x.reshape(B, T // tile.queries, tile.queries)
    j = jnp.arange(S // tile.keys)
    lowest = by_tile(first).min(-1, keepdims=True) // tile.keys
    highest = -(-by_tile(last).max(-1, keepdims=True) // tile.keys)
    sees = (lowest <= j) & (j < highest)
    i = jnp.arange(T // tile.queries)[:, None]
    return jnp.where(sees, i, T).min(1), jnp.where(sees, i + 1, 0).max(1)


def _of_queries(t: int, heads: int) -> tuple[Specs, Specs, Specs]:
    """Block specs for t queries of a head: the queries, all their keys, their statistics."""
    return (
        lambda x: pl.BlockSpec((None, t, None, x.shape[3]), lambda i, n, b: (b, i, n, 0)),
        lambda x: pl.BlockSpec(
            (None, x.shape[1], None, x.shape[3]), lambda i, n, b: (b, 0, n // heads, 0)
        ),
        lambda x: pl.BlockSpec((None, None, t), lambda i, n, b: (b, n, i)),
    )


def _bounds(
    first: Bound, last: Bound, places: Places | None, queries: int, keys: int | None = None
) -> dict[str, tuple]:
    """Block specs for the spans of a program's queries; it has all keys, or the given number."""
    row = pl.BlockSpec((None, queries), lambda i, n, b: (b, 0 if keys else i))
    given = dict(first=(first, row), last=(last, row))
    if places is not None:
        width, at, keys_at = places
        of_keys = pl.BlockSpec(
            (None, keys or keys_at.shape[1]), lambda i, n, b: (b, i if keys else 0)
        )
        given |= dict(
            width=(width.reshape(1), pl.BlockSpec((1,), lambda i, n, b: (0,))),
            at=(at, row),
            keys_at=(keys_at, of_keys),
        )
    return given


def _called(
    program: Callable, how: How, tile: Tile, grid: tuple[int, int, int],
    given: dict[str, tuple], made: list[tuple],
) -> tuple[Array, ...]:  # fmt: skip
    """Runs a kernel on arrays by name, each with its block spec; None entries are left out."""
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    spec = lambda x, seen: seen(x) if callable(seen) else seen

    def body(*refs: Ref) -> None:
        program(how, tile, dict(zip(given, refs, strict=False)), *refs[len(given) :])

    found = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec(*pair) for pair in given.values()],
        out_specs=[spec(*pair) for pair in made],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in made],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=how.interpret,
        name=f"attention_{program.__name__}",
    )(*[x for x, _ in given.values()])
    return tuple(found)

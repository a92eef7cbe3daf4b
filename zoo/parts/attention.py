"""Softmax attention over spans: one entry point, with a backend for each platform."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from checkpoints_io.errors import BadInput
from zoo.parts import (
    attention_blocks,
    attention_kernels,
    attention_triton,
    hf_config,
    last_step,
    layers,
    sharding,
    spans,
)

# (q, k, v, scale=, …) -> the output of each query; the mask is already bound.
Attend = Callable[..., Array]


def dense(
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
    """Reference attention with all T x S scores in memory, against which the others are tested."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = layers.dot("BTKGH,BSKH->BKGTS", grouped, k, out=jnp.float32) * scale
    scores = last_step.capped(scores, softcap)
    seen = spans.seen(first, last, jnp.arange(S), window)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if sinks is not None:  # one more key per head, with a score but no value
        sink = sinks.astype(jnp.float32).reshape(K, N // K, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], -1)
    shares = jax.nn.softmax(scores, axis=-1)[..., :S].astype(v.dtype)
    return layers.dot("BKGTS,BSKU->BTKGU", shares, v).reshape(B, T, N, -1)


BACKENDS: dict[str, Callable[..., Array]] = {
    "dense": dense,
    "blocks": attention_blocks.attend,
    "tokamax": attention_kernels.tokamax,
    "tokamax_chunked": attention_kernels.tokamax_chunked,
    "splash": attention_kernels.splash,
    "cudnn": attention_kernels.cudnn,
    "triton": attention_triton.attend,
}
# The default backend of each platform.
BY_PLATFORM = {"cpu": "blocks", "gpu": "triton", "tpu": "splash"}
# Kernels that need values as wide as keys.
KERNELS = {"tokamax", "tokamax_chunked", "splash", "cudnn", "triton"}
# Backends that name their outputs, so that `remat=attention` can keep them.
NAMES_WHAT_IT_MADE = {"blocks", "splash", "triton"}
# Features that a kernel lacks; if a model needs one, `blocks` replaces the platform's default.
CANNOT = {
    "tokamax": {"sinks", "softcap"},  # with a cap its Triton kernel has no backward pass
    "tokamax_chunked": {"sinks"},
    "splash": {"sinks"},
    "cudnn": {"sinks", "softcap", "float32"},
    "triton": {"float32"},  # works, but far too slowly
}


def default_backend() -> str:
    """The default backend of this platform."""
    return BY_PLATFORM.get(sharding.platform(), "dense")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K U"],
    where: spans.Spans,
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N U"]:
    """Grouped-query softmax attention: K key heads for N query heads; scores are in float32.

    `window` is the sliding window: how many positions a token sees, itself included. With `chunk`
    it is counted back from the start of the token's chunk of `chunk` positions: 1 means the chunk
    up to the token. Scores become `softcap * tanh(scores / softcap)`; `sinks` adds one score per
    head. `backend` is one of BACKENDS, by default that of the platform.

    Raises:
      ValueError: the backend is not available here, or cannot do what the model needs.
    """
    if backend is not None and backend not in BACKENDS:
        raise BadInput(f"attention={backend!r} is none of {', '.join(BACKENDS)}")
    backend = _chosen(backend, q, softcap, sinks)
    run = functools.partial(BACKENDS[backend], scale=scale, softcap=softcap)
    U, wide = v.shape[-1], max(q.shape[-1], v.shape[-1])
    if backend in KERNELS and q.shape[-1] != U:
        q, k, v = (_widened(x, wide) for x in (q, k, v))
    looking = None
    if window is not None:
        queries = where.positions // chunk * chunk if chunk else where.positions
        keys = spans.in_order(where.positions, where.order)
        looking = spans.Window(jnp.asarray(window, jnp.int32), queries, keys)
    axes = sharding.axes_here()
    if backend == "dense" or not axes:
        k, v = (spans.in_order(x, where.order) for x in (k, v))
        return run(q, k, v, where.first, where.last, looking, sinks)[..., :U]

    # XLA cannot partition a kernel or a loop over rows, so each device gets its rows and heads. Of
    # a row split over several devices it has its own queries and gathers all the keys, in row
    # order: kernels skip tiles of keys that no query of a tile sees.
    split = lambda letters, x: sharding.spec(letters, x.shape, axes)
    if split("K", k[0, 0, :, 0]) != split("N", q[0, 0, :, 0]):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    ours, theirs, rows = split("B T N H", q), split("B T K H", k), split("B T", where.first)
    of_window: PyTree = (jax.P(), rows, split("B S", where.first))
    window_split = None if looking is None else spans.Window(*of_window)
    heads = None if sinks is None else split("N", sinks)
    of_stripes = None if where.order is None else split("B I", where.order)

    def part(q: Array, k: Array, v: Array, order: Array | None, *more: PyTree) -> Array:
        k, v = (spans.in_order(sharding.joined(x, theirs, 1), order) for x in (k, v))
        return run(q, k, v, *more)

    return sharding.on_each_device(
        part, (ours, theirs, theirs, of_stripes, rows, rows, window_split, heads), ours
    )(q, k, v, where.order, where.first, where.last, looking, sinks)[..., :U]


def _widened(x: Float[Array, "B T N H"], H: int) -> Float[Array, "B T N wide"]:
    """Pads heads to width H with zeros, which change neither scores nor outputs."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, H - x.shape[-1])])


def backend_of(config: hf_config.Config, dtype: jax.typing.DTypeLike, asked: str | None) -> str:
    """The backend that a model of this config uses in `dtype`, at the recipe's row lengths.

    Raises:
      ValueError: the requested backend lacks a feature that the model needs.
    """
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = getattr(config, "attention_sinks", False)
    return _able(asked, softcap=bool(softcap), sinks=sinks, float32=dtype == jnp.float32)


def _able(asked: str | None, **needs: bool) -> str:
    backend = asked or default_backend()
    lacking = {name for name in CANNOT.get(backend, ()) if needs[name]}
    if lacking and asked:
        raise BadInput(
            f"attention={asked} cannot do {' and '.join(sorted(lacking))}, which this model needs "
            "here: use attention=blocks"
        )
    return "blocks" if lacking else backend


def _chosen(asked: str | None, q: Array, softcap: float | None, sinks: Array | None) -> str:
    float32 = q.dtype == jnp.float32
    backend = _able(asked, softcap=bool(softcap), sinks=sinks is not None, float32=float32)
    if backend == "splash" and q.shape[1] % (attention_kernels.LANES * sharding.parts_of_a_row()):
        return "blocks"  # splash tiles are a multiple of TPU lanes; so are the recipe's rows
    return backend

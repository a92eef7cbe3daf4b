"""Attention over key ranges: packing, causality and a shared prompt are two integers per token."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo import attention_blocks, attention_kernels, layers, sharding

# (q, k, v, scale=) -> what each query gathers; the keys it sees are bound already.
Attend = Callable[..., Array]


class KeyRange(NamedTuple):
    """Token t sees the keys s of its row with `first[t] <= s < last[t]`.

    A range must not be empty: padding sees itself.
    """

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]


def causal(B: int, T: int) -> KeyRange:
    """Each row is one text: token t sees tokens 0 to t."""
    steps = jnp.arange(T, dtype=jnp.int32)
    return KeyRange(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(steps + 1, (B, T)))


def dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """All scores at once, T x S of them a head: what the other backends are measured against."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = layers.dot("BTKGH,BSKH->BKGTS", grouped, k, out=jnp.float32) * scale
    s = jnp.arange(S)
    seen = (first[..., None] <= s) & (s < last[..., None])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return layers.dot("BKGTS,BSKH->BTKGH", shares, v).reshape(B, T, N, H)


BACKENDS: dict[str, Callable[..., Array]] = {
    "dense": dense,
    "blocks": attention_blocks.attend,
    "tokamax": attention_kernels.tokamax,
    "tokamax_chunked": attention_kernels.tokamax_chunked,
    "splash": attention_kernels.splash,
    "cudnn": attention_kernels.cudnn,
}
# What each platform runs unless told otherwise.
BY_PLATFORM = {"cpu": "blocks", "gpu": "tokamax", "tpu": "splash"}


def over(keys: KeyRange, backend: str | None) -> Attend:
    """`attend` with its keys bound, as a pytree: they may be traced."""
    return jax.tree_util.Partial(functools.partial(attend, backend=backend), keys=keys)


def default_backend() -> str:
    """The backend of this platform."""
    return BY_PLATFORM.get(sharding.platform(), "dense")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    keys: KeyRange,
    *,
    scale: float,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention; each key head serves N / K query heads. Scores and softmax in float32.

    `backend` is one of BACKENDS; by default that of the platform.

    Raises:
      ValueError: the backend cannot be had here.
    """
    backend = backend or default_backend()
    if q.shape[1] != k.shape[1]:
        backend = "dense"  # a few queries against many kept keys: there is no square to avoid
    if backend == "splash" and q.shape[1] % attention_kernels.LANES:
        backend = "blocks"  # its tiles are as wide as a TPU's lanes; the recipe's rows are whole
    mesh = jax.sharding.get_abstract_mesh()
    if backend == "dense" or mesh.empty:
        return BACKENDS[backend](q, k, v, *keys, scale)

    # XLA cannot split a kernel or a loop over rows: each device is given its rows and its heads.
    split = lambda axes, x: sharding.spec(axes, x.shape, mesh.shape)
    if split("K", k[0, 0, :, 0]) != split("N", q[0, 0, :, 0]):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    ours, theirs, rows = split("B T N H", q), split("B S K H", k), split("B T", keys.first)
    return jax.shard_map(
        lambda *arrays: BACKENDS[backend](*arrays, scale),
        in_specs=(ours, theirs, theirs, rows, rows),
        out_specs=ours,
        check_vma=False,
    )(q, k, v, *keys)

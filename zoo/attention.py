"""Attention over key ranges: packing, causality and a shared prompt are two integers per token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo import layers


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


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    keys: KeyRange,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention; each key head serves N / K query heads. Scores and softmax in float32."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = layers.dot("BTKGH,BSKH->BKGTS", grouped, k, out=jnp.float32) * scale
    s = jnp.arange(S)
    seen = (keys.first[..., None] <= s) & (s < keys.last[..., None])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return layers.dot("BKGTS,BSKH->BTKGH", shares, v).reshape(B, T, N, H)

"""Short causal convolutions of each channel, along paths; float32, and rounded once."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.parts import layers, mixing, paths, spans


def whole(
    where: spans.Spans,
    x: Float[Array, "B T Q"],
    taps: Float[Array, "Q W"],
    bias: Float[Array, " Q"] | None = None,
) -> tuple[Float[Array, "B T Q"], Float[Array, "B W Q"]]:
    """Every token and the W - 1 before it, the last tap its own; and the last W of a text."""
    path = paths.of(where)
    W, wide = taps.shape[-1], taps.astype(jnp.float32)
    moved = paths.in_time(x, path)
    mixed = moved.astype(jnp.float32) * wide[:, -1]
    for by in range(1, W):
        mixed += paths.back(moved, path, by).astype(jnp.float32) * wide[:, W - 1 - by]
    mixed = mixed if bias is None else layers.shifted(mixed, bias)
    # Of rows of one text, whose order in time is that of the row.
    places = where.lengths[:, :1] + jnp.arange(-W, 0)
    kept = jnp.take_along_axis(x, jnp.maximum(places, 0)[..., None], axis=1)
    kept = jnp.where((places >= 0)[..., None], kept, 0).astype(jnp.float32)
    return paths.stored(mixed.astype(x.dtype), path), kept


def step(
    state: Float[Array, "B W Q"],
    x: Float[Array, "B 1 Q"],
    taps: Float[Array, "Q W"],
    bias: Float[Array, " Q"] | None = None,
) -> tuple[Float[Array, "B 1 Q"], Float[Array, "B W Q"]]:
    """One more token of each row."""
    state = jnp.concatenate([state[:, 1:], x.astype(jnp.float32)], axis=1)
    mixed = layers.dot("BWQ,QW->BQ", state, taps.astype(jnp.float32))
    mixed = mixed if bias is None else layers.shifted(mixed, bias)
    return mixed.astype(x.dtype)[:, None], state


RULE = mixing.Recurrence(whole, step)

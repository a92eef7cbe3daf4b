"""Short causal depthwise convolutions along paths, in float32 and rounded once."""

from collections.abc import Mapping

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.parts import layers, mixing, paths, rope, spans

KEEPS = {"inputs": "L B W Q"}  # what a layer keeps in generation: the last inputs


def whole(
    where: spans.Spans,
    x: Float[Array, "B T Q"],
    taps: Float[Array, "Q W"],
    bias: Float[Array, " Q"] | None = None,
) -> tuple[Float[Array, "B T Q"], Float[Array, "B W Q"]]:
    """Convolves each token with the W - 1 before it; also returns the last W inputs of a text."""
    path = paths.of(where)
    W, wide = taps.shape[-1], taps.astype(jnp.float32)
    moved = paths.in_time(x, path)
    mixed = moved.astype(jnp.float32) * wide[:, -1]
    for by in range(1, W):
        mixed += paths.back(moved, path, by).astype(jnp.float32) * wide[:, W - 1 - by]
    mixed = mixed if bias is None else layers.shifted(mixed, bias)
    # For rows of one text, which are stored in order of time.
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
    """The output and new state for one more token of each row."""
    state = jnp.concatenate([state[:, 1:], x.astype(jnp.float32)], axis=1)
    mixed = layers.dot("BWQ,QW->BQ", state, taps.astype(jnp.float32))
    mixed = mixed if bias is None else layers.shifted(mixed, bias)
    return mixed.astype(x.dtype)[:, None], state


RULE = mixing.Recurrence(whole, step)


class Gated(nnx.Module):
    """A convolution between two gates, in place of attention, as in LFM2."""

    def __init__(self, sizes: Mapping[str, int], rngs: nnx.Rngs):
        self.into = layers.weight("L D J Q", sizes, rngs)  # gates before and after; values
        self.taps = layers.weight("L Q W", sizes, rngs)
        self.o = layers.weight("L Q D", sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        del turn  # taps know the order
        before, after, x = jnp.moveaxis(layers.einsum("BTD,DJQ->BTJQ", x, self.into), 2, 0)
        taps = self.taps[...].astype(x.dtype)
        mixed = after * mix.recur("inputs", RULE, before * x, taps)
        return layers.einsum("BTQ,QD->BTD", mixed, self.o)


# For `Gated`: our weight -> its HF name within a layer and the order of its axes there.
HF_WEIGHTS = {
    "mixer.into": ("conv.in_proj.weight",  "(J Q) D"),
    "mixer.taps": ("conv.conv.weight",     "Q () W"),
    "mixer.o":    ("conv.out_proj.weight", "D Q"),
}  # fmt: skip

"""A state space layer, Mamba-2 (https://arxiv.org/abs/2405.21060), from its projection on.

Agrees with the GraniteMoeHybridMambaLayer of
transformers/models/granitemoehybrid/modeling_granitemoehybrid.py; architectures differ in the names
of its sizes, in multipliers, and in whether there is a norm. X counts the heads, K the groups of
them that have B and C in common, W the taps, and Q the channels of x, B and C side by side.

A token decides how long a step of each head is, dt, and by it how much of the state Y x U is left:

  S = exp(-dt exp(decay_log)) S + B (dt x)^T;  out = S^T C + skip x

States and steps are worked out in float32.
"""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from zoo.parts import chunks, convolution, layers, mixing, spans

# What a layer keeps in generation: the last inputs of the convolution, and the state.
KEEPS = {"inputs": "L B W Q", "memory": "L B X Y U"}


def sizes_of(*, heads: int, width: int, groups: int, state: int, taps: int) -> dict[str, int]:
    """Axis letter -> size.

    Raises:
      ValueError: heads do not fall into such groups.
    """
    if heads % groups:
        raise BadInput(f"config.json: {heads} heads of Mamba do not fall into {groups} groups")
    channels = heads * width + 2 * groups * state
    return {"X": heads, "U": width, "Y": state, "W": taps, "Q": channels}


def projected(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of what is projected for a layer: gates, what the convolution takes, and steps."""
    return {**sizes, "Q": sizes["X"] * sizes["U"] + sizes["Q"] + sizes["X"]}


def whole(
    where: spans.Spans,
    c: Float[Array, "B T K Y"],
    b: Float[Array, "B T K Y"],
    x: Float[Array, "B T X U"],
    decay: Float[Array, "B T X"],
) -> tuple[Float[Array, "B T X U"], Float[Array, "B X Y U"]]:
    """What each token of whole rows reads, and the state at the end of a row that is one text."""
    c, b = (y.repeat(x.shape[2] // y.shape[2], axis=2) for y in (c, b))
    return chunks.whole(where, c, b, x, decay)


def step(
    state: Float[Array, "B X Y U"],
    c: Float[Array, "B 1 K Y"],
    b: Float[Array, "B 1 K Y"],
    x: Float[Array, "B 1 X U"],
    decay: Float[Array, "B 1 X"],
) -> tuple[Float[Array, "B 1 X U"], Float[Array, "B X Y U"]]:
    """One more token of each row."""
    c, b = (y[:, 0].repeat(x.shape[2] // y.shape[2], axis=1) for y in (c, b))
    state = state * jnp.exp(decay[:, 0])[..., None, None] + b[..., None] * x[:, 0, :, None]
    return layers.dot("BXYU,BXY->BXU", state, c)[:, None], state


RULE = mixing.Recurrence(whole, step)


class Mamba2(nnx.Module):
    """With a norm over the heads of each group, unless it has no `eps`; `shortest` bounds steps."""

    def __init__(
        self, sizes: Mapping[str, int], rngs: nnx.Rngs, *, eps: float | None, shortest: float = 0.0
    ):
        self.taps = layers.weight("L Q W", sizes, rngs)
        self.bias = layers.weight("L Q", sizes, rngs, nnx.initializers.zeros)
        self.step_bias = layers.weight("L X", sizes, rngs, nnx.initializers.ones)
        self.decay_log = layers.weight("L X", sizes, rngs, _log_of_rates)
        self.skip = layers.weight("L X", sizes, rngs, nnx.initializers.ones)
        if eps is not None:
            self.norm = layers.weight("L X U", sizes, rngs, nnx.initializers.ones)
        self.o = layers.weight("L X U D", sizes, rngs)
        self.eps, self.shortest = eps, shortest
        self.sizes = nnx.static(tuple(sizes[letter] for letter in "XUY"))

    def __call__(self, mix: mixing.Mix, given: Float[Array, "B T Q"]) -> Float[Array, "B T D"]:
        rows, dtype = given.shape[:2], given.dtype
        X, U, Y = self.sizes
        gate, mixed, dt = jnp.split(given, [X * U, given.shape[-1] - X], axis=-1)
        # Rounded as all weights are, and then wide.
        narrow = lambda w: w[...].astype(dtype)
        wide = lambda w: narrow(w).astype(jnp.float32)
        taps, bias = narrow(self.taps), narrow(self.bias)
        mixed = jax.nn.silu(mix.recur("inputs", convolution.RULE, mixed, taps, bias))
        x, both = jnp.split(mixed.astype(jnp.float32), [X * U], axis=-1)
        x = x.reshape(*rows, X, U)
        b, c = jnp.moveaxis(both.reshape(*rows, 2, -1, Y), 2, 0)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + wide(self.step_bias))
        dt = jnp.maximum(dt, self.shortest)
        decay = -jnp.exp(wide(self.decay_log)) * dt
        out = mix.recur("memory", RULE, c, b, x * dt[..., None], decay)
        out = (out + wide(self.skip)[:, None] * x).reshape(gate.shape)
        out = out * jax.nn.silu(gate.astype(jnp.float32))
        if self.eps is not None:
            unit = layers.unit(out.reshape(*rows, b.shape[2], -1), self.eps)
            out = layers.scaled(unit.reshape(gate.shape), self.norm[...].reshape(-1), 0.0, dtype)
        out = out.astype(dtype).reshape(x.shape)
        return layers.einsum("BTXU,XUD->BTD", out, self.o)


def _log_of_rates(
    key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> Float[Array, "..."]:
    """The logarithm of how fast a head forgets, as transformers begins it."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)

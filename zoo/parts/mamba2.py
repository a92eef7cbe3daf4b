"""The state-space layer Mamba-2 (https://arxiv.org/abs/2405.21060).

Agrees with the GraniteMoeHybridMambaLayer of
transformers/models/granitemoehybrid/modeling_granitemoehybrid.py; architectures differ in the names
of its sizes, in multipliers, and in whether there is a norm. X counts the heads, K the groups of
heads that share B and C, W the taps, and Q the concatenated channels of x, B and C.

Each token sets the time step dt of each head, and so how much of its state, Y x U, decays:

  S = exp(-dt exp(decay_log)) S + B (dt x)^T;  out = S^T C + skip x

States and steps are computed in float32.
"""

from collections.abc import Mapping
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from checkpoints_io.errors import BadInput
from zoo.parts import chunks, convolution, hf_config, layers, mixing, rope, spans

LINEAR = "linear_attention"  # what `layer_types` calls its layers
OLDER = {"mamba": LINEAR, "attention": hf_config.FULL}
HEADS = 128  # the default of a config.json
# What a layer keeps in generation: the last inputs of the convolution, and the state.
KEEPS = {"inputs": "L B W Q", "memory": "L B X Y U"}


def kinds(listed: object) -> object:
    """Translates old names of the kinds of layers in a config.json."""
    if not isinstance(listed, list):
        return listed
    return [OLDER.get(kind, kind) if isinstance(kind, str) else kind for kind in listed]


def read(hf: Mapping[str, object], inner: object) -> dict[str, object]:
    """Drops redundant keys from a config.json: the head width, and an unbounded step limit.

    Raises:
      ValueError: heads of this width do not add up to `inner`.
    """
    rest = dict(hf)
    width, heads = rest.pop("mamba_d_head", None), rest.get("mamba_n_heads", HEADS)
    is_told = isinstance(width, int) and isinstance(heads, int) and isinstance(inner, int)
    if width not in (None, "auto") and not (is_told and width * heads == inner):
        raise BadInput(
            f"config.json: {heads} heads of Mamba (mamba_n_heads), each {width} wide "
            f"(mamba_d_head), are not {inner} wide"
        )
    if rest.get("time_step_limit") in ([0, math.inf], [0, {"__float__": "Infinity"}]):
        del rest["time_step_limit"]
    return rest


def sizes_of(*, inner: int, heads: int, groups: int, state: int, taps: int) -> dict[str, int]:
    """The size of every axis, by its letter; `inner` is the width of all heads together.

    Raises:
      ValueError: `inner` does not divide into these heads, or the heads into these groups.
    """
    if inner % heads or heads % groups:
        raise BadInput(
            f"config.json: a Mamba layer {inner} wide cannot have {heads} heads in {groups} groups"
        )
    channels = inner + 2 * groups * state
    return {"X": heads, "U": inner // heads, "Y": state, "W": taps, "Q": channels}


def whole(
    where: spans.Spans,
    c: Float[Array, "B T K Y"],
    b: Float[Array, "B T K Y"],
    x: Float[Array, "B T X U"],
    decay: Float[Array, "B T X"],
) -> tuple[Float[Array, "B T X U"], Float[Array, "B X Y U"]]:
    """The output of each token of whole rows, and the final state if a row is one text."""
    c, b = (y.repeat(x.shape[2] // y.shape[2], axis=2) for y in (c, b))
    return chunks.whole(where, c, b, x, decay)


def step(
    state: Float[Array, "B X Y U"],
    c: Float[Array, "B 1 K Y"],
    b: Float[Array, "B 1 K Y"],
    x: Float[Array, "B 1 X U"],
    decay: Float[Array, "B 1 X"],
) -> tuple[Float[Array, "B 1 X U"], Float[Array, "B X Y U"]]:
    """The output and new state for one more token of each row."""
    c, b = (y[:, 0].repeat(x.shape[2] // y.shape[2], axis=1) for y in (c, b))
    state = state * jnp.exp(decay[:, 0])[..., None, None] + b[..., None] * x[:, 0, :, None]
    return layers.dot("BXYU,BXY->BXU", state, c)[:, None], state


RULE = mixing.Recurrence(whole, step)


class Mamba2(nnx.Module):
    """A Mamba-2 layer, with a norm per group of heads if it has an `eps`; `shortest` bounds steps.

    `scales` multiply the projections: gates, x, B, C and steps.
    """

    def __init__(
        self, sizes: Mapping[str, int], rngs: nnx.Rngs, *,
        eps: float | None, shortest: float = 0.0, scales: tuple[float, ...] | None = None,
    ):  # fmt: skip
        X, U, Y, Q = (sizes[letter] for letter in "XUYQ")
        # Gates, inputs of the convolution, and steps, concatenated.
        self.into = layers.weight("L D Q", {**sizes, "Q": X * U + Q + X}, rngs)
        self.taps = layers.weight("L Q W", sizes, rngs)
        self.bias = layers.weight("L Q", sizes, rngs, nnx.initializers.zeros)
        self.step_bias = layers.weight("L X", sizes, rngs, nnx.initializers.ones)
        self.decay_log = layers.weight("L X", sizes, rngs, _log_of_rates)
        self.skip = layers.weight("L X", sizes, rngs, nnx.initializers.ones)
        if eps is not None:
            self.norm = layers.weight("L X U", sizes, rngs, nnx.initializers.ones)
        self.o = layers.weight("L X U D", sizes, rngs)
        self.eps, self.shortest, self.scales = eps, shortest, nnx.static(scales)
        self.sizes = nnx.static((X, U, Y, (Q - X * U) // 2))

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn | None = None
    ) -> Float[Array, "B T D"]:
        del turn  # a recurrent state needs no positions
        rows, dtype = x.shape[:2], x.dtype
        X, U, Y, shared = self.sizes
        given = layers.einsum("BTD,DQ->BTQ", x, self.into)
        if self.scales is not None:
            each = np.repeat(self.scales, (X * U, X * U, shared, shared, X))
            given = layers.multiplied(given, jnp.asarray(each, jnp.float32))
        gate, mixed, dt = jnp.split(given, [X * U, given.shape[-1] - X], axis=-1)
        # Rounded to the compute dtype like all weights, then widened.
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
    """The initial log decay rate of each head, as in transformers."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


# Our weight -> its HF name within a mixer and the order of its axes there.
HF_WEIGHTS = {
    "into":      ("in_proj.weight",  "Q D"),
    "taps":      ("conv1d.weight",   "Q () W"),
    "bias":      ("conv1d.bias",     "Q"),
    "step_bias": ("dt_bias",         "X"),
    "decay_log": ("A_log",           "X"),
    "skip":      ("D",               "X"),
    "norm":      ("norm.weight",     "(X U)"),
    "o":         ("out_proj.weight", "D (X U)"),
}  # fmt: skip


def named(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
    """The weight table of a mixer that has these names in its layer."""
    return {f"{ours}.{w}": (f"{theirs}.{name}", axes) for w, (name, axes) in HF_WEIGHTS.items()}

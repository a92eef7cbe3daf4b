"""A gated delta net, from its projected inputs to its output for the residual stream.

Agrees with the GatedDeltaNet of transformers/models/qwen3_5/modeling_qwen3_5.py; architectures
differ in how they pack its projections. In its layers N counts the value heads of width U, K the
key heads of width H, W the taps, and Q the concatenated channels of q, k and v.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.parts import convolution, delta_rule, layers, mixing

# What a layer keeps in generation: the last inputs of the convolution, and the state of the rule.
KEEPS = {"inputs": "L B W Q", "memory": "L B N H U"}


def sizes_of(config: Any) -> dict[str, int]:
    """The axis sizes of its layers, for a config whose keys begin with `linear_`."""
    K, H = config.linear_num_key_heads, config.linear_key_head_dim
    N, U = config.linear_num_value_heads, config.linear_value_head_dim
    own = {"N": N, "K": K, "H": H, "U": U, "Q": 2 * K * H + N * U}
    return own | {"W": config.linear_conv_kernel_dim}


class DeltaNet(nnx.Module):
    def __init__(self, sizes: Mapping[str, int], rngs: nnx.Rngs, *, eps: float):
        self.taps = layers.weight("L Q W", sizes, rngs)
        self.decay_bias = layers.weight("L N", sizes, rngs, nnx.initializers.ones)
        self.decay_log = layers.weight("L N", sizes, rngs, _log_of_rates)
        self.norm = layers.RmsNorm("L U", sizes, rngs, eps=eps)
        self.o = layers.weight("L N U D", sizes, rngs)
        self.heads = nnx.static((sizes["K"], sizes["H"]))

    def __call__(
        self,
        mix: mixing.Mix,
        qkv: Float[Array, "B T Q"],
        gate: Float[Array, "B T N U"],
        beta: Float[Array, "B T N"],
        decay: Float[Array, "B T N"],
    ) -> Float[Array, "B T D"]:
        *rows, N, U = gate.shape
        K, H = self.heads
        taps = self.taps[...].astype(qkv.dtype)
        qkv = jax.nn.silu(mix.recur("inputs", convolution.RULE, qkv, taps))
        q, k, v = jnp.split(qkv, [K * H, 2 * K * H], axis=-1)
        # Each key head serves N / K consecutive value heads.
        heads = lambda x: delta_rule.unit(x.reshape(*rows, K, H)).repeat(N // K, axis=-2)
        # Rounded to the compute dtype like all weights, then widened.
        bias, log = (
            x[...].astype(qkv.dtype).astype(jnp.float32) for x in (self.decay_bias, self.decay_log)
        )
        decay = -jnp.exp(log) * jax.nn.softplus(decay.astype(jnp.float32) + bias)
        given = heads(q), heads(k), v.reshape(*rows, N, U), decay, jax.nn.sigmoid(beta)
        mixed = mix.recur("memory", delta_rule.RULE, *given).astype(qkv.dtype)
        gated = self.norm(mixed) * jax.nn.silu(gate.astype(jnp.float32))
        return layers.einsum("BTNU,NUD->BTD", gated.astype(qkv.dtype), self.o)


def _log_of_rates(
    key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> Float[Array, "..."]:
    """The initial log decay rate of each head, as in transformers."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16))

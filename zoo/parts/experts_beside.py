"""Gemma 4's experts, parallel to an MLP and routed by the residual stream before its norm.

Agrees with Gemma4TextRouter in transformers/models/gemma4/modeling_gemma4.py.
"""

import functools
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from zoo.parts import experts, layers

OF_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")


def read(hf: dict[str, object]) -> dict[str, object]:
    """Reads the keys about experts of a config.json, if it has any experts.

    Raises:
      ValueError: some of these keys are missing.
    """
    if not hf.get("enable_moe_block"):
        return hf | dict.fromkeys(OF_EXPERTS)
    if lacks := [key for key in OF_EXPERTS if hf.get(key) is None]:
        raise BadInput(f"config.json lacks {lacks}, which experts beside the MLP need")
    return hf


class Experts(nnx.Module):
    def __init__(self, config: Any, sizes: dict[str, int], rngs: nnx.Rngs):
        sizes = sizes | {"F": config.moe_intermediate_size}
        ones = nnx.initializers.ones
        self.router = layers.weight("L D E", sizes, rngs)
        self.router_scale = layers.weight("L D", sizes, rngs, ones)
        self.share_scale = layers.weight("L E", sizes, rngs, ones)
        self.gate_up = layers.weight("L E J D F", sizes, rngs)
        self.down = layers.weight("L E F D", sizes, rngs)
        self.choice = experts.Choice(config.top_k_experts, to_one=True)
        self.eps = config.rms_norm_eps

    def __call__(
        self, x: Float[Array, "B T D"], before: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Applies the experts to `x`; the residual stream `before` routes the tokens."""
        unit = layers.unit(before, self.eps).astype(x.dtype) * self.router_scale[...].astype(
            x.dtype
        )
        unit = unit * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
        route = experts.chosen(experts.logits(unit, self.router), self.choice)
        scale = self.share_scale[...].astype(x.dtype).astype(jnp.float32)[route.experts]
        weights = {"gate_up": (self.gate_up[...], "E J D F"), "down": (self.down[...], "E F D")}
        return experts.mixed(x, route._replace(shares=route.shares * scale), weights, _expert)


_expert = functools.partial(experts.gated_together, bent=layers.gelu)

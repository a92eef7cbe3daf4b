"""Per-layer embeddings: a second embedding of the tokens, with a narrow slice for every layer.

Agrees with Gemma4TextModel in transformers/models/gemma4/modeling_gemma4.py.
"""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import layers


class Inputs(nnx.Module):
    """The table for all layers, and a projection of the initial residual stream."""

    def __init__(self, sizes: dict[str, int], rngs: nnx.Rngs, width: int, eps: float):
        wide = sizes | {"R": sizes["L"] * width}
        self.table = layers.weight("V R", wide, rngs)
        self.from_stream = layers.weight("D R", wide, rngs)
        self.norm = layers.RmsNorm("R", {"R": width}, rngs, eps=eps, wide=True)
        self.width = width

    def __call__(
        self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]
    ) -> Float[Array, "L B T R"]:
        apart = lambda wide: wide.reshape(*wide.shape[:2], -1, self.width)
        told = apart(layers.embed(self.table, tokens, x.dtype))
        told = told * jnp.asarray(self.width**0.5, x.dtype)
        made = layers.einsum("BTD,DR->BTR", x, self.from_stream)
        made = self.norm(apart(made * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)))
        return jnp.moveaxis((made + told) * jnp.asarray(2**-0.5, x.dtype), 2, 0)


class Added(nnx.Module):
    """A layer's use of its per-layer input, gated by the residual stream."""

    def __init__(self, sizes: dict[str, int], rngs: nnx.Rngs, width: int, eps: float):
        narrow = sizes | {"R": width}
        self.gate = layers.weight("L D R", narrow, rngs)
        self.up = layers.weight("L R D", narrow, rngs)
        self.norm = layers.RmsNorm("L D", sizes, rngs, eps=eps, wide=True)

    def __call__(
        self, x: Float[Array, "B T D"], own: Float[Array, "B T R"]
    ) -> Float[Array, "B T D"]:
        gated = layers.gelu(layers.einsum("BTD,DR->BTR", x, self.gate)) * own
        return self.norm(layers.einsum("BTR,RD->BTD", gated, self.up))


# Our weight -> its HF name and the order of its axes there; for `Added`, within a layer.
HF_WEIGHTS = {
    "per_layer.table": ("model.embed_tokens_per_layer.weight", "V R"),
    "per_layer.from_stream": ("model.per_layer_model_projection.weight", "R D"),
    "per_layer.norm.scale": ("model.per_layer_projection_norm.weight", "R"),
}
IN_LAYER = {
    "added.gate": ("per_layer_input_gate.weight", "R D"),
    "added.up": ("per_layer_projection.weight", "D R"),
    "added.norm.scale": ("post_per_layer_input_norm.weight", "D"),
}

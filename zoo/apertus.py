"""Apertus (https://arxiv.org/abs/2509.14233): an ungated MLP with the learned activation xIELU.

Agrees with transformers/models/apertus/modeling_apertus.py.
"""

import dataclasses
import math
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, layers, rope, rope_config, spans, stack

# The default of transformers, for files that omit it.
ROPE = {
    "rope_type": "llama3", "rope_theta": 12_000_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "apertus"
    architecture: ClassVar[str] = "ApertusForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "xielu", "attention_bias": False, "mlp_bias": False, "qk_norm": True,
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset({"post_norm"})  # transformers does not read it
    assumed: ClassVar[dict[str, object]] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the default rope where a file has none."""
        if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
            hf = hf | {"rope_parameters": ROPE}
        return rope_config.read(hf, theta=12_000_000.0)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.q_norm = layers.RmsNorm("L H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.k_norm = layers.RmsNorm("L H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q))
        k = self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k))
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Xielu(nnx.Module):
    """xIELU: a parabola above 0, an exponential plus a line below, with slopes learned per layer.

    Source: https://arxiv.org/abs/2411.13010.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        number = lambda value: layers.weight(
            "L", config.sizes, rngs, nnx.initializers.constant(value)
        )
        self.alpha_p = number(math.log(math.expm1(0.8)))
        self.alpha_n = number(math.log(math.expm1(0.3)))
        self.beta, self.eps = number(0.5), number(-1e-6)  # constants

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        # In float32 a product of two narrow numbers is exact, and gradients to a scalar add up.
        narrow = lambda y: y.astype(x.dtype).astype(jnp.float32)
        wide, of = x.astype(jnp.float32), lambda w: narrow(w[...])
        beta, eps = jax.lax.stop_gradient((of(self.beta), of(self.eps)))
        up = narrow(jax.nn.softplus(of(self.alpha_p)))
        down = narrow(beta + narrow(jax.nn.softplus(of(self.alpha_n))))
        above = narrow(narrow(up * wide) * wide)
        below = narrow(narrow(narrow(jnp.expm1(jnp.minimum(wide, eps))) - wide) * down)
        bent = jnp.where(wide > 0, above, below) + narrow(beta * wide)
        return bent.astype(x.dtype)


class Mlp(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up = layers.weight("L D F", config.sizes, rngs)
        self.act = Xielu(config, rngs)
        self.down = layers.weight("L F D", config.sizes, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        bent = self.act(layers.einsum("BTD,DF->BTF", x, self.up))
        return layers.einsum("BTF,FD->BTD", bent, self.down)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.attention_layernorm.weight",      "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.q_norm.weight",       "H"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.k_norm.weight",       "H"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.feedforward_layernorm.weight",    "D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.act.alpha_p":      ("model.layers.{L}.mlp.act_fn.alpha_p",              "()"),
    "blocks.mlp.act.alpha_n":      ("model.layers.{L}.mlp.act_fn.alpha_n",              "()"),
    "blocks.mlp.act.beta":         ("model.layers.{L}.mlp.act_fn.beta",                 ""),
    "blocks.mlp.act.eps":          ("model.layers.{L}.mlp.act_fn.eps",                  ""),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

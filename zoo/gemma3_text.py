"""Gemma 3 (https://arxiv.org/abs/2503.19786): a rope for each kind of layer.

Agrees with transformers/models/gemma3/modeling_gemma3.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    hf_config,
    last_step,
    layers,
    mlp,
    rope,
    rope_config,
    spans,
    stack,
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.TwoRopes
    query_pre_attn_scalar: int
    sliding_window: int | None
    layer_types: tuple[str, ...]
    final_logit_softcapping: float | None

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,  # transformers has the key but does not use it
        "use_bidirectional_attention": False,
    }
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256,
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
    }  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds a rope for each kind of layer; every sixth layer has full attention."""
        hf = rope_config.read_two(hf, theta=1_000_000.0, sliding_theta=10_000.0)
        hf.pop("_sliding_window_pattern", None)  # transformers writes it but reads the other key
        return hf_config.every(hf, hf.pop("sliding_window_pattern", None) or 6)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, offset=1.0, wide=True)
        self.q_norm = norm("L H", config.sizes, rngs)
        self.k_norm = norm("L H", config.sizes, rngs)
        self.scale = config.query_pre_attn_scalar**-0.5

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        own: tuple[Int[Array, ""], Int[Array, ""] | None],
    ) -> Float[Array, "B T D"]:
        which, window = own
        turn = rope.of_layer(turns, which)
        q = self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q))
        k = self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k))
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale, window=window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, offset=1.0, wide=True)
        self.attention_norm = norm("L D", config.sizes, rngs)
        self.attention = Attention(config, rngs)
        self.after_attention_norm = norm("L D", config.sizes, rngs)
        self.mlp_norm = norm("L D", config.sizes, rngs)
        self.mlp = mlp.GatedMlp(config.sizes, rngs, layers.gelu)
        self.after_mlp_norm = norm("L D", config.sizes, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        own: tuple[Int[Array, ""], Int[Array, ""] | None],
    ) -> Float[Array, "B T D"]:
        x = x + self.after_attention_norm(
            self.attention(self.attention_norm(x), attend, turns, own)
        )
        return x + self.after_mlp_norm(self.mlp(self.mlp_norm(x)))


class Model(causal_lm.CausalLM):
    Block = Block

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, which multiplies by its scale in float32."""
        eps = config.rms_norm_eps
        return layers.RmsNorm("D", config.sizes, rngs, eps=eps, offset=1.0, wide=True)

    def last_step(self) -> last_step.LastStep:
        """The soft cap of the logits."""
        return last_step.LastStep(softcap=self.config.final_logit_softcapping)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        ropes, width = self.config.rope_parameters, self.config.head_dim
        turns = rope.either(
            rope.turn(ropes.full_attention, width, where),
            rope.turn(ropes.sliding_attention, width, where),
        )
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        each = (hf_config.sliding(self.config), hf_config.windows(self.config))
        return self.norm(run(self, x, where, turns, each=each))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.q_norm.weight",       "H"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.k_norm.weight",       "H"),
    "blocks.after_attention_norm.scale": ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.pre_feedforward_layernorm.weight", "D"),
    "blocks.after_mlp_norm.scale": ("model.layers.{L}.post_feedforward_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

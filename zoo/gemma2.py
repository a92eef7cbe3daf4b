"""Gemma 2 (https://arxiv.org/abs/2408.00118): soft caps, sliding windows, pre- and post-norms.

Agrees with transformers/models/gemma2/modeling_gemma2.py.
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

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
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
    query_pre_attn_scalar: int
    sliding_window: int | None
    layer_types: tuple[str, ...]
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
    }
    # Old files also have these; `hidden_activation` and `sliding_window` take precedence.
    ignored: ClassVar[frozenset[str]] = frozenset({"hidden_act", "sliding_window_size"})
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer: every second one has full attention."""
        return hf_config.every(rope_config.read(hf), 2)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turn: rope.Turn,
        window: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale, window=window, softcap=self.softcap)
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
        turn: rope.Turn,
        window: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "B T D"]:
        x = x + self.after_attention_norm(
            self.attention(self.attention_norm(x), attend, turn, window)
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
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return self.norm(run(self, x, where, turn, each=hf_config.windows(self.config)))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.after_attention_norm.scale": ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.pre_feedforward_layernorm.weight", "D"),
    "blocks.after_mlp_norm.scale": ("model.layers.{L}.post_feedforward_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

"""Granite 3 (https://arxiv.org/abs/2505.08699): a Llama with four multipliers.

Agrees with transformers/models/granite/modeling_granite.py.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, last_step, layers, mlp, rope, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "granite"
    architecture: ClassVar[str] = "GraniteForCausalLM"
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
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float  # a divisor of the logits

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
    }  # fmt: skip


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.scale = config.attention_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.GatedMlp(config.sizes, rngs)
        self.residual = config.residual_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        mixed = self.attention(self.attention_norm(x), attend, turn)
        x = x + layers.multiplied(mixed, self.residual)
        return x + layers.multiplied(self.mlp(self.mlp_norm(x)), self.residual)


class Model(causal_lm.CausalLM):
    Block = Block

    def last_step(self) -> last_step.LastStep:
        """The divisor of the logits."""
        return last_step.LastStep(scale=1 / self.config.logits_scaling)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = layers.multiplied(x, self.config.embedding_multiplier)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

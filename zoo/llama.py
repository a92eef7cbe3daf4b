"""Llama 2, 3 to 3.3; SmolLM 1, 2; TinyLlama (https://arxiv.org/abs/2307.09288, 2407.21783).

Agrees with transformers/models/llama/modeling_llama.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
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
    attention_bias: bool = False
    mlp_bias: bool = False

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu", "rope_interleaved": False}
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"is_llama_config"}
    )  # a marker for another library
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        bias = functools.partial(
            layers.weight, sizes=config.sizes, rngs=rngs, init=nnx.initializers.zeros
        )
        self.q_bias = bias("L N H") if config.attention_bias else None
        self.k_bias = bias("L K H") if config.attention_bias else None
        self.v_bias = bias("L K H") if config.attention_bias else None
        self.o_bias = bias("L D") if config.attention_bias else None
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = layers.shifted(layers.einsum("BTD,DNH->BTNH", x, self.q), self.q_bias)
        k = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.k), self.k_bias)
        v = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.v), self.v_bias)
        mixed = attend(rope.rotate(q, turn), rope.rotate(k, turn), v, scale=self.scale)
        return layers.shifted(layers.einsum("BTNH,NHD->BTD", mixed, self.o), self.o_bias)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.GatedMlp(config.sizes, rngs, biases=config.mlp_bias)

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
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_bias":     ("model.layers.{L}.self_attn.q_proj.bias",           "(N H)"),
    "blocks.attention.k_bias":     ("model.layers.{L}.self_attn.k_proj.bias",           "(K H)"),
    "blocks.attention.v_bias":     ("model.layers.{L}.self_attn.v_proj.bias",           "(K H)"),
    "blocks.attention.o_bias":     ("model.layers.{L}.self_attn.o_proj.bias",           "D"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "blocks.mlp.gate_bias":        ("model.layers.{L}.mlp.gate_proj.bias",              "F"),
    "blocks.mlp.up_bias":          ("model.layers.{L}.mlp.up_proj.bias",                "F"),
    "blocks.mlp.down_bias":        ("model.layers.{L}.mlp.down_proj.bias",              "D"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

"""StarCoder2 (https://arxiv.org/abs/2402.19173): biases everywhere, a sliding window per layer.

Agrees with transformers/models/starcoder2/modeling_starcoder2.py, without its dropout.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "starcoder2"
    architecture: ClassVar[str] = "Starcoder2ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_epsilon: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    sliding_window: int | None

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "gelu_pytorch_tanh", "use_bias": True, "norm_type": "layer_norm",
        "scale_attn_weights": True,
    }  # fmt: skip
    # Settings of StarCoder's own code; transformers reads none of them.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "mlp_type",
        "scale_attention_softmax_in_fp32",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "norm_epsilon": 1e-5, "num_key_value_heads": 2,
    }  # fmt: skip


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        zeros = nnx.initializers.zeros
        self.q_bias = layers.weight("L N H", config.sizes, rngs, zeros)
        self.k_bias = layers.weight("L K H", config.sizes, rngs, zeros)
        self.v_bias = layers.weight("L K H", config.sizes, rngs, zeros)
        self.o_bias = layers.weight("L D", config.sizes, rngs, zeros)
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = layers.shifted(layers.einsum("BTD,DNH->BTNH", x, self.q), self.q_bias)
        k = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.k), self.k_bias)
        v = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.v), self.v_bias)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale, window=self.window)
        return layers.shifted(layers.einsum("BTNH,NHD->BTD", mixed, self.o), self.o_bias)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.LayerNorm("L D", config.sizes, rngs, eps=config.norm_epsilon)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.Mlp(config.sizes, rngs, layers.gelu)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.LayerNorm:
        """The final norm, which has a bias."""
        return layers.LayerNorm("D", config.sizes, rngs, eps=config.norm_epsilon)

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
    "blocks.attention_norm.bias":  ("model.layers.{L}.input_layernorm.bias",            "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_bias":     ("model.layers.{L}.self_attn.q_proj.bias",           "(N H)"),
    "blocks.attention.k_bias":     ("model.layers.{L}.self_attn.k_proj.bias",           "(K H)"),
    "blocks.attention.v_bias":     ("model.layers.{L}.self_attn.v_proj.bias",           "(K H)"),
    "blocks.attention.o_bias":     ("model.layers.{L}.self_attn.o_proj.bias",           "D"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp_norm.bias":        ("model.layers.{L}.post_attention_layernorm.bias",   "D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.c_fc.weight",                 "F D"),
    "blocks.mlp.up_bias":          ("model.layers.{L}.mlp.c_fc.bias",                   "F"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.c_proj.weight",               "D F"),
    "blocks.mlp.down_bias":        ("model.layers.{L}.mlp.c_proj.bias",                 "D"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "norm.bias":                   ("model.norm.bias",                                  "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

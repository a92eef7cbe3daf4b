"""StableLM (https://arxiv.org/abs/2402.17834): partial rope, norms with biases.

Agrees with transformers/models/stablelm/modeling_stablelm.py, without its dropout. The larger
ones have attention in parallel with the MLP, and q and k norms with a scale per head.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "stablelm"
    architecture: ClassVar[str] = "StableLmForCausalLM"
    turns_a_part: ClassVar[bool] = True
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    use_qkv_bias: bool
    qk_layernorm: bool
    use_parallel_residual: bool

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu"}
    # Keys of Stability's own code; transformers reads the names above.
    ignored: ClassVar[frozenset[str]] = frozenset({"num_heads", "norm_eps"})
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "layer_norm_eps": 1e-5, "num_key_value_heads": 32,
        "use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False,
    }  # fmt: skip

    @property
    def head_dim(self) -> int:
        """The head width: all heads together are as wide as the model."""
        return hf_config.filling(self)

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the default rope, which covers a quarter of each head."""
        return rope_config.read({"partial_rotary_factor": 0.25} | hf, partial=True)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        bias = functools.partial(
            layers.weight, sizes=config.sizes, rngs=rngs, init=nnx.initializers.zeros
        )
        self.q_bias = bias("L N H") if config.use_qkv_bias else None
        self.k_bias = bias("L K H") if config.use_qkv_bias else None
        self.v_bias = bias("L K H") if config.use_qkv_bias else None
        norm = functools.partial(
            layers.LayerNorm, sizes=config.sizes, rngs=rngs, eps=config.layer_norm_eps, bias=False
        )
        self.q_norm = norm("L N H") if config.qk_layernorm else None
        self.k_norm = norm("L K H") if config.qk_layernorm else None
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = layers.shifted(layers.einsum("BTD,DNH->BTNH", x, self.q), self.q_bias)
        k = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.k), self.k_bias)
        v = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.v), self.v_bias)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.LayerNorm("L D", config.sizes, rngs, eps=config.layer_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = None if config.use_parallel_residual else norm()
        self.mlp = mlp.GatedMlp(config.sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        unit = self.attention_norm(x)
        mixed = self.attention(unit, attend, turn)
        if self.mlp_norm is None:
            return x + mixed + self.mlp(unit)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.LayerNorm:
        """The final norm, which has a bias."""
        return layers.LayerNorm("D", config.sizes, rngs, eps=config.layer_norm_eps)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name (per layer {L}, per head {N} or {K}) and the order of its axes there.
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
    "blocks.attention.q_norm.scale":
        ("model.layers.{L}.self_attn.q_layernorm.norms.{N}.weight", "H"),
    "blocks.attention.k_norm.scale":
        ("model.layers.{L}.self_attn.k_layernorm.norms.{K}.weight", "H"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp_norm.bias":        ("model.layers.{L}.post_attention_layernorm.bias",   "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "norm.bias":                   ("model.norm.bias",                                  "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

"""Qwen 1.5 and 2 MoE (https://qwenlm.github.io/blog/qwen-moe): a shared expert beside the others.

Agrees with transformers/models/qwen2_moe/modeling_qwen2_moe.py.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    experts,
    hf_config,
    layers,
    rope,
    rope_config,
    spans,
    stack,
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "qwen2_moe"
    architecture: ClassVar[str] = "Qwen2MoeForCausalLM"
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu",
        "qkv_bias": True,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
    }
    # Keys of dense layers and sliding windows, of which there are none.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "intermediate_size", "max_window_layers", "sliding_window",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_key_value_heads": 16,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
    }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"F": self.moe_intermediate_size, "E": self.num_experts}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Drops the list of layers that transformers writes, if all have full attention."""
        hf, kinds = rope_config.read(hf), hf.get("layer_types")
        if isinstance(kinds, list) and kinds.count(hf_config.FULL) == len(kinds):
            del hf["layer_types"]
        return hf


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
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = layers.shifted(layers.einsum("BTD,DNH->BTNH", x, self.q), self.q_bias)
        k = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.k), self.k_bias)
        v = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.v), self.v_bias)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        choice = experts.Choice(config.num_experts_per_tok, to_one=config.norm_topk_prob)
        self.mlp = experts.GatedExperts(config.sizes, rngs, choice)
        width = config.shared_expert_intermediate_size
        self.shared = experts.Shared(config.sizes | {"F": width}, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn)
        unit = self.mlp_norm(x)
        return x + (self.mlp(unit) + self.shared(unit))


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
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.router":           ("model.layers.{L}.mlp.gate.weight",                 "E D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.experts.{E}.gate_proj.weight", "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.experts.{E}.up_proj.weight",  "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.experts.{E}.down_proj.weight", "D F"),
    "blocks.shared.mlp.gate":      ("model.layers.{L}.mlp.shared_expert.gate_proj.weight", "F D"),
    "blocks.shared.mlp.up":        ("model.layers.{L}.mlp.shared_expert.up_proj.weight", "F D"),
    "blocks.shared.mlp.down":      ("model.layers.{L}.mlp.shared_expert.down_proj.weight", "D F"),
    "blocks.shared.share":         ("model.layers.{L}.mlp.shared_expert_gate.weight",   "() D"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

HF_PACKED = experts.IN_ONE_TENSOR

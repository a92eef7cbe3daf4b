"""Qwen 3 MoE (https://arxiv.org/abs/2505.09388).

Agrees with transformers/models/qwen3_moe/modeling_qwen3_moe.py.
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

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    sliding_window: int | None
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": 0,
        "qkv_bias": False,
        "use_qk_norm": True,
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"intermediate_size", "max_window_layers"}
    )  # keys of dense layers, of which there are none
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_key_value_heads": 4,
        "norm_topk_prob": False,
    }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"F": self.moe_intermediate_size, "E": self.num_experts}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Applies the switch of the window, and renames the key for the number of experts."""
        hf, slides = hf_config.switched(rope_config.read(hf), "use_sliding_window")
        if not slides:
            hf["sliding_window"] = None
        hf.setdefault("num_experts", hf.pop("num_local_experts", None))
        return hf

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return super().to_hf() | {"use_sliding_window": self.sliding_window is not None}


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.q_norm = layers.RmsNorm("L H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.k_norm = layers.RmsNorm("L H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q))
        k = self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k))
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale, window=self.window)
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
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.q_norm.weight",       "H"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.k_norm.weight",       "H"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.router":           ("model.layers.{L}.mlp.gate.weight",                 "E D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.experts.{E}.gate_proj.weight", "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.experts.{E}.up_proj.weight",  "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.experts.{E}.down_proj.weight", "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

HF_PACKED = experts.IN_ONE_TENSOR

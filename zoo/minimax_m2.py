"""MiniMax M2: experts in every layer, a sigmoid router with a correction, q/k norms over all heads.

Agrees with transformers/models/minimax_m2/modeling_minimax_m2.py.
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

    model_type: ClassVar[str] = "minimax_m2"
    architecture: ClassVar[str] = "MiniMaxM2ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of each expert
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    num_local_experts: int
    num_experts_per_tok: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "scoring_func": "sigmoid", "use_qk_norm": True,
        "qk_norm_type": "per_layer", "use_routing_bias": True, "shared_intermediate_size": 0,
        "attention_bias": False,
    }  # fmt: skip
    # Keys of multi-token prediction layers, which are not loaded.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"use_mtp", "num_mtp_modules", "mtp_transformer_layers"}
    )
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8, "vocab_size": 200064,
        "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
        "num_attention_heads": 48,
    }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"E": self.num_local_experts}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Renames the keys for the number of experts and the part of a head that rope covers."""
        rest = dict(hf)
        if (count := rest.pop("num_experts", None)) is not None:
            rest.setdefault("num_local_experts", count)
        turned, width = rest.pop("rotary_dim", None), hf.get("head_dim") or 128
        if isinstance(turned, int) and isinstance(width, int):
            rest.setdefault("partial_rotary_factor", turned / width)
        # Every layer has softmax attention; a list of other kinds is refused by the key's name.
        if isinstance(kinds := hf.get("attn_type_list"), list) and set(map(str, kinds)) == {"1"}:
            del rest["attn_type_list"]
        return rope_config.read(rest, theta=5e6, partial=True)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        # Over all heads together.
        self.q_norm = layers.RmsNorm("L N H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.k_norm = layers.RmsNorm("L K H", config.sizes, rngs, eps=config.rms_norm_eps)
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


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        choice = experts.Choice(config.num_experts_per_tok, to_one=True, scores=experts.sigmoid)
        self.mlp = experts.GatedExperts(config.sizes, rngs, choice, corrected=True)

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
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.q_norm.weight",       "(N H)"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.k_norm.weight",       "(K H)"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.router":    ("model.layers.{L}.block_sparse_moe.gate.weight",           "E D"),
    "blocks.mlp.correction": ("model.layers.{L}.block_sparse_moe.e_score_correction_bias", "E"),
    "blocks.mlp.gate":      ("model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight", "F D"),
    "blocks.mlp.up":        ("model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight", "F D"),
    "blocks.mlp.down":      ("model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight", "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

# The name of the router in transformers 5, and so in PEFT.
HF_NAMES = ((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),)

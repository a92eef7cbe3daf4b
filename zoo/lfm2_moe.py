"""LFM2 with experts (https://arxiv.org/abs/2511.23404): short gated convolutions, some attention.

Agrees with transformers/models/lfm2_moe/modeling_lfm2_moe.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    convolution,
    experts,
    hf_config,
    layers,
    mixing,
    mlp,
    pattern,
    rope,
    rope_config,
    spans,
    stack,
)

CONV, FULL = "conv", hf_config.FULL
DENSE = "_dense"  # the suffix of a kind whose layers have one MLP and no experts


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "lfm2_moe"
    architecture: ClassVar[str] = "Lfm2MoeForCausalLM"
    layers_may_be: ClassVar[frozenset[str]] = frozenset({CONV, FULL})
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    layer_types: tuple[str, ...]
    conv_L_cache: int  # taps of a convolution

    num_dense_layers: int | None  # which come first
    num_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "conv_bias": False, "use_expert_bias": True, "norm_topk_prob": True,
    }  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 7168,
        "moe_intermediate_size": 1792, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "norm_eps": 1e-5, "tie_word_embeddings": True,
        "conv_L_cache": 3, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.0,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by how it mixes tokens and whether it is dense."""
        first = self.num_dense_layers or 0
        return tuple(kind + DENSE * (i < first) for i, kind in enumerate(self.layer_types))

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter; a convolution has D channels."""
        own = {"J": 3, "Q": self.hidden_size, "W": self.conv_L_cache, "E": self.num_experts}
        return super().sizes | own

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Translates the spellings of older files."""
        hf = rope_config.read(hf, theta=1e6)
        if "tie_embedding" in hf:
            hf["tie_word_embeddings"] = hf.pop("tie_embedding")
        if hf.get("num_dense_layers") == 0:
            hf["num_dense_layers"] = None
        return hf

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return super().to_hf() | {"num_dense_layers": self.num_dense_layers or 0}


class Attention(nnx.Module):
    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        self.q_norm = layers.RmsNorm("L H", sizes, rngs, eps=config.norm_eps)
        self.k_norm = layers.RmsNorm("L H", sizes, rngs, eps=config.norm_eps)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q)), turn)
        k = rope.rotate(self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k)), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        self.mixer_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.norm_eps)
        if kind.startswith(CONV):
            self.mixer = convolution.Gated(sizes, rngs)
        else:
            self.mixer = Attention(config, sizes, rngs)
        self.mlp_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.norm_eps)
        if kind.endswith(DENSE):
            self.mlp = mlp.GatedMlp(sizes, rngs)
        else:
            choice = experts.Choice(
                config.num_experts_per_tok, to_one=True, scores=experts.sigmoid,
                scale=config.routed_scaling_factor, added=1e-6,
            )  # fmt: skip
            narrow = sizes | {"F": config.moe_intermediate_size}
            self.mlp = experts.GatedExperts(narrow, rngs, choice, corrected=True)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.mixer(self.mixer_norm(x), mix, turn)
        return x + self.mlp(self.mlp_norm(x))


KINDS = (CONV, FULL, CONV + DENSE, FULL + DENSE)


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in KINDS}
    keeps: ClassVar = {CONV: convolution.KEEPS, CONV + DENSE: convolution.KEEPS}

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, after the blocks."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.norm_eps)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "mixer_norm.scale": ("operator_norm.weight", "D"),
    "mlp_norm.scale":   ("ffn_norm.weight",      "D"),
}  # fmt: skip
MIXERS = {
    CONV: convolution.HF_WEIGHTS,
    FULL: {
        "mixer.q":            ("self_attn.q_proj.weight",      "(N H) D"),
        "mixer.k":            ("self_attn.k_proj.weight",      "(K H) D"),
        "mixer.v":            ("self_attn.v_proj.weight",      "(K H) D"),
        "mixer.o":            ("self_attn.out_proj.weight",    "D (N H)"),
        "mixer.q_norm.scale": ("self_attn.q_layernorm.weight", "H"),
        "mixer.k_norm.scale": ("self_attn.k_layernorm.weight", "H"),
    },
}  # fmt: skip
MLPS = {
    DENSE: {
        "mlp.gate": ("feed_forward.w1.weight", "F D"),
        "mlp.up":   ("feed_forward.w3.weight", "F D"),
        "mlp.down": ("feed_forward.w2.weight", "D F"),
    },
    "": {
        "mlp.router":     ("feed_forward.gate.weight",           "E D"),
        "mlp.correction": ("feed_forward.expert_bias",           "E"),
        "mlp.gate":       ("feed_forward.experts.{E}.w1.weight", "F D"),
        "mlp.up":         ("feed_forward.experts.{E}.w3.weight", "F D"),
        "mlp.down":       ("feed_forward.experts.{E}.w2.weight", "D F"),
    },
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.embedding_norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds({
        mixer + end: IN_EVERY_LAYER | MIXERS[mixer] | MLPS[end] for mixer in MIXERS for end in MLPS
    }),
}  # fmt: skip

# How transformers 5 stores the experts of a layer.
HF_PACKED = (
    ("feed_forward.experts.gate_up_proj",
     ("feed_forward.experts.{E}.w1.weight", "feed_forward.experts.{E}.w3.weight"), 2),
    ("feed_forward.experts.down_proj", ("feed_forward.experts.{E}.w2.weight",), 1),
)  # fmt: skip

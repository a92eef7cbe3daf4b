"""GLM 4.5 to 4.7: sigmoid routers with a correction, and a shared expert, after dense layers.

Agrees with transformers/models/glm4_moe/modeling_glm4_moe.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    dense_first,
    experts,
    hf_config,
    layers,
    mlp,
    pattern,
    rope,
    rope_config,
    spans,
    stack,
)
from zoo.parts.dense_first import DENSE, SPARSE


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "glm4_moe"
    architecture: ClassVar[str] = "Glm4MoeForCausalLM"
    turns_a_part: ClassVar[bool] = True
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    attention_bias: bool
    use_qk_norm: bool
    mlp_layer_types: tuple[str, ...]  # as `first_k_dense_replace` counts them
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu"}
    # Keys of multi-token prediction layers, which are not loaded.
    ignored: ClassVar[frozenset[str]] = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "attention_bias": False,
        "use_qk_norm": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "vocab_size": 151552,
        "hidden_size": 4096,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: dense, or with experts."""
        return self.mlp_layer_types

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer: experts are narrower than a dense MLP."""
        return super().sizes_of(kind) | dense_first.sizes_of(self, kind)

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer; rope covers half of each head."""
        hf = dense_first.read({"partial_rotary_factor": 0.5} | hf, first=1)
        return rope_config.read(hf, partial=True)

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return dense_first.written(super().to_hf())


class Attention(nnx.Module):
    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        if config.attention_bias:
            bias = functools.partial(
                layers.weight, sizes=sizes, rngs=rngs, init=nnx.initializers.zeros
            )
            self.q_bias, self.k_bias, self.v_bias = bias("L N H"), bias("L K H"), bias("L K H")
        if config.use_qk_norm:
            self.q_norm = layers.RmsNorm("L H", sizes, rngs, eps=config.rms_norm_eps)
            self.k_norm = layers.RmsNorm("L H", sizes, rngs, eps=config.rms_norm_eps)
        self.has_biases, self.has_norms = config.attention_bias, config.use_qk_norm
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = layers.einsum("BTD,DNH->BTNH", x, self.q)
        k = layers.einsum("BTD,DKH->BTKH", x, self.k)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        if self.has_biases:
            q, k = layers.shifted(q, self.q_bias), layers.shifted(k, self.k_bias)
            v = layers.shifted(v, self.v_bias)
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = lambda: layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, sizes, rngs)
        self.mlp_norm = norm()
        if kind == DENSE:
            self.mlp = mlp.GatedMlp(sizes, rngs)
        else:
            choice = dense_first.choice(config, experts.sigmoid)
            self.mlp = dense_first.WithShared(
                config, sizes, rngs, choice, corrected=True, wide_router=True
            )

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in (DENSE, SPARSE)}

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "attention_norm.scale":   ("input_layernorm.weight",          "D"),
    "attention.q":            ("self_attn.q_proj.weight",         "(N H) D"),
    "attention.k":            ("self_attn.k_proj.weight",         "(K H) D"),
    "attention.v":            ("self_attn.v_proj.weight",         "(K H) D"),
    "attention.o":            ("self_attn.o_proj.weight",         "D (N H)"),
    "attention.q_bias":       ("self_attn.q_proj.bias",           "(N H)"),
    "attention.k_bias":       ("self_attn.k_proj.bias",           "(K H)"),
    "attention.v_bias":       ("self_attn.v_proj.bias",           "(K H)"),
    "attention.q_norm.scale": ("self_attn.q_norm.weight",         "H"),
    "attention.k_norm.scale": ("self_attn.k_norm.weight",         "H"),
    "mlp_norm.scale":         ("post_attention_layernorm.weight", "D"),
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds(
        {kind: IN_EVERY_LAYER | dense_first.MLP_OF[kind] for kind in (DENSE, SPARSE)}
    ),
}

# The multi-token prediction layer comes after the last layer.
HF_OTHERS = (r"^model\.layers\.{L}\.",)

HF_PACKED = experts.IN_ONE_TENSOR

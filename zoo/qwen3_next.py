"""Qwen 3 Next: a gated delta net or attention, then experts beside a shared MLP.

Agrees with transformers/models/qwen3_next/modeling_qwen3_next.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    delta_net,
    experts,
    hf_config,
    layers,
    mixing,
    pattern,
    rope,
    rope_config,
    spans,
    stack,
)

LINEAR, FULL = "linear_attention", hf_config.FULL


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "qwen3_next"
    architecture: ClassVar[str] = "Qwen3NextForCausalLM"
    turns_a_part: ClassVar[bool] = True
    layers_may_be: ClassVar[frozenset[str]] = frozenset({LINEAR, FULL})
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
    layer_types: tuple[str, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset({"intermediate_size"})  # of dense layers
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936, "hidden_size": 2048,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 48, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "num_experts": 512, "num_experts_per_tok": 10,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by how it mixes tokens."""
        return self.layer_types

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        own = {"F": self.moe_intermediate_size, "E": self.num_experts, "J": 2}
        return super().sizes | own

    def sizes_of(self, kind: str) -> dict[str, int]:
        """Axis sizes per kind: a delta net has as many query as value heads, and fewer keys."""
        sizes = super().sizes_of(kind)
        return sizes | delta_net.sizes_of(self) if kind == LINEAR else sizes

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer: every fourth one is attention."""
        hf = rope_config.read({"partial_rotary_factor": 0.25} | hf, partial=True)
        return hf_config.every(hf, hf.pop("full_attention_interval", None) or 4, LINEAR)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = config.sizes_of(FULL)
        self.q = layers.weight("L D N J H", sizes, rngs)  # queries and gates
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, offset=1.0, wide=True)
        self.q_norm = norm("L H", sizes, rngs)
        self.k_norm = norm("L H", sizes, rngs)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q, gate = jnp.moveaxis(layers.einsum("BTD,DNJH->BTNJH", x, self.q), 3, 0)
        k = self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k))
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        q, k = rope.rotate(self.q_norm(q), turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale) * jax.nn.sigmoid(gate)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Linear(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = config.sizes_of(LINEAR)
        N, K, H, U = (sizes[letter] for letter in "NKHU")
        # Fused per key head: q, k, then v for each of its G value heads, then the gates.
        sides = {"G": N // K, "Q": 2 * (H + N // K * U)}
        self.qkv_gate = layers.weight("L D K Q", sizes | sides, rngs)
        self.beta_decay = layers.weight("L D K J G", sizes | sides, rngs)
        self.net = delta_net.DeltaNet(sizes, rngs, eps=config.rms_norm_eps)
        self.cut = nnx.static((H, 2 * H, 2 * H + N // K * U))
        self.heads = nnx.static((N, U))

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        del turn  # a recurrent state needs no positions
        both = layers.einsum("BTD,DKQ->BTKQ", x, self.qkv_gate)
        *qkv, gate = jnp.split(both, self.cut, axis=-1)
        flat = lambda y: y.reshape(*x.shape[:2], -1)
        qkv = jnp.concatenate([flat(y) for y in qkv], axis=-1)
        beta, decay = jnp.moveaxis(layers.einsum("BTD,DKJG->BTKJG", x, self.beta_decay), 3, 0)
        gate = gate.reshape(*x.shape[:2], *self.heads)
        return self.net(mix, qkv, gate, flat(beta), flat(decay))


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, offset=1.0, wide=True)
        self.mixer_norm = norm("L D", sizes, rngs)
        self.mixer = (Linear if kind == LINEAR else Attention)(config, rngs)
        self.mlp_norm = norm("L D", sizes, rngs)
        choice = experts.Choice(config.num_experts_per_tok, to_one=True)
        self.mlp = experts.GatedExperts(sizes, rngs, choice)
        width = config.shared_expert_intermediate_size
        self.shared = experts.Shared(sizes | {"F": width}, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.mixer(self.mixer_norm(x), mix, turn)
        unit = self.mlp_norm(x)
        return x + (self.mlp(unit) + self.shared(unit))


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in (LINEAR, FULL)}
    keeps: ClassVar = {LINEAR: delta_net.KEEPS}

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, whose scale is one plus the weight."""
        eps = config.rms_norm_eps
        return layers.RmsNorm("D", config.sizes, rngs, eps=eps, offset=1.0, wide=True)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "mixer_norm.scale": ("input_layernorm.weight",               "D"),
    "mlp_norm.scale":   ("post_attention_layernorm.weight",      "D"),
    "mlp.router":       ("mlp.gate.weight",                      "E D"),
    "mlp.gate":         ("mlp.experts.{E}.gate_proj.weight",     "F D"),
    "mlp.up":           ("mlp.experts.{E}.up_proj.weight",       "F D"),
    "mlp.down":         ("mlp.experts.{E}.down_proj.weight",     "D F"),
    "shared.mlp.gate":  ("mlp.shared_expert.gate_proj.weight",   "F D"),
    "shared.mlp.up":    ("mlp.shared_expert.up_proj.weight",     "F D"),
    "shared.mlp.down":  ("mlp.shared_expert.down_proj.weight",   "D F"),
    "shared.share":     ("mlp.shared_expert_gate.weight",        "() D"),
}  # fmt: skip
IN_LAYERS = {
    FULL: IN_EVERY_LAYER | {
        "mixer.q":            ("self_attn.q_proj.weight", "(N J H) D"),
        "mixer.k":            ("self_attn.k_proj.weight", "(K H) D"),
        "mixer.v":            ("self_attn.v_proj.weight", "(K H) D"),
        "mixer.o":            ("self_attn.o_proj.weight", "D (N H)"),
        "mixer.q_norm.scale": ("self_attn.q_norm.weight", "H"),
        "mixer.k_norm.scale": ("self_attn.k_norm.weight", "H"),
    },
    LINEAR: IN_EVERY_LAYER | {
        "mixer.qkv_gate":       ("linear_attn.in_proj_qkvz.weight", "(K Q) D"),
        "mixer.beta_decay":     ("linear_attn.in_proj_ba.weight",  "(K J G) D"),
        "mixer.net.taps":       ("linear_attn.conv1d.weight",      "Q () W"),
        "mixer.net.decay_bias": ("linear_attn.dt_bias",            "N"),
        "mixer.net.decay_log":  ("linear_attn.A_log",              "N"),
        "mixer.net.norm.scale": ("linear_attn.norm.weight",        "U"),
        "mixer.net.o":          ("linear_attn.out_proj.weight",    "D (N U)"),
    },
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds(IN_LAYERS),
}

# Multi-token prediction layers.
HF_OTHERS = (r"^mtp\.",)

HF_PACKED = experts.IN_ONE_TENSOR

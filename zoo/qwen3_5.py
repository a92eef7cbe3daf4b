"""Qwen 3.5, 3.6 and 3.8: three layers of a gated delta net, then one of gated attention.

Agrees with transformers/models/qwen3_5/modeling_qwen3_5.py.
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

LINEAR, FULL = "linear_attention", hf_config.FULL


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "qwen3_5_text"
    architecture: ClassVar[str] = "Qwen3_5ForCausalLM"
    turns_a_part: ClassVar[bool] = True
    layers_may_be: ClassVar[frozenset[str]] = frozenset({LINEAR, FULL})
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
    layer_types: tuple[str, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "attn_output_gate": True,
        "mamba_ssm_dtype": "float32", "output_gate_type": "swish",
    }  # fmt: skip
    # Keys of multi-token prediction layers, which are not loaded.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "language_model_only"}
    )
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 32, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by how it mixes tokens."""
        return self.layer_types

    def sizes_of(self, kind: str) -> dict[str, int]:
        """Axis sizes per kind: a delta net has as many query as value heads, and fewer keys."""
        sizes = super().sizes_of(kind) | {"J": 2}
        return sizes | delta_net.sizes_of(self) if kind == LINEAR else sizes

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer: every fourth one is attention."""
        hf = {"partial_rotary_factor": 0.25} | rope_config.of_text(hf)
        hf = rope_config.read(hf, partial=True)
        if hf.get("output_gate_type") == "silu":
            hf["output_gate_type"] = "swish"  # a synonym
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
        self.qkv = layers.weight("L D Q", sizes, rngs)
        self.gate = layers.weight("L D N U", sizes, rngs)
        self.beta = layers.weight("L D N", sizes, rngs)
        self.decay = layers.weight("L D N", sizes, rngs)
        self.net = delta_net.DeltaNet(sizes, rngs, eps=config.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        del turn  # a recurrent state needs no positions
        qkv = layers.einsum("BTD,DQ->BTQ", x, self.qkv)
        gate = layers.einsum("BTD,DNU->BTNU", x, self.gate)
        beta = layers.einsum("BTD,DN->BTN", x, self.beta)
        return self.net(mix, qkv, gate, beta, layers.einsum("BTD,DN->BTN", x, self.decay))


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, offset=1.0, wide=True)
        self.mixer_norm = norm("L D", sizes, rngs)
        self.mixer = (Linear if kind == LINEAR else Attention)(config, rngs)
        self.mlp_norm = norm("L D", sizes, rngs)
        self.mlp = mlp.GatedMlp(sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.mixer(self.mixer_norm(x), mix, turn)
        return x + self.mlp(self.mlp_norm(x))


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
    "mixer_norm.scale": ("input_layernorm.weight",          "D"),
    "mlp_norm.scale":   ("post_attention_layernorm.weight", "D"),
    "mlp.gate":         ("mlp.gate_proj.weight",            "F D"),
    "mlp.up":           ("mlp.up_proj.weight",              "F D"),
    "mlp.down":         ("mlp.down_proj.weight",            "D F"),
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
        "mixer.qkv":            ("linear_attn.in_proj_qkv.weight", "Q D"),
        "mixer.gate":           ("linear_attn.in_proj_z.weight",   "(N U) D"),
        "mixer.beta":           ("linear_attn.in_proj_b.weight",   "N D"),
        "mixer.decay":          ("linear_attn.in_proj_a.weight",   "N D"),
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

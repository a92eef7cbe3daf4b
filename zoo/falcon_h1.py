"""Falcon H1 (https://arxiv.org/abs/2507.22448): Mamba-2 beside attention in every layer.

Agrees with transformers/models/falcon_h1/modeling_falcon_h1.py.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import (
    attention,
    blocks,
    causal_lm,
    hf_config,
    last_step,
    layers,
    mamba2,
    mixing,
    rope,
    rope_config,
    spans,
    stack,
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "falcon_h1"
    architecture: ClassVar[str] = "FalconH1ForCausalLM"
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
    mamba_d_ssm: int
    mamba_n_heads: int
    mamba_n_groups: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_rms_norm: bool
    embedding_multiplier: float
    attention_in_multiplier: float
    key_multiplier: float
    attention_out_multiplier: float
    ssm_in_multiplier: float
    ssm_multipliers: tuple[float, ...]  # gates, x, B, C, steps
    ssm_out_multiplier: float
    mlp_multipliers: tuple[float, ...]  # before the gate's activation; after the MLP
    lm_head_multiplier: float

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "projectors_bias": False,
        "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_norm_before_gate": False,
    }  # fmt: skip
    # Keys of the training code, of generation, and of the chunk length in transformers.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "mamba_chunk_size", "mamba_use_mlp", "mlp_expansion_factor", "num_logits_to_keep",
        "time_step_floor", "time_step_max", "time_step_min", "time_step_rank",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "vocab_size": 128000,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_d_ssm": 1024,
        "mamba_n_heads": mamba2.HEADS, "mamba_n_groups": 1, "mamba_d_state": 256,
        "mamba_d_conv": 4, "mamba_rms_norm": False, "embedding_multiplier": 1.0,
        "attention_in_multiplier": 1.0, "key_multiplier": 1.0, "attention_out_multiplier": 1.0,
        "ssm_in_multiplier": 1.0, "ssm_multipliers": (1.0,) * 5, "ssm_out_multiplier": 1.0,
        "mlp_multipliers": (1.0, 1.0), "lm_head_multiplier": 1.0,
    }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | mamba2.sizes_of(
            inner=self.mamba_d_ssm, heads=self.mamba_n_heads, groups=self.mamba_n_groups,
            state=self.mamba_d_state, taps=self.mamba_d_conv,
        )  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the width of all Mamba heads, and the place of the gates only if there is a norm."""
        hf, expand, width = dict(hf), hf.get("mamba_expand") or 2, hf.get("hidden_size")
        hf.pop("mamba_expand", None)
        if "mamba_d_ssm" in hf and hf["mamba_d_ssm"] is None:
            is_told = isinstance(expand, int) and isinstance(width, int)
            hf["mamba_d_ssm"] = expand * width if is_told else None
        if not hf.get("mamba_rms_norm"):
            hf.pop("mamba_norm_before_gate", None)
        else:
            hf.setdefault("mamba_norm_before_gate", True)
        for name, count in (("ssm_multipliers", 5), ("mlp_multipliers", 2)):
            if isinstance(given := hf.get(name), list) and len(given) != count:
                raise BadInput(f"config.json: {name} should be {count} numbers, not {given}")
            if given is None:
                hf.pop(name, None)
        return rope_config.read(mamba2.read(hf, hf.get("mamba_d_ssm", 1024)))


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.scale, self.of_keys = config.head_dim**-0.5, config.key_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        k = layers.multiplied(layers.einsum("BTD,DKH->BTKH", x, self.k), self.of_keys)
        q = layers.einsum("BTD,DNH->BTNH", x, self.q)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(rope.rotate(q, turn), rope.rotate(k, turn), v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Mlp(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = layers.weight("L D F", config.sizes, rngs)
        self.up = layers.weight("L D F", config.sizes, rngs)
        self.down = layers.weight("L F D", config.sizes, rngs)
        self.of_gate, self.of_down = config.mlp_multipliers

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = layers.multiplied(layers.einsum("BTD,DF->BTF", x, self.gate), self.of_gate)
        made = layers.einsum("BTD,DF->BTF", x, self.up) * jax.nn.silu(gate)
        return layers.multiplied(layers.einsum("BTF,FD->BTD", made, self.down), self.of_down)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.mixer_norm = norm()
        eps = config.rms_norm_eps if config.mamba_rms_norm else None
        self.mamba = mamba2.Mamba2(config.sizes, rngs, eps=eps, scales=config.ssm_multipliers)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs)
        self.of_mamba = config.ssm_in_multiplier, config.ssm_out_multiplier
        self.of_attention = config.attention_in_multiplier, config.attention_out_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        unit = self.mixer_norm(x)
        before, after = self.of_mamba
        run = self.mamba(layers.multiplied(unit, before), mix)
        run = layers.multiplied(run, after)
        before, after = self.of_attention
        seen = self.attention(layers.multiplied(unit, before), mix, turn)
        x = x + (run + layers.multiplied(seen, after))
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block
    keeps: ClassVar = {blocks.ALIKE: mixing.KEYS_AND_VALUES | mamba2.KEEPS}

    def last_step(self) -> last_step.LastStep:
        """The multiplier of the logits."""
        return last_step.LastStep(scale=self.config.lm_head_multiplier)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = layers.multiplied(x, self.config.embedding_multiplier)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":               ("model.embed_tokens.weight",                      "V D"),
    "blocks.mixer_norm.scale": ("model.layers.{L}.input_layernorm.weight",        "D"),
    **mamba2.named("blocks.mamba", "model.layers.{L}.mamba"),
    "blocks.attention.q":      ("model.layers.{L}.self_attn.q_proj.weight",       "(N H) D"),
    "blocks.attention.k":      ("model.layers.{L}.self_attn.k_proj.weight",       "(K H) D"),
    "blocks.attention.v":      ("model.layers.{L}.self_attn.v_proj.weight",       "(K H) D"),
    "blocks.attention.o":      ("model.layers.{L}.self_attn.o_proj.weight",       "D (N H)"),
    "blocks.mlp_norm.scale":   ("model.layers.{L}.pre_ff_layernorm.weight",       "D"),
    "blocks.mlp.gate":         ("model.layers.{L}.feed_forward.gate_proj.weight", "F D"),
    "blocks.mlp.up":           ("model.layers.{L}.feed_forward.up_proj.weight",   "F D"),
    "blocks.mlp.down":         ("model.layers.{L}.feed_forward.down_proj.weight", "D F"),
    "norm.scale":              ("model.final_layernorm.weight",                   "D"),
    "head":                    ("lm_head.weight",                                 "V D"),
}  # fmt: skip

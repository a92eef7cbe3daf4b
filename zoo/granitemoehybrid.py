"""Granite 4 (https://www.ibm.com/granite): Mamba-2 and some attention, with or without experts.

Agrees with transformers/models/granitemoehybrid/modeling_granitemoehybrid.py; the small sizes have
attention alone.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import (
    attention,
    causal_lm,
    experts,
    hf_config,
    last_step,
    layers,
    mamba2,
    mixing,
    mlp,
    pattern,
    rope,
    rope_config,
    spans,
    stack,
)
from zoo.parts.hf_config import FULL
from zoo.parts.mamba2 import LINEAR


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "granitemoehybrid"
    architecture: ClassVar[str] = "GraniteMoeHybridForCausalLM"
    layers_may_be: ClassVar[frozenset[str]] = frozenset({LINEAR, FULL})
    vocab_size: int
    hidden_size: int
    shared_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope | None  # None: attention without positions
    layer_types: tuple[str, ...]
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float  # a divisor of the logits
    mamba_expand: int
    mamba_n_heads: int
    mamba_n_groups: int
    mamba_d_state: int
    mamba_d_conv: int
    intermediate_size: int  # of an expert
    num_local_experts: int | None
    num_experts_per_tok: int | None

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }  # fmt: skip
    # Keys of other libraries, and of the chunk length in transformers.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"init_method", "normalization_function", "mamba_chunk_size"}
    )
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "shared_intermediate_size": 1024, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2, "mamba_n_heads": mamba2.HEADS,
        "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by how it mixes tokens."""
        return self.layer_types

    @property
    def experts_of_a_token(self) -> int:
        """How many experts each token is routed to; 1 if a layer has a single MLP."""
        return self.num_experts_per_tok or 1

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        E = {"E": self.num_local_experts} if self.num_local_experts else {}
        return super().sizes | {"F": self.shared_intermediate_size, "J": 2} | E

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer, with those of the state space in its layers."""
        if kind == FULL:
            return super().sizes_of(kind)
        return super().sizes_of(kind) | mamba2.sizes_of(
            inner=self.mamba_expand * self.hidden_size, heads=self.mamba_n_heads,
            groups=self.mamba_n_groups, state=self.mamba_d_state, taps=self.mamba_d_conv,
        )  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer, and keeps rope and expert keys only if they apply."""
        expand, width = hf.get("mamba_expand") or 2, hf.get("hidden_size") or 4096
        is_told = isinstance(expand, int) and isinstance(width, int)
        hf = rope_config.read(mamba2.read(hf, expand * width if is_told else None))
        positions, count = hf.pop("position_embedding_type", None), hf_config.count_of(hf)
        if positions not in (None, "nope", "rope"):
            raise BadInput(f"config.json: position_embedding_type is {positions!r}: rope or nope")
        if positions != "rope":
            hf["rope_parameters"] = None
        if hf.get("num_local_experts") == 0:
            hf |= {"num_local_experts": None, "num_experts_per_tok": None}
        listed = mamba2.kinds(hf.pop("layers_block_type", None) or hf.get("layer_types"))
        if listed is None and count is not None:
            listed = [LINEAR] * count
        return hf | {"layer_types": listed}

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        positions = None if self.rope_parameters is None else "rope"
        own = {
            "position_embedding_type": positions,
            "num_local_experts": self.num_local_experts or 0,
        }
        return super().to_hf() | own


class Attention(nnx.Module):
    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        self.scale = config.attention_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn | None
    ) -> Float[Array, "B T D"]:
        q = layers.einsum("BTD,DNH->BTNH", x, self.q)
        k = layers.einsum("BTD,DKH->BTKH", x, self.k)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        if turn is not None:
            q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = lambda: layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.mixer_norm = norm()
        if kind == LINEAR:
            self.mixer = mamba2.Mamba2(sizes, rngs, eps=config.rms_norm_eps)
        else:
            self.mixer = Attention(config, sizes, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.GatedMlp(sizes, rngs, together=True)
        if config.num_local_experts:
            choice = experts.Choice(config.experts_of_a_token, to_one=True)
            narrow = sizes | {"F": config.intermediate_size}
            self.experts = experts.GatedExperts(narrow, rngs, choice, together=True)
        else:
            self.experts = None
        self.residual = config.residual_multiplier

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn | None
    ) -> Float[Array, "B T D"]:
        mixed = self.mixer(self.mixer_norm(x), mix, turn)
        x = x + layers.multiplied(mixed, self.residual)
        unit = self.mlp_norm(x)
        made = self.mlp(unit) if self.experts is None else self.experts(unit) + self.mlp(unit)
        return x + layers.multiplied(made, self.residual)


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in (LINEAR, FULL)}
    keeps: ClassVar = {LINEAR: mamba2.KEEPS}

    def last_step(self) -> last_step.LastStep:
        """The divisor of the logits."""
        return last_step.LastStep(scale=1 / self.config.logits_scaling)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        ropes = self.config.rope_parameters
        turn = None if ropes is None else rope.turn(ropes, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = layers.multiplied(x, self.config.embedding_multiplier)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "mixer_norm.scale": ("input_layernorm.weight",                "D"),
    "mlp_norm.scale":   ("post_attention_layernorm.weight",       "D"),
    "mlp.gate_up":      ("shared_mlp.input_linear.weight",        "(J F) D"),
    "mlp.down":         ("shared_mlp.output_linear.weight",       "D F"),
    "experts.router":   ("block_sparse_moe.router.layer.weight",  "E D"),
    "experts.gate_up":  ("block_sparse_moe.input_linear.weight",  "E (J F) D"),
    "experts.down":     ("block_sparse_moe.output_linear.weight", "E D F"),
}  # fmt: skip
IN_LAYERS = {
    FULL: IN_EVERY_LAYER | {
        "mixer.q": ("self_attn.q_proj.weight", "(N H) D"),
        "mixer.k": ("self_attn.k_proj.weight", "(K H) D"),
        "mixer.v": ("self_attn.v_proj.weight", "(K H) D"),
        "mixer.o": ("self_attn.o_proj.weight", "D (N H)"),
    },
    LINEAR: IN_EVERY_LAYER | mamba2.named("mixer", "mamba"),
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds(IN_LAYERS),
}

# The names of the experts in compressed-tensors files.
ONE = "block_sparse_moe.experts.{E}"
HF_SPLIT = (
    ("block_sparse_moe.input_linear.weight", (f"{ONE}.gate_proj.weight", f"{ONE}.up_proj.weight")),
    ("block_sparse_moe.output_linear.weight", (f"{ONE}.down_proj.weight",)),
)

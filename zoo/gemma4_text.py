"""Gemma 4: wide heads in full-attention layers, and in one size experts beside the MLP.

The smallest sizes have per-layer embeddings, and layers that share an earlier layer's keys. Agrees
with transformers/models/gemma4/modeling_gemma4.py.
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
    experts_beside,
    hf_config,
    last_step,
    layer_config,
    layers,
    looking_back,
    mlp,
    pattern,
    per_layer,
    rope,
    spans,
    stack,
)
from zoo.parts.hf_config import FULL, SLIDING


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "gemma4_text"
    architecture: ClassVar[str] = "Gemma4ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int | None  # in layers whose keys are also their values
    attention_k_eq_v: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.TwoRopes
    sliding_window: int
    layer_types: tuple[str, ...]
    final_logit_softcapping: float | None
    enable_moe_block: bool
    num_experts: int | None
    top_k_experts: int | None
    moe_intermediate_size: int | None
    hidden_size_per_layer_input: int | None
    vocab_size_per_layer_input: int
    num_kv_shared_layers: int | None  # the last ones reuse earlier keys and values
    use_double_wide_mlp: bool  # in these last layers

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset({"expert_intermediate_size"})  # a duplicate
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256, "global_head_dim": 512,
        "vocab_size": 262144, "num_attention_heads": 8, "num_key_value_heads": 4,
        "sliding_window": 512, "attention_k_eq_v": False, "enable_moe_block": False,
        "vocab_size_per_layer_input": 262144, "use_double_wide_mlp": False,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: sliding or full, with keys of its own or an earlier layer's."""
        return looking_back.kinds(self)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        own = {"J": 2, "E": self.num_experts} if self.num_experts else {}
        return super().sizes | own

    @property
    def experts_of_a_token(self) -> int:
        """How many experts each token is routed to, beside the MLP."""
        return self.top_k_experts or 1

    def sizes_of(self, kind: str) -> dict[str, int]:
        """Axis sizes per kind: full-attention layers have wider heads, maybe other key heads."""
        return looking_back.sizes_of(self, kind, super().sizes_of(kind))

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds a rope per kind of layer; every sixth one and the last have full attention."""
        hf = experts_beside.read({"hidden_size_per_layer_input": 256} | hf)
        return layer_config.read(hf)

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return layer_config.written(super().to_hf())


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.attention_norm = norm("L D", sizes, rngs)
        self.attention = looking_back.Attention(config, rngs, kind)
        self.after_attention_norm = norm("L D", sizes, rngs)
        self.mlp_norm = norm("L D", sizes, rngs)
        self.mlp = mlp.GatedMlp(sizes, rngs, layers.gelu)
        self.after_mlp_norm = norm("L D", sizes, rngs)
        self.experts = (
            experts_beside.Experts(config, sizes, rngs) if config.enable_moe_block else None
        )
        if self.experts is not None:
            self.after_dense_norm = norm("L D", sizes, rngs)
            self.experts_norm = norm("L D", sizes, rngs)
            self.after_experts_norm = norm("L D", sizes, rngs)
        width = config.hidden_size_per_layer_input
        self.added = per_layer.Added(sizes, rngs, width, config.rms_norm_eps) if width else None
        self.scale = layers.weight("L", sizes, rngs, nnx.initializers.ones)
        self.type = SLIDING if looking_back.sliding(kind) else FULL

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: dict[str, rope.Turn],
        own: Float[Array, "B T R"] | None = None,
        handed: looking_back.Handed | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], looking_back.Handed]:
        before = None if handed is None else handed[self.type]
        mixed, seen = self.attention(self.attention_norm(x), attend, turns[self.type], before)
        x = x + self.after_attention_norm(mixed)
        made = self.mlp(self.mlp_norm(x))
        if self.experts is not None:
            of_experts = self.experts(self.experts_norm(x), x)
            made = self.after_dense_norm(made) + self.after_experts_norm(of_experts)
        x = x + self.after_mlp_norm(made)
        if self.added is not None and own is not None:
            x = x + self.added(x, own)
        # A constant of the checkpoint that is not trained.
        x = x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)
        return x if handed is None else (x, handed | {self.type: seen})


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in looking_back.KINDS}

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        super().__init__(config, rngs, dtype)
        if width := config.hidden_size_per_layer_input:
            sizes = config.sizes | {"V": config.vocab_size_per_layer_input}
            self.per_layer = per_layer.Inputs(sizes, rngs, width, config.rms_norm_eps)

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, which multiplies by its scale in float32."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps, wide=True)

    def last_step(self) -> last_step.LastStep:
        """The soft cap of the logits."""
        return last_step.LastStep(softcap=self.config.final_logit_softcapping)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        config, ropes = self.config, self.config.rope_parameters
        turns = {
            FULL: rope.turn(ropes.full_attention, config.global_head_dim, where),
            SLIDING: rope.turn(ropes.sliding_attention, config.head_dim, where),
        }
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        each = None
        if config.hidden_size_per_layer_input:
            inputs, numbers = self.per_layer(tokens, x), pattern.numbers(config.kinds)
            each = {kind: inputs[jnp.array(own)] for kind, own in numbers.items()}
        handed = looking_back.nothing_yet(config, x)
        return self.norm(run(self, x, where, turns, each=each, handed=handed))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "attention_norm.scale":       ("input_layernorm.weight",              "D"),
    **looking_back.HF_WEIGHTS,
    "after_attention_norm.scale": ("post_attention_layernorm.weight",     "D"),
    "mlp_norm.scale":             ("pre_feedforward_layernorm.weight",    "D"),
    "mlp.gate":                   ("mlp.gate_proj.weight",                "F D"),
    "mlp.up":                     ("mlp.up_proj.weight",                  "F D"),
    "mlp.down":                   ("mlp.down_proj.weight",                "D F"),
    "after_mlp_norm.scale":       ("post_feedforward_layernorm.weight",   "D"),
    "after_dense_norm.scale":     ("post_feedforward_layernorm_1.weight", "D"),
    "experts_norm.scale":         ("pre_feedforward_layernorm_2.weight",  "D"),
    "experts.router":             ("router.proj.weight",                  "E D"),
    "experts.router_scale":       ("router.scale",                        "D"),
    "experts.share_scale":        ("router.per_expert_scale",             "E"),
    "experts.gate_up":            ("experts.gate_up_proj",                "E (J F) D"),
    "experts.down":               ("experts.down_proj",                   "E D F"),
    "after_experts_norm.scale":   ("post_feedforward_layernorm_2.weight", "D"),
    "scale":                      ("layer_scalar",                        "()"),
    **per_layer.IN_LAYER,
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **per_layer.HF_WEIGHTS,
    **pattern.of_kinds(dict.fromkeys(looking_back.KINDS, IN_EVERY_LAYER)),
}

HF_KEPT = looking_back.unused

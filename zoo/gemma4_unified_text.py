"""Gemma 4 12B: wide heads in layers that see everything, and keys that later layers look at too.

What sees and hears is not that of the other sizes, and is not read. Agrees with
transformers/models/gemma4_unified/modeling_gemma4_unified.py.
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
    hf_config,
    last_step,
    layer_config,
    layers,
    mlp,
    pattern,
    rope,
    rope_config,
    spans,
    stack,
)
from zoo.parts.hf_config import FULL, SLIDING


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """Field names are the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "gemma4_unified_text"
    architecture: ClassVar[str] = "Gemma4UnifiedForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int | None  # where keys are values too
    attention_k_eq_v: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.TwoRopes
    sliding_window: int
    layer_types: tuple[str, ...]
    final_logit_softcapping: float | None
    num_kv_shared_layers: int | None  # the last ones, which have no keys and values of their own
    use_double_wide_mlp: bool  # of these layers

    # What HF lets a config choose and this file does not.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    }  # fmt: skip
    # What other sizes of Gemma 4 have.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "enable_moe_block", "expert_intermediate_size", "hidden_size_per_layer_input",
        "moe_intermediate_size", "num_experts", "top_k_experts", "vocab_size_per_layer_input",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256, "global_head_dim": 512,
        "vocab_size": 262144, "num_attention_heads": 8, "num_key_value_heads": 4,
        "sliding_window": 1024, "attention_k_eq_v": False, "use_double_wide_mlp": False,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of every layer, whether it slides, and whether it looks at an earlier one's keys."""
        first = len(self.layer_types) - (self.num_kv_shared_layers or 0)
        shared = map(LOOKS_BACK.get, self.layer_types[first:])
        return (*self.layer_types[:first], *filter(None, shared))

    def sizes_of(self, kind: str) -> dict[str, int]:
        """Layers that see everything have wider heads, and may have other key heads."""
        sizes = super().sizes_of(kind)
        if kind in LOOKS_BACK.values() and self.use_double_wide_mlp:
            sizes |= {"F": 2 * self.intermediate_size}
        if sliding(kind):
            return sizes
        K = self.num_global_key_value_heads if self.attention_k_eq_v else None
        own = {"H": self.global_head_dim, "K": K or self.num_key_value_heads}
        return sizes | own

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """With a rope for each kind of layer; every sixth one, and the last, sees everything."""
        if hf.get("use_bidirectional_attention") == "vision":  # of images alone
            hf = hf | {"use_bidirectional_attention": False}
        hf = layer_config.last_is_full(hf_config.every(hf, 6))
        if hf.get("rope_parameters") is None:
            hf["rope_parameters"] = ROPES
        hf = layer_config.counted(hf)
        return rope_config.read_two(layer_config.of_full_layers(hf), theta=1e6, sliding_theta=1e4)

    def to_hf(self) -> dict[str, object]:
        """A `config.json` for a model that was not read from one."""
        return layer_config.written(super().to_hf())


# Layers without keys and values of their own.
LOOKS_BACK = {SLIDING: "sliding_shared", FULL: "full_shared"}
KINDS = (SLIDING, FULL, *LOOKS_BACK.values())
# The default of transformers, for files that do not give one.
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


KeysAndValues = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]


def sliding(kind: str) -> bool:
    """Whether the layers of a kind see their neighbours alone."""
    return kind in (SLIDING, LOOKS_BACK[SLIDING])


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        self.q = layers.weight("L D N H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.q_norm = norm("L H", sizes, rngs)
        self.looks_back = kind in LOOKS_BACK.values()
        if not self.looks_back:
            self.k = layers.weight("L D K H", sizes, rngs)
            keys_alone = config.attention_k_eq_v and kind == FULL
            self.v = None if keys_alone else layers.weight("L D K H", sizes, rngs)
            self.k_norm = norm("L H", sizes, rngs)
        self.eps = config.rms_norm_eps
        self.window = config.sliding_window if sliding(kind) else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turn: rope.Turn,
        before: KeysAndValues | None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues]:
        """And the keys and values that it looked at, its own or those `before` it."""
        q = rope.rotate(self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q)), turn)
        seen = before if self.looks_back else self._own(x, turn)
        assert seen is not None
        mixed = attend(q, *seen, scale=1.0, window=self.window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o), seen

    def _own(self, x: Float[Array, "B T D"], turn: rope.Turn) -> KeysAndValues:
        k = layers.einsum("BTD,DKH->BTKH", x, self.k)
        v = k if self.v is None else layers.einsum("BTD,DKH->BTKH", x, self.v)
        return rope.rotate(self.k_norm(k), turn), layers.unit(v, self.eps).astype(x.dtype)


class Block(nnx.Module):
    """All layers of a kind at once: every weight has a leading L."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.attention_norm = norm("L D", sizes, rngs)
        self.attention = Attention(config, rngs, kind)
        self.after_attention_norm = norm("L D", sizes, rngs)
        self.mlp_norm = norm("L D", sizes, rngs)
        self.mlp = mlp.GatedMlp(sizes, rngs, layers.gelu)
        self.after_mlp_norm = norm("L D", sizes, rngs)
        self.scale = layers.weight("L", sizes, rngs, nnx.initializers.ones)
        self.type = SLIDING if sliding(kind) else FULL

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: dict[str, rope.Turn],
        handed: dict[str, KeysAndValues] | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], dict[str, KeysAndValues]]:
        before = None if handed is None else handed[self.type]
        mixed, seen = self.attention(self.attention_norm(x), attend, turns[self.type], before)
        x = x + self.after_attention_norm(mixed)
        x = x + self.after_mlp_norm(self.mlp(self.mlp_norm(x)))
        # A constant of the checkpoint, which its makers do not train.
        x = x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)
        return x if handed is None else (x, handed | {self.type: seen})


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in KINDS}

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """Multiplies in float32."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps, wide=True)

    def last_step(self) -> last_step.LastStep:
        """Logits are soft-capped."""
        return last_step.LastStep(softcap=self.config.final_logit_softcapping)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm; `run` applies the blocks."""
        config, ropes = self.config, self.config.rope_parameters
        turns = {
            FULL: rope.turn(ropes.full_attention, config.global_head_dim, where),
            SLIDING: rope.turn(ropes.sliding_attention, config.head_dim, where),
        }
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        handed = None
        if config.num_kv_shared_layers:
            sizes = {kind: config.sizes_of(kind) for kind in (SLIDING, FULL)}
            shapes = {kind: (*x.shape[:2], own["K"], own["H"]) for kind, own in sizes.items()}
            handed = {kind: (jnp.zeros(shape, x.dtype),) * 2 for kind, shape in shapes.items()}
        return self.norm(run(self, x, where, turns, handed=handed))


# Our weight -> its HF name in a layer, and its axes there.
IN_EVERY_LAYER = {
    "attention_norm.scale":       ("input_layernorm.weight",              "D"),
    "attention.q":                ("self_attn.q_proj.weight",             "(N H) D"),
    "attention.k":                ("self_attn.k_proj.weight",             "(K H) D"),
    "attention.v":                ("self_attn.v_proj.weight",             "(K H) D"),
    "attention.o":                ("self_attn.o_proj.weight",             "D (N H)"),
    "attention.q_norm.scale":     ("self_attn.q_norm.weight",             "H"),
    "attention.k_norm.scale":     ("self_attn.k_norm.weight",             "H"),
    "after_attention_norm.scale": ("post_attention_layernorm.weight",     "D"),
    "mlp_norm.scale":             ("pre_feedforward_layernorm.weight",    "D"),
    "mlp.gate":                   ("mlp.gate_proj.weight",                "F D"),
    "mlp.up":                     ("mlp.up_proj.weight",                  "F D"),
    "mlp.down":                   ("mlp.down_proj.weight",                "D F"),
    "after_mlp_norm.scale":       ("post_feedforward_layernorm.weight",   "D"),
    "scale":                      ("layer_scalar",                        "()"),
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds(dict.fromkeys(KINDS, IN_EVERY_LAYER)),
}

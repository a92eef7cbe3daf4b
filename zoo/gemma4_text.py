"""Gemma 4: wide heads in layers that see everything, and in one size experts beside the MLP.

The smallest have inputs of each layer, and layers that look at an earlier one's keys. Agrees with
transformers/models/gemma4/modeling_gemma4.py.
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
    mlp,
    pattern,
    per_layer,
    rope,
    rope_config,
    spans,
    stack,
)
from zoo.parts.hf_config import FULL, SLIDING


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """Field names are the keys of an HF `config.json`."""

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
    num_global_key_value_heads: int | None  # where keys are values too
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
    num_kv_shared_layers: int | None  # the last ones, which have no keys and values of their own
    use_double_wide_mlp: bool  # of these layers

    # What HF lets a config choose and this file does not.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset({"expert_intermediate_size"})  # another name
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256, "global_head_dim": 512,
        "vocab_size": 262144, "num_attention_heads": 8, "num_key_value_heads": 4,
        "sliding_window": 512, "attention_k_eq_v": False, "enable_moe_block": False,
        "vocab_size_per_layer_input": 262144, "use_double_wide_mlp": False,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of every layer, whether it slides, and whether it looks at an earlier one's keys."""
        first = len(self.layer_types) - (self.num_kv_shared_layers or 0)
        shared = map(LOOKS_BACK.get, self.layer_types[first:])
        return (*self.layer_types[:first], *filter(None, shared))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        own = {"J": 2, "E": self.num_experts} if self.num_experts else {}
        return super().sizes | own

    @property
    def experts_of_a_token(self) -> int:
        """How many experts each token goes to, beside the MLP."""
        return self.top_k_experts or 1

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
        hf = experts_beside.read(hf)
        if hf.get("rope_parameters") is None:
            hf["rope_parameters"] = ROPES
        hf = layer_config.counted({"hidden_size_per_layer_input": 256} | hf)
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
        self.type = SLIDING if sliding(kind) else FULL

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: dict[str, rope.Turn],
        own: Float[Array, "B T R"] | None = None,
        handed: dict[str, KeysAndValues] | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], dict[str, KeysAndValues]]:
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
        # A constant of the checkpoint, which its makers do not train.
        x = x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)
        return x if handed is None else (x, handed | {self.type: seen})


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in KINDS}

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        super().__init__(config, rngs, dtype)
        if width := config.hidden_size_per_layer_input:
            sizes = config.sizes | {"V": config.vocab_size_per_layer_input}
            self.per_layer = per_layer.Inputs(sizes, rngs, width, config.rms_norm_eps)

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
        each, handed = None, None
        if config.hidden_size_per_layer_input:
            inputs, numbers = self.per_layer(tokens, x), pattern.numbers(config.kinds)
            each = {kind: inputs[jnp.array(own)] for kind, own in numbers.items()}
        if config.num_kv_shared_layers:
            sizes = {kind: config.sizes_of(kind) for kind in (SLIDING, FULL)}
            shapes = {kind: (*x.shape[:2], own["K"], own["H"]) for kind, own in sizes.items()}
            handed = {kind: (jnp.zeros(shape, x.dtype),) * 2 for kind, shape in shapes.items()}
        return self.norm(run(self, x, where, turns, each=each, handed=handed))


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
    **pattern.of_kinds(dict.fromkeys(KINDS, IN_EVERY_LAYER)),
}

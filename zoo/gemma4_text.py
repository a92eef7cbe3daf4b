"""Gemma 4: wide heads in layers that see everything, and in one size experts beside the MLP.

Agrees with transformers/models/gemma4/modeling_gemma4.py: the 31B and the 26B-A4B. Sizes that share
keys or have inputs of each layer (E2B, E4B) are refused.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import (
    attention,
    causal_lm,
    experts,
    hf_config,
    last_step,
    layers,
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

    # What HF lets a config choose and this file does not.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    }  # fmt: skip
    # Of inputs of each layer and shared keys, which are refused; and another name.
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size_per_layer_input", "use_double_wide_mlp", "expert_intermediate_size"}
    )
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256, "global_head_dim": 512,
        "vocab_size": 262144, "num_attention_heads": 8, "num_key_value_heads": 4,
        "sliding_window": 512, "attention_k_eq_v": False, "enable_moe_block": False,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of every layer, whether it slides."""
        return self.layer_types

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
        if kind == SLIDING:
            return super().sizes_of(kind)
        K = self.num_global_key_value_heads if self.attention_k_eq_v else None
        own = {"H": self.global_head_dim, "K": K or self.num_key_value_heads}
        return super().sizes_of(kind) | own

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """With a rope for each kind of layer; every sixth one, and the last, sees everything."""
        hf = {"hidden_size_per_layer_input": 256} | hf
        if hf.get("use_bidirectional_attention") == "vision":  # of images alone
            del hf["use_bidirectional_attention"]
        hf = hf_config.every(hf, 6)
        if isinstance(listed := hf.get("layer_types"), list) and listed:
            hf["layer_types"] = [*listed[:-1], FULL]
        if hf.get("enable_moe_block"):
            if lacks := [key for key in OF_EXPERTS if hf.get(key) is None]:
                raise BadInput(f"config.json lacks {lacks}, which experts beside the MLP need")
        else:
            hf |= dict.fromkeys(OF_EXPERTS)
        if hf.get("rope_parameters") is None:
            hf["rope_parameters"] = ROPES
        return rope_config.read_two(_of_full_layers(hf), theta=1e6, sliding_theta=1e4)


def _of_full_layers(hf: dict[str, object]) -> dict[str, object]:
    """With what they have of their own, which transformers 5 writes layer by layer."""
    rest, listed = dict(hf), hf.get("layer_types")
    own = rest.pop("per_layer_config", None)
    if own is None or not isinstance(listed, list):
        return hf
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    full = {str(i) for i, kind in enumerate(listed) if kind == FULL}
    if not isinstance(own, dict) or own.keys() != full:
        return hf  # refused by the name of the key
    given, *others = own.values()
    odd = not isinstance(given, dict) or given.keys() - names.keys()
    if odd or any(other != given for other in others):
        return hf
    return rest | {names[key]: value for key, value in given.items()}


OF_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
# The default of transformers, for files that do not give one.
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        keys_alone = config.attention_k_eq_v and kind == FULL
        self.v = None if keys_alone else layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.q_norm = norm("L H", sizes, rngs)
        self.k_norm = norm("L H", sizes, rngs)
        self.eps = config.rms_norm_eps
        self.window = config.sliding_window if kind == SLIDING else None

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q))
        k = layers.einsum("BTD,DKH->BTKH", x, self.k)
        v = k if self.v is None else layers.einsum("BTD,DKH->BTKH", x, self.v)
        q, k = rope.rotate(q, turn), rope.rotate(self.k_norm(k), turn)
        mixed = attend(
            q, k, layers.unit(v, self.eps).astype(x.dtype), scale=1.0, window=self.window
        )
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Experts(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        assert config.moe_intermediate_size and config.top_k_experts  # as `enable_moe_block` says
        sizes = config.sizes_of(kind) | {"F": config.moe_intermediate_size}
        ones = nnx.initializers.ones
        self.router = layers.weight("L D E", sizes, rngs)
        self.router_scale = layers.weight("L D", sizes, rngs, ones)
        self.share_scale = layers.weight("L E", sizes, rngs, ones)
        self.gate_up = layers.weight("L E J D F", sizes, rngs)
        self.down = layers.weight("L E F D", sizes, rngs)
        self.choice = experts.Choice(config.top_k_experts, to_one=True)
        self.eps = config.rms_norm_eps

    def __call__(
        self, x: Float[Array, "B T D"], before: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The experts' work on `x`; the residual stream `before` chooses them."""
        unit = layers.unit(before, self.eps).astype(x.dtype) * self.router_scale[...].astype(
            x.dtype
        )
        unit = unit * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
        route = experts.chosen(experts.logits(unit, self.router), self.choice)
        scale = self.share_scale[...].astype(x.dtype).astype(jnp.float32)[route.experts]
        weights = {"gate_up": (self.gate_up[...], "E J D F"), "down": (self.down[...], "E F D")}
        return experts.mixed(x, route._replace(shares=route.shares * scale), weights, _expert)


_expert = functools.partial(experts.gated_together, bent=layers.gelu)


class Block(nnx.Module):
    """All layers of a kind at once: every weight has a leading L."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.attention_norm = norm("L D", sizes, rngs)
        self.attention = Attention(config, rngs, kind)
        self.after_attention_norm = norm("L D", sizes, rngs)
        self.mlp_norm = norm("L D", sizes, rngs)
        self.mlp = layers.GatedMlp(sizes, rngs, layers.gelu)
        self.after_mlp_norm = norm("L D", sizes, rngs)
        self.experts = Experts(config, rngs, kind) if config.enable_moe_block else None
        if self.experts is not None:
            self.after_dense_norm = norm("L D", sizes, rngs)
            self.experts_norm = norm("L D", sizes, rngs)
            self.after_experts_norm = norm("L D", sizes, rngs)
        self.scale = layers.weight("L", sizes, rngs, nnx.initializers.ones)
        self.kind = kind

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turns: dict[str, rope.Turn]
    ) -> Float[Array, "B T D"]:
        mixed = self.attention(self.attention_norm(x), attend, turns[self.kind])
        x = x + self.after_attention_norm(mixed)
        made = self.mlp(self.mlp_norm(x))
        if self.experts is not None:
            of_experts = self.experts(self.experts_norm(x), x)
            made = self.after_dense_norm(made) + self.after_experts_norm(of_experts)
        x = x + self.after_mlp_norm(made)
        # A constant of the checkpoint, which its makers do not train.
        return x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in (SLIDING, FULL)}

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
        return self.norm(run(self, x, where, turns))


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
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **hf_config.of_kinds({kind: IN_EVERY_LAYER for kind in (SLIDING, FULL)}),
}

"""gpt-oss (https://arxiv.org/abs/2508.10925): attention sinks, sliding windows, biased experts.

Agrees with transformers/models/gpt_oss/modeling_gpt_oss.py. Weights stored as MXFP4 can be read; an
export writes them in its own dtype.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    experts,
    hf_config,
    layers,
    rope,
    rope_config,
    spans,
    stack,
)

# The default of transformers, for files that omit it.
ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "gpt_oss"
    architecture: ClassVar[str] = "GptOssForCausalLM"
    attention_sinks: ClassVar[bool] = True
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
    sliding_window: int | None
    layer_types: tuple[str, ...]
    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float
    swiglu_limit: float

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu", "attention_bias": True}
    # Duplicates of keys that are fields here.
    ignored: ClassVar[frozenset[str]] = frozenset({"experts_per_token", "initial_context_length"})
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "head_dim": 64,
        "num_key_value_heads": 8, "sliding_window": 128, "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"J": 2, "E": self.num_local_experts}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the default rope where a file has none, and the kind of each layer."""
        quantised = hf.get("quantization_config")
        if isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4":
            hf = {key: value for key, value in hf.items() if key != "quantization_config"}
        if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
            hf = hf | {"rope_parameters": ROPE}
        return hf_config.every(rope_config.read(hf, theta=150_000.0), 2)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        zeros = nnx.initializers.zeros
        self.q_bias = layers.weight("L N H", config.sizes, rngs, zeros)
        self.k_bias = layers.weight("L K H", config.sizes, rngs, zeros)
        self.v_bias = layers.weight("L K H", config.sizes, rngs, zeros)
        self.o_bias = layers.weight("L D", config.sizes, rngs, zeros)
        self.sinks = layers.weight("L N", config.sizes, rngs)
        self.scale = config.head_dim**-0.5

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turn: rope.Turn,
        window: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        q = layers.shifted(layers.einsum("BTD,DNH->BTNH", x, self.q), self.q_bias)
        k = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.k), self.k_bias)
        v = layers.shifted(layers.einsum("BTD,DKH->BTKH", x, self.v), self.v_bias)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        sinks = self.sinks[...].astype(x.dtype)
        mixed = attend(q, k, v, scale=self.scale, window=window, sinks=sinks)
        return layers.shifted(layers.einsum("BTNH,NHD->BTD", mixed, self.o), self.o_bias)


class Experts(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.router = layers.weight("L D E", config.sizes, rngs)
        self.router_bias = layers.weight("L E", config.sizes, rngs, zeros)
        self.gate_up = layers.weight("L E J D F", config.sizes, rngs)
        self.gate_up_bias = layers.weight("L E J F", config.sizes, rngs, zeros)
        self.down = layers.weight("L E F D", config.sizes, rngs)
        self.down_bias = layers.weight("L E D", config.sizes, rngs, zeros)
        self.each = config.num_experts_per_tok
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        # Rounded to the compute dtype like all weights, so that wide and narrow ones agree.
        bias = self.router_bias[...].astype(x.dtype)
        logits = layers.shifted(experts.logits(x, self.router), bias)
        route = experts.top_then_softmax(logits, self.each)
        weights = {
            "gate_up": (self.gate_up[...], "E J D F"),
            "gate_up_bias": (self.gate_up_bias[...], "E J F"),
            "down": (self.down[...], "E F D"),
            "down_bias": (self.down_bias[...], "E D"),
        }
        return experts.mixed(x, route, weights, self._expert)

    def _expert(self, x: Array, own: experts.Weights) -> Array:
        gate, up = layers.shifted(
            layers.times("tD,JDF->tJF", x, own["gate_up"]), own["gate_up_bias"]
        ).swapaxes(0, 1)
        gate = jnp.minimum(gate, self.limit)
        bent = (
            (jnp.clip(up, -self.limit, self.limit) + 1) * gate * jax.nn.sigmoid(gate * self.alpha)
        )
        return layers.shifted(layers.times("tF,FD->tD", bent, own["down"]), own["down_bias"])


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = Experts(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turn: rope.Turn,
        window: Int[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn, window)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn, each=hf_config.windows(self.config)))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_bias":     ("model.layers.{L}.self_attn.q_proj.bias",           "(N H)"),
    "blocks.attention.k_bias":     ("model.layers.{L}.self_attn.k_proj.bias",           "(K H)"),
    "blocks.attention.v_bias":     ("model.layers.{L}.self_attn.v_proj.bias",           "(K H)"),
    "blocks.attention.o_bias":     ("model.layers.{L}.self_attn.o_proj.bias",           "D"),
    "blocks.attention.sinks":      ("model.layers.{L}.self_attn.sinks",                 "N"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.router":           ("model.layers.{L}.mlp.router.weight",               "E D"),
    "blocks.mlp.router_bias":      ("model.layers.{L}.mlp.router.bias",                 "E"),
    "blocks.mlp.gate_up":          ("model.layers.{L}.mlp.experts.gate_up_proj",       "E D (F J)"),
    "blocks.mlp.gate_up_bias":     ("model.layers.{L}.mlp.experts.gate_up_proj_bias",   "E (F J)"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.experts.down_proj",           "E F D"),
    "blocks.mlp.down_bias":        ("model.layers.{L}.mlp.experts.down_proj_bias",      "E D"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

# The names in 4-bit bitsandbytes files, which store every matrix separately.
HF_SPLIT = (
    ("mlp.router.weight", ("mlp.router.linear.weight",)),
    ("mlp.router.bias", ("mlp.router.linear.bias",)),
    ("mlp.experts.gate_up_proj", ("mlp.experts.gate_up_projs.{E}.weight",), True),
    ("mlp.experts.gate_up_proj_bias", ("mlp.experts.gate_up_projs.{E}.bias",)),
    ("mlp.experts.down_proj", ("mlp.experts.down_projs.{E}.weight",), True),
    ("mlp.experts.down_proj_bias", ("mlp.experts.down_projs.{E}.bias",)),
)

"""Llama 2, 3, 3.1, 3.2 and 3.3, text only (https://arxiv.org/abs/2307.09288, 2407.21783).

Agrees with transformers/models/llama/modeling_llama.py.
"""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from zoo import attention, layers, stack

# What HF lets a Llama config choose and this file does not.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}

# Keys that do not change the logits: bookkeeping, generation, training from scratch.
IGNORED = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype",
    "eos_token_id", "initializer_range", "max_position_embeddings", "model_type", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions; the keys are those of HF's `rope_parameters`."""

    rope_theta: float
    rope_type: str = "default"  # default, linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


# The keys each kind of rope reads beside `rope_theta` and `rope_type`.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Field names are the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: Rope

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "L": self.num_hidden_layers,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
        }

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Reads a `config.json`, in the spelling of transformers 4 or 5.

        Raises:
          ValueError: it lacks a key, or asks for something this file does not implement.
        """
        hf = {key: value for key, value in hf.items() if key not in IGNORED}
        rope = _rope(hf.pop("rope_parameters", None), hf.pop("rope_scaling", None), hf)
        refused = {key: hf[key] for key, ours in FIXED.items() if hf.get(key, ours) != ours}
        names = {field.name for field in dataclasses.fields(cls)} - {"rope_parameters"}
        unknown = hf.keys() - names - FIXED.keys()
        refused |= {key: hf[key] for key in unknown if hf[key] is not None}
        if refused:
            raise ValueError(f"zoo/llama.py does not implement {refused} of config.json")
        fields = [field for field in dataclasses.fields(cls) if hf.get(field.name) is not None]
        if odd := {f.name: hf[f.name] for f in fields if not _is(f.type, hf[f.name])}:
            raise ValueError(f"config.json: {odd} are not values a Llama can have")
        # What transformers assumes where an older file says nothing.
        heads = hf.get("num_attention_heads")
        assumed: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
        hf = assumed | hf
        hf["num_key_value_heads"] = hf.get("num_key_value_heads") or heads
        if not hf.get("head_dim") and heads and "hidden_size" in hf:
            hf["head_dim"] = hf["hidden_size"] // heads
        if missing := sorted(names - {key for key, value in hf.items() if value is not None}):
            raise ValueError(f"config.json lacks {missing}, which a Llama needs")
        config = cls(**{name: hf[name] for name in names}, rope_parameters=rope)
        if config.head_dim % 2 or config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(
                f"config.json: head_dim {config.head_dim} must be even, and num_attention_heads "
                f"{config.num_attention_heads} a multiple of num_key_value_heads "
                f"{config.num_key_value_heads}"
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` for a model that was not read from one."""
        keys = ROPE_KEYS[self.rope_parameters.rope_type] | {"rope_theta", "rope_type"}
        rope = {k: v for k, v in dataclasses.asdict(self.rope_parameters).items() if k in keys}
        own = dataclasses.asdict(self) | FIXED | {"rope_parameters": rope}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | own


def _rope(new: Any, old: Any, hf: dict[str, Any]) -> Rope:
    given = new or old or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: rope should be an object, not {given!r}")
    given = dict(given)
    theta = hf.pop("rope_theta", None)
    theta = given.pop("rope_theta", None) or theta or 10_000.0  # Llama 2 files say nothing
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)  # transformers 4.43 to 4.45 wrote both
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(
            f"zoo/llama.py does not implement rope_type {kind!r}, only {', '.join(ROPE_KEYS)}"
        )
    if given.keys() != ROPE_KEYS[kind]:
        raise ValueError(
            f"config.json: rope of type {kind!r} takes {sorted(ROPE_KEYS[kind])} and has "
            f"{sorted(given)}"
        )
    numbers = given | {"rope_theta": theta}
    if odd := {key: value for key, value in numbers.items() if not _is(float, value)}:
        raise ValueError(f"config.json: {odd} should be numbers above 0")
    whole = {"original_max_position_embeddings"}
    made: Any = {key: int(v) if key in whole else float(v) for key, v in numbers.items()}
    return Rope(rope_type=kind, **made)


def _is(kind: Any, value: Any) -> bool:
    """Is it a bool, or a number above 0 of this kind? JSON may say 1 for 1.0."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int if kind is int else int | float) and value > 0


def frequencies(head_dim: int, rope: Rope) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of head channels, fastest first.

    Source: transformers/modeling_rope_utils.py, step by step in float32: the checkpoints were
    trained with these roundings, and one bit more or less shows in the logits.
    """
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    plain = one / np.float32(rope.rope_theta) ** exponents
    if rope.rope_type == "linear":
        return plain / np.float32(rope.factor)
    if rope.rope_type == "llama3":
        # How often each pair turns within the old context: slow ones are stretched by `factor`.
        turns = rope.original_max_position_embeddings / (np.float32(2 * math.pi) / plain)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep.astype(np.float32), 0, 1)
        return (one - keep) * plain / np.float32(rope.factor) + keep * plain
    return plain


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], turn: layers.Rotary, attend: attention.Attend
    ) -> Float[Array, "B T D"]:
        q = layers.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = layers.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Mlp(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = layers.weight("L D F", config.sizes, rngs)
        self.up = layers.weight("L D F", config.sizes, rngs)
        self.down = layers.weight("L F D", config.sizes, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = jax.nn.silu(layers.einsum("BTD,DF->BTF", x, self.gate))
        up = layers.einsum("BTD,DF->BTF", x, self.up)
        return layers.einsum("BTF,FD->BTD", gate * up, self.down)


class Block(nnx.Module):
    """All layers at once: every weight has a leading L, and `stack.run` goes through it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], turn: layers.Rotary, attend: attention.Attend
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), turn, attend)
        return x + self.mlp(self.mlp_norm(x))


class Model(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        self.embedding = layers.weight("V D", config.sizes, rngs)
        self.blocks = Block(config, rngs)
        self.norm = layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = layers.weight("V D", config.sizes, rngs)
        self.config = config
        self.dtype = dtype  # of the activations; the weights may be kept in a wider one
        self.attention: str | None = None  # one of attention.BACKENDS; unset: the platform's
        self.remat = "full"  # one of stack.REMAT
        self.source: pathlib.Path | None = None  # the folder it was read from

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the next token at every position, each row one text."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = self.hidden(tokens, positions, attention.causal(*tokens.shape))
        return self.unembed(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        keys: attention.KeyRange,
        so_far: stack.Weights | None = None,
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm; `so_far` as in `stack.run`."""
        turn = layers.rotary(
            positions, frequencies(self.config.head_dim, self.config.rope_parameters)
        )
        x = layers.embed(self.embedding, tokens, self.dtype)
        attend = attention.over(keys, self.attention)
        x = stack.run(self.blocks, x, turn, attend, remat=self.remat, so_far=so_far)
        return self.norm(x)

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states -> logits, in float32."""
        return layers.einsum("BTD,VD->BTV", hidden, self.unembedding(), out=jnp.float32)

    def unembedding(self) -> nnx.Param:
        """The head: axes "V D"."""
        return self.embedding if self.config.tie_word_embeddings else self.head


# Our weight -> its HF name, for each layer {L}, and its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

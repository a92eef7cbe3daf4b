"""LFM2 and 2.5 (https://arxiv.org/abs/2511.23404): short gated convolutions, and some attention.

Agrees with transformers/models/lfm2/modeling_lfm2.py.
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
    convolution,
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

CONV, FULL = "conv", hf_config.FULL
OLDER = {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"}


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "lfm2"
    architecture: ClassVar[str] = "Lfm2ForCausalLM"
    layers_may_be: ClassVar[frozenset[str]] = frozenset({CONV, FULL})
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    block_auto_adjust_ff_dim: bool  # if so, the MLP is 2/3 as wide, times a factor, rounded up
    block_ffn_dim_multiplier: float
    block_multiple_of: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    layer_types: tuple[str, ...]
    conv_L_cache: int  # taps of a convolution

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"conv_bias": False}
    # Keys of the training code: other names of widths, initial weights.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "block_dim", "conv_dim", "conv_dim_out", "num_heads", "theta", "block_norm_eps",
        "block_use_swiglu", "block_use_xavier_init", "conv_use_xavier_init", "block_mlp_init_scale",
        "block_out_init_scale", "use_pos_enc",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "norm_eps": 1e-5, "tie_word_embeddings": True, "conv_L_cache": 3, "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by how it mixes tokens."""
        return self.layer_types

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter; a convolution has D channels."""
        width = self.intermediate_size
        if self.block_auto_adjust_ff_dim:
            width = int(self.block_ffn_dim_multiplier * int(2 * width / 3))
            width = -(-width // self.block_multiple_of) * self.block_multiple_of
        return super().sizes | {"F": width, "J": 3, "Q": self.hidden_size, "W": self.conv_L_cache}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer where a file lists the indices of attention layers."""
        hf = rope_config.read(hf, theta=1e6)
        hf |= {new: hf.pop(old) for old, new in OLDER.items() if old in hf}
        full, count = hf.pop("full_attn_idxs", None), hf_config.count_of(hf)
        if hf.get("layer_types") or count is None:
            return hf
        full = range(count) if full is None else full
        if not isinstance(full, list | range):
            raise BadInput(f"config.json: full_attn_idxs should be a list, not {full!r}")
        return hf | {"layer_types": [FULL if i in full else CONV for i in range(count)]}


class Attention(nnx.Module):
    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        self.q_norm = layers.RmsNorm("L H", sizes, rngs, eps=config.norm_eps)
        self.k_norm = layers.RmsNorm("L H", sizes, rngs, eps=config.norm_eps)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q)), turn)
        k = rope.rotate(self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k)), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        self.mixer_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.norm_eps)
        if kind == CONV:
            self.mixer = convolution.Gated(sizes, rngs)
        else:
            self.mixer = Attention(config, sizes, rngs)
        self.mlp_norm = layers.RmsNorm("L D", sizes, rngs, eps=config.norm_eps)
        self.mlp = mlp.GatedMlp(sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.mixer(self.mixer_norm(x), mix, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in (CONV, FULL)}
    keeps: ClassVar = {CONV: convolution.KEEPS}

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, after the blocks."""
        return layers.RmsNorm("D", config.sizes, rngs, eps=config.norm_eps)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "mixer_norm.scale": ("operator_norm.weight",   "D"),
    "mlp_norm.scale":   ("ffn_norm.weight",        "D"),
    "mlp.gate":         ("feed_forward.w1.weight", "F D"),
    "mlp.up":           ("feed_forward.w3.weight", "F D"),
    "mlp.down":         ("feed_forward.w2.weight", "D F"),
}  # fmt: skip
IN_LAYERS = {
    FULL: IN_EVERY_LAYER | {
        "mixer.q":            ("self_attn.q_proj.weight",      "(N H) D"),
        "mixer.k":            ("self_attn.k_proj.weight",      "(K H) D"),
        "mixer.v":            ("self_attn.v_proj.weight",      "(K H) D"),
        "mixer.o":            ("self_attn.out_proj.weight",    "D (N H)"),
        "mixer.q_norm.scale": ("self_attn.q_layernorm.weight", "H"),
        "mixer.k_norm.scale": ("self_attn.k_layernorm.weight", "H"),
    },
    CONV: IN_EVERY_LAYER | convolution.HF_WEIGHTS,
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.embedding_norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds(IN_LAYERS),
}

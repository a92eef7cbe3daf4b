"""EXAONE 4.0 (https://arxiv.org/abs/2507.11407): norms after attention and MLP; sliding windows.

Agrees with transformers/models/exaone4/modeling_exaone4.py. In models with sliding layers, those
with full attention have no rope.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int
import numpy as np

from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "exaone4"
    architecture: ClassVar[str] = "Exaone4ForCausalLM"
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
    sliding_window: int | None  # None: every layer has full attention and a rope
    layer_types: tuple[str, ...]

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu"}
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_key_value_heads": 32,
        "sliding_window": 4096,
    }  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer: every fourth has full attention; without a window, all."""
        hf = rope_config.read(hf)
        period = hf.pop("sliding_window_pattern", None) or 4
        return hf_config.every(hf, 1 if hf.get("sliding_window", 4096) is None else period)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.q_norm = layers.RmsNorm("L H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.k_norm = layers.RmsNorm("L H", config.sizes, rngs, eps=config.rms_norm_eps)
        self.scale = config.head_dim**-0.5

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        own: tuple[Int[Array, ""], Int[Array, ""] | None],
    ) -> Float[Array, "B T D"]:
        which, window = own
        turn = rope.of_layer(turns, which)
        q = self.q_norm(layers.einsum("BTD,DNH->BTNH", x, self.q))
        k = self.k_norm(layers.einsum("BTD,DKH->BTKH", x, self.k))
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale, window=window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.GatedMlp(config.sizes, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        own: tuple[Int[Array, ""], Int[Array, ""] | None],
    ) -> Float[Array, "B T D"]:
        x = x + self.attention_norm(self.attention(x, attend, turns, own))
        return x + self.mlp_norm(self.mlp(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        turns = rope.either(rope.unturned(turn), turn)
        slides = hf_config.sliding(self.config)
        which = slides if self.config.sliding_window else np.ones_like(slides)
        x = layers.embed(self.embedding, tokens, self.dtype)
        each = (which, hf_config.windows(self.config))
        return self.norm(run(self, x, where, turns, each=each))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.q_norm.weight",       "H"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.k_norm.weight",       "H"),
    "blocks.mlp_norm.scale": ("model.layers.{L}.post_feedforward_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

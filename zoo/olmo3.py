"""OLMo 3 (https://allenai.org/olmo): OLMo 2 with sliding windows and a rope per kind of layer.

Agrees with transformers/models/olmo3/modeling_olmo3.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "olmo3"
    architecture: ClassVar[str] = "Olmo3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.TwoRopes
    sliding_window: int | None
    layer_types: tuple[str, ...]

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu", "attention_bias": False}
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "sliding_window": 4096,
    }  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds a rope for each kind of layer; every fourth layer has full attention."""
        return hf_config.every(rope_config.read_two(hf, theta=500_000.0), 4)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.q_norm = norm("L N H", config.sizes, rngs)  # over all heads together
        self.k_norm = norm("L K H", config.sizes, rngs)
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
        norm = functools.partial(layers.RmsNorm, eps=config.rms_norm_eps, wide=True)
        self.attention_norm = norm("L D", config.sizes, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm("L D", config.sizes, rngs)
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

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.RmsNorm:
        """The final norm, which multiplies by its scale in float32."""
        eps = config.rms_norm_eps
        return layers.RmsNorm("D", config.sizes, rngs, eps=eps, wide=True)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        ropes, width = self.config.rope_parameters, self.config.head_dim
        turns = rope.either(
            rope.turn(ropes.full_attention, width, where),
            rope.turn(ropes.sliding_attention, width, where),
        )
        x = layers.embed(self.embedding, tokens, self.dtype)
        each = (hf_config.sliding(self.config), hf_config.windows(self.config))
        return self.norm(run(self, x, where, turns, each=each))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.q_norm.weight",       "(N H)"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.k_norm.weight",       "(K H)"),
    "blocks.mlp_norm.scale": ("model.layers.{L}.post_feedforward_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

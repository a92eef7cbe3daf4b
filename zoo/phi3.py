"""Phi 3, 3.5, 4 (https://arxiv.org/abs/2404.14219): longrope, and fused projections.

Agrees with transformers/models/phi3/modeling_phi3.py.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
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

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "interpolate_factor": 1,
        "full_attn_mod": 1,
    }
    assumed: ClassVar[dict[str, object]] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        return super().sizes | {"J": 2, "Q": heads}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Translates the old names of longrope.

        Raises:
          ValueError: the rope is of a kind that no Phi has.
        """
        # The original length is a key beside `rope_parameters`, and overrides the one inside.
        old = hf.get("original_max_position_embeddings") or 4096
        ropes = {name: _renamed(hf.get(name), old) for name in ("rope_parameters", "rope_scaling")}
        hf = rope_config.read(hf | ropes, partial=True)
        one = hf["rope_parameters"]
        assert isinstance(one, rope.Rope)
        if one.rope_type not in ("default", "longrope"):
            kind = one.rope_type
            raise BadInput(f"zoo/phi3.py does not implement rope_type {kind!r} of config.json")
        return hf

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        old = self.rope_parameters.original_max_position_embeddings
        return super().to_hf() | ({"original_max_position_embeddings": old} if old else {})


def _renamed(given: object, old: object) -> object:
    """Renames longrope from "su" or "yarn", as the first files called it."""
    if not isinstance(given, dict):
        return given
    key = "rope_type" if "rope_type" in given else "type"
    if given.get(key) not in ("su", "yarn", "longrope"):
        return given
    return given | {key: "longrope", "original_max_position_embeddings": old}


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.qkv = layers.weight("L D Q H", config.sizes, rngs)  # heads of q, then k, then v
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window
        self.heads = config.num_attention_heads, config.num_key_value_heads

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        N, K = self.heads
        qkv = layers.einsum("BTD,DQH->BTQH", x, self.qkv)
        q, k, v = jnp.split(qkv, [N, N + K], axis=2)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale, window=self.window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.GatedMlp(config.sizes, rngs, together=True)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("model.embed_tokens.weight",                        "V D"),
    "blocks.attention_norm.scale": ("model.layers.{L}.input_layernorm.weight",          "D"),
    "blocks.attention.qkv":        ("model.layers.{L}.self_attn.qkv_proj.weight",       "(Q H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.gate_up":          ("model.layers.{L}.mlp.gate_up_proj.weight",         "(J F) D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

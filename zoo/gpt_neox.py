"""GPT-NeoX, Pythia (https://arxiv.org/abs/2304.01373): parallel attention and MLP, partial rope.

Agrees with transformers/models/gpt_neox/modeling_gpt_neox.py, without its dropout. The files
interleave q, k and v by head.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack


def gelu(x: Array) -> Array:
    """The exact GELU, by the error function; `layers.gelu` approximates it."""
    return jax.nn.gelu(x, approximate=False)


ACTS = {"gelu": gelu, "gelu_fast": layers.gelu}


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "gpt_neox"
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    turns_a_part: ClassVar[bool] = True
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    use_parallel_residual: bool
    hidden_act: str

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"attention_bias": True}
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "layer_norm_eps": 1e-5, "use_parallel_residual": True,
    }  # fmt: skip

    @property
    def num_key_value_heads(self) -> int:
        """The number of key heads: one per query head."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """The head width: all heads together are as wide as the model."""
        return hf_config.filling(self)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"J": 3}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Renames the keys of its rope, which covers a quarter of each head by default.

        Raises:
          ValueError: it asks for an activation that is not implemented.
        """
        hf = {"hidden_act": "gelu"} | hf
        if hf["hidden_act"] not in [*ACTS]:
            act = hf["hidden_act"]
            raise BadInput(f"zoo/gpt_neox.py does not implement hidden_act {act!r} of config.json")
        base, part = (hf.pop(name, None) for name in ("rotary_emb_base", "rotary_pct"))
        beside = {"rope_theta": base, "partial_rotary_factor": 0.25 if part is None else part}
        return rope_config.read(hf | beside, partial=True)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.qkv = layers.weight("L D N J H", config.sizes, rngs)
        self.qkv_bias = layers.weight("L N J H", config.sizes, rngs, zeros)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.o_bias = layers.weight("L D", config.sizes, rngs, zeros)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        qkv = layers.shifted(layers.einsum("BTD,DNJH->BTNJH", x, self.qkv), self.qkv_bias)
        q, k, v = jnp.moveaxis(qkv, 3, 0)
        q, k = rope.rotate(q, turn), rope.rotate(k, turn)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.shifted(layers.einsum("BTNH,NHD->BTD", mixed, self.o), self.o_bias)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.LayerNorm("L D", config.sizes, rngs, eps=config.layer_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.Mlp(config.sizes, rngs, ACTS[config.hidden_act])
        self.is_parallel = config.use_parallel_residual

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        mixed = self.attention(self.attention_norm(x), attend, turn)
        if self.is_parallel:
            return self.mlp(self.mlp_norm(x)) + mixed + x
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.LayerNorm:
        """The final norm, which has a bias."""
        return layers.LayerNorm("D", config.sizes, rngs, eps=config.layer_norm_eps)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":                   ("gpt_neox.embed_in.weight",                          "V D"),
    "blocks.attention_norm.scale": ("gpt_neox.layers.{L}.input_layernorm.weight",        "D"),
    "blocks.attention_norm.bias":  ("gpt_neox.layers.{L}.input_layernorm.bias",          "D"),
    "blocks.attention.qkv": ("gpt_neox.layers.{L}.attention.query_key_value.weight", "(N J H) D"),
    "blocks.attention.qkv_bias": ("gpt_neox.layers.{L}.attention.query_key_value.bias", "(N J H)"),
    "blocks.attention.o":          ("gpt_neox.layers.{L}.attention.dense.weight",        "D (N H)"),
    "blocks.attention.o_bias":     ("gpt_neox.layers.{L}.attention.dense.bias",          "D"),
    "blocks.mlp_norm.scale":       ("gpt_neox.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp_norm.bias":        ("gpt_neox.layers.{L}.post_attention_layernorm.bias", "D"),
    "blocks.mlp.up":               ("gpt_neox.layers.{L}.mlp.dense_h_to_4h.weight",      "F D"),
    "blocks.mlp.up_bias":          ("gpt_neox.layers.{L}.mlp.dense_h_to_4h.bias",        "F"),
    "blocks.mlp.down":             ("gpt_neox.layers.{L}.mlp.dense_4h_to_h.weight",      "D F"),
    "blocks.mlp.down_bias":        ("gpt_neox.layers.{L}.mlp.dense_4h_to_h.bias",        "D"),
    "norm.scale":                  ("gpt_neox.final_layer_norm.weight",                  "D"),
    "norm.bias":                   ("gpt_neox.final_layer_norm.bias",                    "D"),
    "head":                        ("embed_out.weight",                                  "V D"),
}  # fmt: skip

# The files on the hub also hold causal masks (None: not loaded).
HF_NAMES = ((r"\.attention\.(masked_)?bias$", None),)

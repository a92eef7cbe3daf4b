"""Llama 2, 3, 3.1, 3.2 and 3.3, text only (https://arxiv.org/abs/2307.09288, 2407.21783).

Agrees with transformers/models/llama/modeling_llama.py.
"""

import dataclasses
import pathlib
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo import attention, causal_lm, hf_config, layers, rope, rope_config, spans, stack

# What HF lets a config choose and this file does not.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}

# What another library calls it.
IGNORED = frozenset({"is_llama_config"})


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
    rope_parameters: rope.Rope

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return hf_config.sizes(self)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Config":
        """Reads a `config.json`.

        Raises:
          ValueError: it lacks a key, or asks for something this file does not implement.
        """
        assumed = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}
        hf = rope_config.read(hf)
        return hf_config.read(cls, hf, fixed=FIXED, ignored=IGNORED, assumed=assumed)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` for a model that was not read from one."""
        return hf_config.written(self, FIXED, "LlamaForCausalLM")


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.scale = config.head_dim**-0.5

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers at once: every weight has a leading L, and `stack.run` goes through it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.RmsNorm("L D", config.sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = layers.GatedMlp(config.sizes, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(nnx.Module):
    attention: str | None = None  # one of attention.BACKENDS; unset: the platform's
    remat: str = "full"  # one of stack.REMAT
    source: pathlib.Path | None = None  # the folder it was read from

    __call__ = causal_lm.logits
    unembed = causal_lm.unembed
    unembedding = causal_lm.unembedding
    logit_softcap = causal_lm.logit_softcap

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        self.embedding = layers.weight("V D", config.sizes, rngs)
        self.blocks = Block(config, rngs)
        self.norm = layers.RmsNorm("D", config.sizes, rngs, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = layers.weight("V D", config.sizes, rngs)
        self.config = config
        self.dtype = dtype  # of the activations; the weights may be kept in a wider one

    def hidden(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm; `run` is how the blocks are gone through."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


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

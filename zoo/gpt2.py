"""GPT-2: learned position embeddings, biases everywhere, fused q, k and v.

Source: "Language Models are Unsupervised Multitask Learners", Radford et al. 2019.
Agrees with transformers/models/gpt2/modeling_gpt2.py, without its dropout.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import attention, causal_lm, hf_config, layers, mlp, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float
    tie_word_embeddings: bool

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    # Keys of heads for other tasks; `n_ctx`, which duplicates `n_positions`; and the order in which
    # attention scores are computed, which does not matter here, as they are in float32.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "n_ctx", "n_special", "output_past", "predict_special_tokens", "reorder_and_upcast_attn",
        "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return {
            "V": self.vocab_size,
            "M": self.n_positions,
            "D": self.n_embd,
            "F": self.n_inner,
            "L": self.n_layer,
            "N": self.n_head,
            "K": self.n_head,
            "H": self.n_embd // self.n_head,
            "J": 3,
        }

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the width of the MLP where a file leaves it to follow from the model's."""
        width, heads = (hf.get(key, cls.assumed[key]) for key in ("n_embd", "n_head"))
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
            raise BadInput(f"config.json: n_embd {width} must be a multiple of n_head {heads}")
        if hf.get("n_inner") is None and isinstance(width, int):
            return hf | {"n_inner": 4 * width}
        return hf


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.qkv = layers.weight("L D J N H", config.sizes, rngs)
        self.qkv_bias = layers.weight("L J N H", config.sizes, rngs, zeros)
        self.o = layers.weight("L N H D", config.sizes, rngs)
        self.o_bias = layers.weight("L D", config.sizes, rngs, zeros)
        self.scale = config.sizes["H"] ** -0.5

    def __call__(self, x: Float[Array, "B T D"], attend: attention.Attend) -> Float[Array, "B T D"]:
        qkv = layers.shifted(layers.einsum("BTD,DJNH->BTJNH", x, self.qkv), self.qkv_bias)
        q, k, v = (qkv[:, :, j] for j in range(3))
        mixed = attend(q, k, v, scale=self.scale)
        return layers.shifted(layers.einsum("BTNH,NHD->BTD", mixed, self.o), self.o_bias)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: layers.LayerNorm("L D", config.sizes, rngs, eps=config.layer_norm_epsilon)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.Mlp(config.sizes, rngs, layers.gelu)

    def __call__(self, x: Float[Array, "B T D"], attend: attention.Attend) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        super().__init__(config, rngs, dtype)
        self.positions = layers.weight("M D", config.sizes, rngs)

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.LayerNorm:
        """The final norm, which has a bias."""
        return layers.LayerNorm("D", config.sizes, rngs, eps=config.layer_norm_epsilon)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        x = layers.embed(self.embedding, tokens, self.dtype)
        x = x + layers.embed(self.positions, where.positions, self.dtype)
        return self.norm(run(self, x, where))


# Our weight -> its HF name (once per layer, {L}), axes as stored: matrices are transposed.
HF_WEIGHTS = {
    "embedding":                   ("transformer.wte.weight",                   "V D"),
    "positions":                   ("transformer.wpe.weight",                   "M D"),
    "blocks.attention_norm.scale": ("transformer.h.{L}.ln_1.weight",            "D"),
    "blocks.attention_norm.bias":  ("transformer.h.{L}.ln_1.bias",              "D"),
    "blocks.attention.qkv":        ("transformer.h.{L}.attn.c_attn.weight",     "D (J N H)"),
    "blocks.attention.qkv_bias":   ("transformer.h.{L}.attn.c_attn.bias",       "(J N H)"),
    "blocks.attention.o":          ("transformer.h.{L}.attn.c_proj.weight",     "(N H) D"),
    "blocks.attention.o_bias":     ("transformer.h.{L}.attn.c_proj.bias",       "D"),
    "blocks.mlp_norm.scale":       ("transformer.h.{L}.ln_2.weight",            "D"),
    "blocks.mlp_norm.bias":        ("transformer.h.{L}.ln_2.bias",              "D"),
    "blocks.mlp.up":               ("transformer.h.{L}.mlp.c_fc.weight",        "D F"),
    "blocks.mlp.up_bias":          ("transformer.h.{L}.mlp.c_fc.bias",          "F"),
    "blocks.mlp.down":             ("transformer.h.{L}.mlp.c_proj.weight",      "F D"),
    "blocks.mlp.down_bias":        ("transformer.h.{L}.mlp.c_proj.bias",        "D"),
    "norm.scale":                  ("transformer.ln_f.weight",                  "D"),
    "norm.bias":                   ("transformer.ln_f.bias",                    "D"),
    "head":                        ("lm_head.weight",                           "V D"),
}  # fmt: skip

# The files on the hub have shorter names, and also hold causal masks (None: not loaded).
HF_NAMES = (
    (r"\.attn\.(masked_)?bias$", None),
    (r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),
)

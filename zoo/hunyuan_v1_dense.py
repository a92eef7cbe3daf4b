"""Hunyuan dense (https://github.com/Tencent-Hunyuan): q and k are normed after rope.

Agrees with transformers/models/hunyuan_v1_dense/modeling_hunyuan_v1_dense.py.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints_io.errors import BadInput
from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack

# The keys in the files of a rope that has an alpha; of these only alpha is used.
BESIDE_ALPHA = {
    "alpha", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "rope_type", "type",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "hunyuan_v1_dense"
    architecture: ClassVar[str] = "HunYuanDenseV1ForCausalLM"
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

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "norm_type": "rms",
        "use_qk_norm": True, "num_experts": 1,
    }  # fmt: skip
    # Settings of Tencent's own code; transformers reads none of them.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "add_classification_head", "attention_head_dim", "cla_share_factor", "class_num",
        "dense_list", "im_end_id", "im_newline_id", "im_start_id", "mask_init_id",
        "org_vocab_size", "pad_id", "pool_type", "text_end_id", "text_start_id", "use_cla",
        "use_rotary_pos_emb",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Turns a rope that alpha stretches into a rope with a larger base."""
        names = "rope_parameters", "rope_scaling"
        return rope_config.read(hf | {name: _stretched(hf.get(name), hf) for name in names})


def _stretched(given: object, hf: Mapping[str, object]) -> object:
    """With an alpha, the rope that files call "dynamic" does not depend on the text's length."""
    if not isinstance(given, dict) or not given.get("alpha"):
        return given
    if (given.get("rope_type") or given.get("type")) != "dynamic":
        return given  # alpha is refused later
    alpha = given["alpha"]
    width: Any = hf.get("head_dim")
    base = given.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    for value, least in ((alpha, 0), (width, 2), (base, 1)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least < value <= rope_config.MOST[float]:
            raise BadInput(
                f"config.json: a rope is stretched by alpha {alpha!r} for head_dim {width!r} from "
                f"rope_theta {base!r}: all three should be numbers, above 0, 2 and 1"
            )
    rest = {key: value for key, value in given.items() if key not in BESIDE_ALPHA}
    return rest | {"rope_theta": base * alpha ** (width / (width - 2))}


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
        self, x: Float[Array, "B T D"], attend: attention.Attend, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        q = rope.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
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
    "blocks.attention.q":          ("model.layers.{L}.self_attn.q_proj.weight",         "(N H) D"),
    "blocks.attention.k":          ("model.layers.{L}.self_attn.k_proj.weight",         "(K H) D"),
    "blocks.attention.v":          ("model.layers.{L}.self_attn.v_proj.weight",         "(K H) D"),
    "blocks.attention.o":          ("model.layers.{L}.self_attn.o_proj.weight",         "D (N H)"),
    "blocks.attention.q_norm.scale": ("model.layers.{L}.self_attn.query_layernorm.weight", "H"),
    "blocks.attention.k_norm.scale": ("model.layers.{L}.self_attn.key_layernorm.weight", "H"),
    "blocks.mlp_norm.scale":       ("model.layers.{L}.post_attention_layernorm.weight", "D"),
    "blocks.mlp.gate":             ("model.layers.{L}.mlp.gate_proj.weight",            "F D"),
    "blocks.mlp.up":               ("model.layers.{L}.mlp.up_proj.weight",              "F D"),
    "blocks.mlp.down":             ("model.layers.{L}.mlp.down_proj.weight",            "D F"),
    "norm.scale":                  ("model.norm.weight",                                "D"),
    "head":                        ("lm_head.weight",                                   "V D"),
}  # fmt: skip

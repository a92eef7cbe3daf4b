"""SmolLM 3 (https://huggingface.co/blog/smollm3): some layers have no rope.

Agrees with transformers/models/smollm3/modeling_smollm3.py.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int
import numpy as np

from checkpoints_io.errors import BadInput
from zoo.parts import attention, causal_lm, hf_config, layers, mlp, rope, rope_config, spans, stack


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "smollm3"
    architecture: ClassVar[str] = "SmolLM3ForCausalLM"
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
    no_rope_layers: tuple[bool, ...]  # False: the layer has no rope
    sliding_window: int | None  # width, in the sliding layers
    layer_types: tuple[str, ...]

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"max_window_layers"}
    )  # a key of Qwen, without effect here
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "num_key_value_heads": 4,
    }  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Lists the kind of every layer."""
        return _layers_named(rope_config.read(hf, theta=2_000_000.0))

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return super().to_hf() | {
            "use_sliding_window": self.sliding_window is not None,
            "no_rope_layers": [int(turns) for turns in self.no_rope_layers],
        }


def _layers_named(hf: dict[str, object]) -> dict[str, object]:
    """Lists every layer where a file gives an interval: the fourth, eighth, … have no rope."""
    hf, slides = hf_config.switched(hf, "use_sliding_window")
    interval = hf.pop("no_rope_layer_interval", None) or 4
    width, count = hf.pop("sliding_window", None), hf_config.count_of(hf)
    if count is None or not isinstance(interval, int):
        return hf  # the bad value is refused later
    turns = hf.get("no_rope_layers") or [(i + 1) % interval for i in range(count)]
    if not isinstance(turns, list):
        raise BadInput(f"config.json: no_rope_layers should be a list, not {turns!r}")
    turns = [bool(x) for x in turns]
    kinds = hf.get("layer_types") or [
        hf_config.SLIDING if slides and width and not x else hf_config.FULL for x in turns
    ]
    width = width if slides else None
    named = {"no_rope_layers": turns, "sliding_window": width, "layer_types": kinds}
    return hf | named


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", config.sizes, rngs)
        self.k = layers.weight("L D K H", config.sizes, rngs)
        self.v = layers.weight("L D K H", config.sizes, rngs)
        self.o = layers.weight("L N H D", config.sizes, rngs)
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
        q = rope.rotate(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
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
        x = x + self.attention(self.attention_norm(x), attend, turns, own)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block = Block

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        turns = rope.either(rope.unturned(turn), turn)
        which = np.array(self.config.no_rope_layers, np.int32)
        x = layers.embed(self.embedding, tokens, self.dtype)
        each = (which, hf_config.windows(self.config))
        return self.norm(run(self, x, where, turns, each=each))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
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

"""Command R7B, Command A (https://arxiv.org/abs/2504.00698): attention beside the MLP.

Agrees with transformers/models/cohere2/modeling_cohere2.py. Sliding layers rotate pairs of
neighbouring channels; full layers have no rope.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int

from zoo.parts import (
    attention,
    causal_lm,
    hf_config,
    last_step,
    layers,
    mlp,
    rope,
    rope_config,
    spans,
    stack,
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "cohere2"
    architecture: ClassVar[str] = "Cohere2ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_norm_eps: float
    logit_scale: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    sliding_window: int | None
    layer_types: tuple[str, ...]

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "use_qk_norm": False,
    }  # fmt: skip
    # Settings of Cohere's own code; transformers reads none of them.
    ignored: ClassVar[frozenset[str]] = frozenset({
        "layer_switch", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct",
        "use_embedding_sharing", "use_gated_activation", "use_parallel_block",
        "use_parallel_embedding",
    })  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.0625,
        "sliding_window": 4096,
    }  # fmt: skip

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer: every fourth one has full attention."""
        hf = rope_config.read(hf)
        hf.pop("_sliding_window_pattern", None)  # transformers writes it but reads the other key
        return hf_config.every(hf, hf.pop("sliding_window_pattern", None) or 4)


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
        turn: rope.Turn,
        window: Int[Array, ""] | int | None,
    ) -> Float[Array, "B T D"]:
        q = rope.rotate_neighbours(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate_neighbours(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale, window=window)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Block(nnx.Module):
    """All layers stacked: every weight has a leading L axis, over which `stack.run` scans."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        eps = config.layer_norm_eps
        self.norm = layers.LayerNorm("L D", config.sizes, rngs, eps=eps, bias=False)
        self.attention = Attention(config, rngs)
        self.mlp = mlp.GatedMlp(config.sizes, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        own: tuple[Int[Array, ""], Int[Array, ""] | int | None],
    ) -> Float[Array, "B T D"]:
        slides, window = own
        unit = self.norm(x)
        mixed = self.attention(unit, attend, rope.of_layer(turns, slides), window)
        return x + mixed + self.mlp(unit)


class Model(causal_lm.CausalLM):
    Block = Block

    def last_norm(self, config: Config, rngs: nnx.Rngs) -> layers.LayerNorm:
        """The final norm, which also subtracts the mean."""
        return layers.LayerNorm("D", config.sizes, rngs, eps=config.layer_norm_eps, bias=False)

    def last_step(self) -> last_step.LastStep:
        """The scale of the logits."""
        return last_step.LastStep(scale=self.config.logit_scale)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.head_dim, where)
        turns = rope.either(rope.unturned(turn), turn)
        x = layers.embed(self.embedding, tokens, self.dtype)
        each = (hf_config.sliding(self.config), hf_config.windows(self.config))
        return self.norm(run(self, x, where, turns, each=each))


# Our weight -> its HF name (once per layer, {L}) and the order of its axes there.
HF_WEIGHTS = {
    "embedding":           ("model.embed_tokens.weight",                "V D"),
    "blocks.norm.scale":   ("model.layers.{L}.input_layernorm.weight",  "D"),
    "blocks.attention.q":  ("model.layers.{L}.self_attn.q_proj.weight", "(N H) D"),
    "blocks.attention.k":  ("model.layers.{L}.self_attn.k_proj.weight", "(K H) D"),
    "blocks.attention.v":  ("model.layers.{L}.self_attn.v_proj.weight", "(K H) D"),
    "blocks.attention.o":  ("model.layers.{L}.self_attn.o_proj.weight", "D (N H)"),
    "blocks.mlp.gate":     ("model.layers.{L}.mlp.gate_proj.weight",    "F D"),
    "blocks.mlp.up":       ("model.layers.{L}.mlp.up_proj.weight",      "F D"),
    "blocks.mlp.down":     ("model.layers.{L}.mlp.down_proj.weight",    "D F"),
    "norm.scale":          ("model.norm.weight",                        "D"),
    "head":                ("lm_head.weight",                           "V D"),
}  # fmt: skip

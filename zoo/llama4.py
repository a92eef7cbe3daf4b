"""Llama 4 (https://ai.meta.com/blog/llama-4-multimodal-intelligence): chunked attention, experts.

Agrees with transformers/models/llama4/modeling_llama4.py, `Llama4ForCausalLM`.
"""

import dataclasses
import functools
from typing import Any, ClassVar

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from checkpoints_io.errors import BadInput
from zoo.parts import (
    attention,
    causal_lm,
    experts,
    hf_config,
    layers,
    mlp,
    pattern,
    rope,
    rope_config,
    spans,
    stack,
)
from zoo.parts.dense_first import DENSE, SPARSE

CHUNKED = "chunked_attention"


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "llama4_text"
    architecture: ClassVar[str] = "Llama4ForCausalLM"
    layers_may_be: ClassVar[frozenset[str]] = frozenset({CHUNKED, hf_config.FULL})
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of experts
    intermediate_size_mlp: int  # of layers without experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    no_rope_layers: tuple[bool, ...]  # False: the layer has no rope
    use_qk_norm: bool  # in layers with rope
    attn_temperature_tuning: bool  # in layers without rope
    floor_scale: int
    attn_scale: float
    layer_types: tuple[str, ...]
    attention_chunk_size: int | None
    mlp_layer_types: tuple[str, ...]  # as `moe_layers` counts them
    num_local_experts: int
    num_experts_per_tok: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {"hidden_act": "silu", "attention_bias": False}
    ignored: ClassVar[frozenset[str]] = frozenset({"router_jitter_noise"})  # of pretraining
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_key_value_heads": 8,
        "head_dim": 128, "use_qk_norm": True, "attn_temperature_tuning": True,
        "floor_scale": 8192, "attn_scale": 0.1, "num_experts_per_tok": 1,
        "num_local_experts": 16, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: dense, or with experts."""
        return self.mlp_layer_types

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return super().sizes | {"J": 2, "E": self.num_local_experts}

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer: a dense MLP is wider than an expert."""
        dense = {"F": self.intermediate_size_mlp} if kind == DENSE else {}
        return super().sizes_of(kind) | dense

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Lists the kind of every layer."""
        return _layers_named(rope_config.read(hf, theta=500_000.0))

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        said = super().to_hf()
        del said["mlp_layer_types"]
        return said | {
            "no_rope_layers": [int(turns) for turns in self.no_rope_layers],
            "moe_layers": [i for i, kind in enumerate(self.mlp_layer_types) if kind == SPARSE],
        }


def _layers_named(hf: dict[str, object]) -> dict[str, object]:
    """Lists the kind of every layer where a file gives intervals; adds a missing chunk size."""
    count, named = hf_config.count_of(hf), {"attention_chunk_size": 8192} | hf
    still = named.pop("no_rope_layer_interval", None) or 4
    step = named.pop("interleave_moe_layer_step", None) or 1
    if count is None or not isinstance(still, int) or not isinstance(step, int):
        return named  # the bad value is refused later
    turns: Any = named.get("no_rope_layers") or [(i + 1) % still for i in range(count)]
    sparse: Any = named.pop("moe_layers", None)
    sparse = list(range(step - 1, count, step)) if sparse is None else sparse
    for name, listed in (("no_rope_layers", turns), ("moe_layers", sparse)):
        if not isinstance(listed, list) or not all(isinstance(x, int) for x in listed):
            raise BadInput(f"config.json: {name} should be a list of numbers, not {listed!r}")
    named["no_rope_layers"] = [bool(x) for x in turns]
    named["mlp_layer_types"] = [SPARSE if i in sparse else DENSE for i in range(count)]
    if not named.get("layer_types"):
        chunked = CHUNKED if named["attention_chunk_size"] else hf_config.FULL
        named["layer_types"] = [chunked if x else hf_config.FULL for x in turns]
    kinds: object = named["layer_types"]
    if isinstance(kinds, list) and CHUNKED in kinds and not named["attention_chunk_size"]:
        raise BadInput("config.json: some layer_types are chunked: give an attention_chunk_size")
    return named


# For each layer: whether it has a rope, and how far it sees back from the start of its chunk.
Own = tuple[Int[Array, ""], Int[Array, ""]]


class Attention(nnx.Module):
    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        self.q = layers.weight("L D N H", sizes, rngs)
        self.k = layers.weight("L D K H", sizes, rngs)
        self.v = layers.weight("L D K H", sizes, rngs)
        self.o = layers.weight("L N H D", sizes, rngs)
        self.eps = config.rms_norm_eps if config.use_qk_norm else None
        self.scale, self.chunk = config.head_dim**-0.5, config.attention_chunk_size

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        grown: Float[Array, "B T"],
        own: Own,
    ) -> Float[Array, "B T D"]:
        has_rope, window = own
        turn = rope.of_layer(turns, has_rope)
        q = rope.rotate_neighbours(layers.einsum("BTD,DNH->BTNH", x, self.q), turn)
        k = rope.rotate_neighbours(layers.einsum("BTD,DKH->BTKH", x, self.k), turn)
        if self.eps is not None:
            normed = (layers.unit(each, self.eps).astype(x.dtype) for each in (q, k))
            q, k = (jnp.where(has_rope, *both) for both in zip(normed, (q, k), strict=True))
        longer = jnp.where(has_rope, 1, grown)[..., None, None]
        q = (q.astype(jnp.float32) * longer).astype(x.dtype)
        v = layers.einsum("BTD,DKH->BTKH", x, self.v)
        mixed = attend(q, k, v, scale=self.scale, window=window, chunk=self.chunk)
        return layers.einsum("BTNH,NHD->BTD", mixed, self.o)


class Experts(nnx.Module):
    """Experts, whose inputs are scaled by the token's share, and one shared expert."""

    def __init__(self, config: Config, sizes: dict[str, int], rngs: nnx.Rngs):
        choice = experts.Choice(
            config.num_experts_per_tok, to_one=False, scores=experts.sigmoid, of_what_is_read=True
        )
        self.chosen = experts.GatedExperts(sizes, rngs, choice, together=True)
        self.shared = mlp.GatedMlp(sizes, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.chosen(x) + self.shared(x)


class Block(nnx.Module):
    """All layers of a kind, stacked: every weight has a leading L axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = lambda: layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, sizes, rngs)
        self.mlp_norm = norm()
        self.mlp = mlp.GatedMlp(sizes, rngs) if kind == DENSE else Experts(config, sizes, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: attention.Attend,
        turns: rope.TwoTurns,
        grown: Float[Array, "B T"],
        own: Own,
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), attend, turns, grown, own)
        return x + self.mlp(self.mlp_norm(x))


def _grown(config: Config, where: spans.Spans) -> Float[Array, "B T"]:
    """The factor by which queries are scaled in a layer without rope.

    Source: https://arxiv.org/abs/2501.19399.
    """
    if not config.attn_temperature_tuning:
        return jnp.ones(where.positions.shape, jnp.float32)
    stretches = (where.positions + 1) // config.floor_scale
    return 1 + config.attn_scale * jnp.log1p(stretches.astype(jnp.float32))


class Model(causal_lm.CausalLM):
    Block: ClassVar[dict[str, Any]] = {
        kind: functools.partial(Block, kind=kind) for kind in (DENSE, SPARSE)
    }

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        config = self.config
        turn = rope.turn(config.rope_parameters, config.head_dim, where)
        turns = rope.either(rope.unturned(turn), turn)
        chunked = [kind == CHUNKED for kind in config.layer_types]
        has_rope, window = np.array(config.no_rope_layers), np.where(chunked, 1, hf_config.ALL)
        each = {
            kind: (has_rope[own].astype(np.int32), window[own].astype(np.int32))
            for kind, found in pattern.numbers(config.kinds).items()
            for own in [np.array(found)]
        }
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turns, _grown(config, where), each=each))


# Our weight -> its HF name within a layer and the order of its axes there.
IN_EVERY_LAYER = {
    "attention_norm.scale": ("input_layernorm.weight",          "D"),
    "attention.q":          ("self_attn.q_proj.weight",         "(N H) D"),
    "attention.k":          ("self_attn.k_proj.weight",         "(K H) D"),
    "attention.v":          ("self_attn.v_proj.weight",         "(K H) D"),
    "attention.o":          ("self_attn.o_proj.weight",         "D (N H)"),
    "mlp_norm.scale":       ("post_attention_layernorm.weight", "D"),
}  # fmt: skip
OWN = {
    DENSE: {
        "mlp.gate": ("feed_forward.gate_proj.weight", "F D"),
        "mlp.up":   ("feed_forward.up_proj.weight",   "F D"),
        "mlp.down": ("feed_forward.down_proj.weight", "D F"),
    },
    SPARSE: {
        "mlp.chosen.router":  ("feed_forward.router.weight",                  "E D"),
        "mlp.chosen.gate_up": ("feed_forward.experts.gate_up_proj",           "E D (J F)"),
        "mlp.chosen.down":    ("feed_forward.experts.down_proj",              "E F D"),
        "mlp.shared.gate":    ("feed_forward.shared_expert.gate_proj.weight", "F D"),
        "mlp.shared.up":      ("feed_forward.shared_expert.up_proj.weight",   "F D"),
        "mlp.shared.down":    ("feed_forward.shared_expert.down_proj.weight", "D F"),
    },
}  # fmt: skip
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **pattern.of_kinds({kind: IN_EVERY_LAYER | own for kind, own in OWN.items()}),
}

# The names of the experts in compressed-tensors files.
ALL, ONE = "feed_forward.experts", "feed_forward.experts.{E}"
HF_SPLIT = (
    (f"{ALL}.gate_up_proj", (f"{ONE}.gate_proj.weight", f"{ONE}.up_proj.weight"), True),
    (f"{ALL}.down_proj", (f"{ONE}.down_proj.weight",), True),
)

"""Mistral Small 4: latent attention, softmax routers, queries that grow with position.

Agrees with transformers/models/mistral4/modeling_mistral4.py.
"""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float, Int

from zoo.parts import (
    causal_lm,
    dense_first,
    experts,
    growing,
    hf_config,
    latent,
    latent_model,
    layers,
    rope,
    spans,
    stack,
)

# The default of transformers, for files that omit it.
ROPE = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 8192, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "mistral4"
    architecture: ClassVar[str] = "Mistral4ForCausalLM"
    of_experts: ClassVar[dict[str, bool]] = {"together": True}
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: rope.Rope
    mlp_layer_types: tuple[str, ...]  # as `first_k_dense_replace` counts them
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    llama_4_scaling_beta: float | None  # a key of rope_parameters in the file

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "rope_interleave": True,
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = latent.IGNORED
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_shared_experts": 1, "n_routed_experts": 128,
        "num_experts_per_tok": 4, "moe_intermediate_size": 2048, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 131072,
        "hidden_size": 4096, "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: dense, or with experts."""
        return self.mlp_layer_types

    @property
    def choice(self) -> experts.Choice:
        """How the router chooses the experts of a token."""
        return dense_first.choice(self, jax.nn.softmax)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return hf_config.sizes(self) | latent.sizes_of(self) | {"J": 2}

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer: experts are narrower than a dense MLP."""
        return super().sizes_of(kind) | dense_first.sizes_of(self, kind)

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer, and moves the query scaling out of the rope."""
        hf = dense_first.read(latent.read(hf), first=0)
        return growing.read(_of_turned(hf), ROPE)

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return latent.written(dense_first.written(growing.written(super().to_hf())))


def _of_turned(hf: dict[str, object]) -> dict[str, object]:
    """Counts the rope in the rotated part of a head, where a file counts the whole head."""
    ropes, nope, turned = (
        hf.get(key) for key in ("rope_parameters", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    if not isinstance(ropes, dict) or not isinstance(nope, int) or not isinstance(turned, int):
        return hf
    if ropes.get("partial_rotary_factor") != turned / max(nope + turned, 1):
        return hf  # refused later, by the key's name
    own = {key: value for key, value in ropes.items() if key != "partial_rotary_factor"}
    return hf | {"rope_parameters": own}


class Model(causal_lm.CausalLM):
    Block: ClassVar = latent_model.BLOCKS
    keeps: ClassVar = latent_model.KEEPS

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the final norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.qk_rope_head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn, growing.lengths(self.config, where)))


# Our weight -> its HF name within a layer and the order of its axes there.
EXPERTS = {
    "mlp.chosen.gate_up": ("mlp.experts.gate_up_proj", "E (J F) D"),
    "mlp.chosen.down":    ("mlp.experts.down_proj",    "E D F"),
}  # fmt: skip
HF_WEIGHTS = latent_model.table(EXPERTS)

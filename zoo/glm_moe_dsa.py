"""GLM 5, 5.1, 5.2: latent attention to keys that an indexer selects, and many experts.

Agrees with transformers/models/glm_moe_dsa/modeling_glm_moe_dsa.py on texts of at most
`index_topk` tokens, of which the indexer selects every one.
"""

import dataclasses
from typing import ClassVar

from zoo.parts import (
    dense_first,
    experts,
    hf_config,
    indexed,
    latent,
    latent_model,
    rope,
    rope_config,
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "glm_moe_dsa"
    architecture: ClassVar[str] = "GlmMoeDsaForCausalLM"
    of_experts: ClassVar[dict[str, bool]] = {"corrected": True, "wide_router": True}
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
    mlp_layer_types: tuple[str, ...]
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    index_topk: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "rope_interleave": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    }  # fmt: skip
    # Keys of multi-token prediction layers (not loaded), of training losses and of serving.
    ignored: ClassVar[frozenset[str]] = latent.IGNORED | indexed.IGNORED | {
        "num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "seq_aux", "ep_size",
        "moe_router_dtype",  # float32, as it always is here
    }  # fmt: skip
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_shared_experts": 1, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "intermediate_size": 12288,
        "num_hidden_layers": 78, "num_attention_heads": 64, "vocab_size": 154880,
        "hidden_size": 6144, "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "v_head_dim": 256, "index_topk": 2048,
    }  # fmt: skip

    @property
    def longest_text(self) -> int:
        """The longest text in which each query sees all keys: no indexer runs here."""
        return self.index_topk

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: dense, or with experts."""
        return self.mlp_layer_types

    @property
    def choice(self) -> experts.Choice:
        """How the router chooses the experts of a token."""
        return dense_first.choice(self, experts.sigmoid)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return hf_config.sizes(self) | latent.sizes_of(self)

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer: experts are narrower than a dense MLP."""
        return super().sizes_of(kind) | dense_first.sizes_of(self, kind)

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer."""
        hf = dense_first.read(latent.read(indexed.read(hf)), first=3)
        return rope_config.read(hf)

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return latent.written(super().to_hf())


Model = latent_model.Model
HF_WEIGHTS = latent_model.table()

# The multi-token prediction layer comes after the last layer.
HF_OTHERS = (r"^model\.layers\.{L}\.",)
HF_KEPT = indexed.HF_KEPT

HF_PACKED = experts.IN_ONE_TENSOR

"""DeepSeek V2 and V2 Lite: latent attention, and softmax routers over groups of experts.

Agrees with transformers/models/deepseek_v2/modeling_deepseek_v2.py.
"""

import dataclasses
from typing import ClassVar

import jax

from zoo.parts import (
    dense_first,
    experts,
    hf_config,
    latent,
    latent_model,
    rope,
    rope_config,
)


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """The fields are named after the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "deepseek_v2"
    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
    of_experts: ClassVar[dict[str, bool]] = {"wide_router": True}
    norm_topk_prob: ClassVar[bool] = False
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
    routed_scaling_factor: float
    n_group: int
    topk_group: int

    # Options of the HF config that this file supports with one value only.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "norm_topk_prob": False, "moe_layer_freq": 1,
    }  # fmt: skip
    # Keys of training losses and of serving.
    ignored: ClassVar[frozenset[str]] = latent.IGNORED | {"aux_loss_alpha", "seq_aux", "ep_size"}
    assumed: ClassVar[dict[str, object]] = {
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0,
        "n_shared_experts": 2, "n_routed_experts": 64, "moe_intermediate_size": 1407,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 102400, "hidden_size": 4096, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer: dense, or with experts."""
        return self.mlp_layer_types

    @property
    def choice(self) -> experts.Choice:
        """How the router chooses the experts of a token."""
        return dense_first.choice(self, jax.nn.softmax, best=1)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis, by its letter."""
        return hf_config.sizes(self) | latent.sizes_of(self)

    def sizes_of(self, kind: str) -> dict[str, int]:
        """The axis sizes of one kind of layer: experts are narrower than a dense MLP."""
        return super().sizes_of(kind) | dense_first.sizes_of(self, kind)

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """Adds the kind of each layer; "greedy" means one group of all experts."""
        if hf.get("topk_method") in (None, "greedy"):
            hf = hf | {"topk_method": "group_limited_greedy", "n_group": 1, "topk_group": 1}
        return rope_config.read(dense_first.read(latent.read(hf), first=0))

    def to_hf(self) -> dict[str, object]:
        """The `config.json` of this Config, for a model that was not loaded from a folder."""
        return latent.written(dense_first.written(super().to_hf()))


Model = latent_model.Model
HF_WEIGHTS = latent_model.table()

HF_PACKED = experts.IN_ONE_TENSOR

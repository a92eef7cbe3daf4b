"""DeepSeek V2 and V2 Lite: latent attention, and softmax routers over groups of experts.

Agrees with transformers/models/deepseek_v2/modeling_deepseek_v2.py.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
from jaxtyping import Array, Float, Int

from zoo.parts import (
    causal_lm,
    dense_first,
    experts,
    hf_config,
    latent,
    layers,
    mixing,
    mlp,
    rope,
    rope_config,
    spans,
    stack,
)
from zoo.parts.dense_first import DENSE, SPARSE


@dataclasses.dataclass(frozen=True)
class Config(hf_config.Config):
    """Field names are the keys of an HF `config.json`."""

    model_type: ClassVar[str] = "deepseek_v2"
    architecture: ClassVar[str] = "DeepseekV2ForCausalLM"
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

    # What HF lets a config choose and this file does not.
    fixed: ClassVar[dict[str, object]] = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "norm_topk_prob": False, "moe_layer_freq": 1,
    }  # fmt: skip
    # Of losses and of serving.
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
        """Of every layer, whether it has experts."""
        return self.mlp_layer_types

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return hf_config.sizes(self) | latent.sizes_of(self)

    def sizes_of(self, kind: str) -> dict[str, int]:
        """Experts are narrower than the MLP of a dense layer."""
        return super().sizes_of(kind) | dense_first.sizes_of(self, kind)

    @classmethod
    def respelled(cls, hf: dict[str, object]) -> dict[str, object]:
        """With a kind for each layer; "greedy" is one group of all experts."""
        if hf.get("topk_method") in (None, "greedy"):
            hf = hf | {"topk_method": "group_limited_greedy", "n_group": 1, "topk_group": 1}
        return rope_config.read(dense_first.read(latent.read(hf), first=0))

    def to_hf(self) -> dict[str, object]:
        """A `config.json` for a model that was not read from one."""
        return latent.written(dense_first.written(super().to_hf()))


class Block(nnx.Module):
    """All layers of a kind at once: every weight has a leading L."""

    def __init__(self, config: Config, rngs: nnx.Rngs, kind: str):
        sizes = config.sizes_of(kind)
        norm = lambda: layers.RmsNorm("L D", sizes, rngs, eps=config.rms_norm_eps)
        self.attention_norm = norm()
        self.attention = latent.LatentAttention(config, sizes, rngs)
        self.mlp_norm = norm()
        if kind == DENSE:
            self.mlp = mlp.GatedMlp(sizes, rngs)
        else:
            choice = dense_first.choice(config, jax.nn.softmax, best=1)
            self.mlp = dense_first.WithShared(config, sizes, rngs, choice)

    def __call__(
        self, x: Float[Array, "B T D"], mix: mixing.Mix, turn: rope.Turn
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), mix, turn)
        return x + self.mlp(self.mlp_norm(x))


class Model(causal_lm.CausalLM):
    Block: ClassVar = {kind: functools.partial(Block, kind=kind) for kind in (DENSE, SPARSE)}
    keeps: ClassVar = dict.fromkeys((DENSE, SPARSE), latent.KEEPS)

    def residual(
        self, tokens: Int[Array, "B T"], where: spans.Spans, run: stack.Run = stack.run
    ) -> Float[Array, "B T D"]:
        """The residual stream after the last norm; `run` applies the blocks."""
        turn = rope.turn(self.config.rope_parameters, self.config.qk_rope_head_dim, where)
        x = layers.embed(self.embedding, tokens, self.dtype)
        return self.norm(run(self, x, where, turn))


# Our weight -> its HF name in a layer, and its axes there.
IN_EVERY_LAYER = {
    "attention_norm.scale": ("input_layernorm.weight", "D"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "D"),
    **latent.HF_WEIGHTS,
}
HF_WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", "V D"),
    "norm.scale": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V D"),
    **hf_config.of_kinds(
        {kind: IN_EVERY_LAYER | dense_first.MLP_OF[kind] for kind in (DENSE, SPARSE)}
    ),
}

HF_PACKED = experts.IN_ONE_TENSOR

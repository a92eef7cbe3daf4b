"""Small twins of every architecture: transformers' own model, and the folder it writes.

One entry a family, three shapes or more each: key heads, tied and untied, odd sizes, each kind of
rope and window that the family has.
"""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

import numpy as np

import zoo

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
ODD = dict(vocab_size=101, hidden_size=44, intermediate_size=52, head_dim=10)
LINEAR = dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))
DYNAMIC = dict(
    rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
    max_position_embeddings=24,
)
LLAMA3 = dict(
    rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=16,
    )
)  # fmt: skip
YARN = dict(
    rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=1024
    )
)
YARN_OF_OSS = dict(
    rope_parameters=dict(
        rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0,
        truncate=False, original_max_position_embeddings=4096,
    )
)  # fmt: skip


def longrope(pairs: int, old: int, theta: float = 1e4) -> dict:
    """Phi's rope, with factors that grow along the pairs of channels."""
    return dict(
        original_max_position_embeddings=old,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=theta, original_max_position_embeddings=old,
            short_factor=[1 + i / 10 for i in range(pairs)],
            long_factor=[1 + i for i in range(pairs)],
        ),
    )  # fmt: skip


def two(full: dict, sliding: dict) -> dict:
    return dict(rope_parameters=dict(full_attention=full, sliding_attention=sliding))


PLAIN_ROPE = dict(rope_type="default", rope_theta=1e4)
GQA = {
    "plain": {},
    "tied, odd": ODD | dict(tie_word_embeddings=True, num_key_value_heads=4),
    "one key head": dict(num_key_value_heads=1, tie_word_embeddings=False),
}
SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, decoder_sparse_step=1)
GEMMA = dict(head_dim=12, num_hidden_layers=3)
GEMMA3 = GEMMA | dict(query_pre_attn_scalar=24, sliding_window=6, sliding_window_pattern=3)
OSS = dict(
    num_local_experts=6, num_experts_per_tok=2, head_dim=8, sliding_window=6,
    intermediate_size=32,
) | YARN_OF_OSS  # fmt: skip
GRANITE = dict(
    embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=4.0,
)  # fmt: skip
QWEN35 = dict(
    num_hidden_layers=4, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=6,
)  # fmt: skip
EXPERTS35 = dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
    shared_expert_intermediate_size=12,
)  # fmt: skip
MINISTRAL3 = dict(head_dim=8, rope_parameters=dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, beta_fast=32.0, beta_slow=1.0,
    original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
))  # fmt: skip
GEMMA4 = dict(
    head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
    hidden_size_per_layer_input=0, sliding_window=6, num_hidden_layers=7,
    final_logit_softcapping=30.0,
)  # fmt: skip
# Says nothing of inputs of each layer, which it has not.
UNIFIED = {key: v for key, v in GEMMA4.items() if key != "hidden_size_per_layer_input"}
GLM4 = dict(
    head_dim=8, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=20, routed_scaling_factor=1.5,
)  # fmt: skip
DEEPSEEK = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=6, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=20, n_group=1, topk_group=1,
)  # fmt: skip
INDEXED = dict(index_n_heads=2, index_head_dim=8, index_topk=128)
LLAMA4 = dict(
    head_dim=8, intermediate_size=20, intermediate_size_mlp=40, num_local_experts=4,
    num_experts_per_tok=1, attention_chunk_size=16, floor_scale=8, num_hidden_layers=4,
)  # fmt: skip
YARN_OF_DEEPSEEK = dict(qk_rope_head_dim=8, rope_parameters=dict(
    rope_type="yarn", rope_theta=1e4, factor=40.0, beta_fast=32.0, beta_slow=1.0, mscale=0.7,
    mscale_all_dim=1.0, original_max_position_embeddings=1024,
))  # fmt: skip
MISTRAL4 = dict(qk_rope_head_dim=8, rope_parameters=dict(
    rope_type="yarn", rope_theta=1e4, factor=16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
    mscale_all_dim=1.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1,
))  # fmt: skip
MINIMAX = dict(
    head_dim=8,
    num_local_experts=6,
    num_experts_per_tok=2,
    intermediate_size=20,
    rotary_dim=4,
)
ALL_HEADS = dict(num_key_value_heads=None, head_dim=None)  # keys that the family does not have
GRANITE4 = GRANITE | dict(
    num_hidden_layers=2, layer_types=["mamba", "attention"], shared_intermediate_size=28,
    mamba_n_heads=4, mamba_d_state=10, num_local_experts=0, position_embedding_type="rope",
)  # fmt: skip
FALCON_H1 = dict(
    mamba_d_ssm=48, mamba_n_heads=4, mamba_d_state=10, embedding_multiplier=3.0,
    lm_head_multiplier=0.2, key_multiplier=0.4, attention_in_multiplier=1.5,
    attention_out_multiplier=0.7, ssm_in_multiplier=0.8, ssm_out_multiplier=0.3,
    ssm_multipliers=[0.3, 0.5, 0.7, 1.2, 0.9], mlp_multipliers=[0.6, 0.4],
)  # fmt: skip
NEMOTRON_H = dict(
    head_dim=8, mamba_num_heads=4, mamba_head_dim=12, n_groups=1, ssm_state_size=10,
    n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
    moe_shared_expert_intermediate_size=28, routed_scaling_factor=2.5,
)  # fmt: skip
LFM2 = dict(num_hidden_layers=5, block_multiple_of=8, full_attn_idxs=[1, 4])
LFM2_MOE = dict(
    num_hidden_layers=5, num_dense_layers=1, num_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=20,
    layer_types=["conv", "full_attention", "conv", "conv", "full_attention"],
)  # fmt: skip
GPT2 = dict(vocab_size=97, n_positions=96, n_embd=32, n_layer=3, n_head=4, bos_token_id=1,
            eos_token_id=2)  # fmt: skip

HUNYUAN = dict(head_dim=8, rope_parameters=dict(
    rope_type="dynamic", rope_theta=1e4, alpha=1000.0, factor=1.0, beta_fast=32, beta_slow=1,
    mscale=1.0, mscale_all_dim=1.0,
))  # fmt: skip

# Family -> shapes: what a config says beside SIZES. The first is plain, the last the richest, with
# most of what the family can have: windows, caps, both kinds of layer.
TWINS: dict[str, dict[str, dict]] = {
    "llama": GQA | {
        "linear": LINEAR, "dynamic": DYNAMIC, "yarn": YARN,
        "biases": dict(attention_bias=True, mlp_bias=True), "llama3": LLAMA3,
    },
    "qwen2": {
        "plain": {},
        "tied, odd": dict(
            ODD, head_dim=11 * 2, hidden_size=44, num_attention_heads=2, num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        "yarn": YARN,
        "window": SLIDING,
    },
    "qwen3": GQA | {"yarn": YARN | dict(head_dim=8), "window": SLIDING | dict(head_dim=16)},
    "qwen3_5_text": {
        "plain": QWEN35,
        "tied, as many keys": QWEN35 | dict(
            num_hidden_layers=3, linear_num_key_heads=4, tie_word_embeddings=True, head_dim=8,
            layer_types=["full_attention", "linear_attention", "linear_attention"],
        ),
        "odd, one key head": QWEN35 | dict(
            hidden_size=44, vocab_size=101, num_key_value_heads=1, linear_num_key_heads=1,
            linear_num_value_heads=3, linear_conv_kernel_dim=3, num_hidden_layers=7,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e5, partial_rotary_factor=0.5,
                mrope_section=[2, 1, 1], mrope_interleaved=True,
            ),
        ),
    },
    "qwen3_5_moe_text": {
        "plain": QWEN35 | EXPERTS35,
        "tied, as many keys": QWEN35 | EXPERTS35 | dict(
            num_hidden_layers=3, linear_num_key_heads=4, tie_word_embeddings=True, head_dim=8,
            layer_types=["full_attention", "linear_attention", "linear_attention"],
        ),
        "odd, one key head": QWEN35 | EXPERTS35 | dict(
            hidden_size=44, vocab_size=101, num_key_value_heads=1, linear_num_key_heads=1,
            linear_num_value_heads=3, num_experts=7, num_experts_per_tok=3, num_hidden_layers=4,
        ),
    },
    "qwen3_next": {
        "plain": QWEN35 | EXPERTS35,
        "tied, as many keys": QWEN35 | EXPERTS35 | dict(
            num_hidden_layers=3, linear_num_key_heads=4, tie_word_embeddings=True, head_dim=8,
            layer_types=["full_attention", "linear_attention", "linear_attention"],
        ),
        "odd, one key head": QWEN35 | EXPERTS35 | dict(
            hidden_size=44, vocab_size=101, num_key_value_heads=1, linear_num_key_heads=1,
            linear_num_value_heads=3, num_experts=7, num_experts_per_tok=3,
        ),
    },
    "gemma2": {
        "plain": GEMMA | dict(query_pre_attn_scalar=24, sliding_window=6),
        "no caps, one key head": GEMMA | dict(
            num_key_value_heads=1, attn_logit_softcapping=None, final_logit_softcapping=None,
            sliding_window=4,
        ),
        "untied, odd": dict(
            ODD, tie_word_embeddings=False, query_pre_attn_scalar=9, sliding_window=3,
            attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        ),
    },
    "gemma3_text": {
        "plain": GEMMA3,
        "untied, odd": GEMMA3 | ODD | dict(
            tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
        "scaled, capped": GEMMA3 | dict(
            num_key_value_heads=1, final_logit_softcapping=4.0,
        ) | two(
            dict(rope_type="linear", rope_theta=1e6, factor=8.0), dict(PLAIN_ROPE),
        ),
    },
    "gemma4_text": {
        "plain": GEMMA4,
        "untied, odd, values of their own": GEMMA4 | ODD | dict(
            tie_word_embeddings=False, attention_k_eq_v=False, num_hidden_layers=4,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
        "inputs of each layer, shared keys": GEMMA4 | dict(
            attention_k_eq_v=False, num_key_value_heads=1, hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=97, num_kv_shared_layers=4, use_double_wide_mlp=True,
            num_hidden_layers=12, layer_types=["sliding_attention", "full_attention"] * 6,
        ),
        "experts, one key head": GEMMA4 | dict(
            num_key_value_heads=1, enable_moe_block=True, num_experts=6, top_k_experts=2,
            moe_intermediate_size=20, final_logit_softcapping=4.0,
        ),
    },
    "gemma4_unified_text": {
        "plain": UNIFIED,
        "untied, odd, values of their own": UNIFIED | ODD | dict(
            tie_word_embeddings=False, attention_k_eq_v=False, num_hidden_layers=4,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
        "shared keys, wide": UNIFIED | dict(
            num_kv_shared_layers=2, use_double_wide_mlp=True, num_hidden_layers=6,
            layer_types=["sliding_attention", "full_attention"] * 3,
        ),
    },
    "deepseek_v2": {
        "plain": DEEPSEEK | dict(first_k_dense_replace=1),
        "tied, odd, no latent of queries": DEEPSEEK | dict(
            tie_word_embeddings=True, vocab_size=101, hidden_size=42, q_lora_rank=None,
            v_head_dim=14, n_routed_experts=7, num_experts_per_tok=3, num_attention_heads=3,
            num_key_value_heads=3, routed_scaling_factor=2.0,
        ),
        "groups, yarn": DEEPSEEK | YARN_OF_DEEPSEEK | dict(
            topk_method="group_limited_greedy", n_routed_experts=12, n_group=4, topk_group=2,
            num_experts_per_tok=3, n_shared_experts=2, first_k_dense_replace=2,
            num_hidden_layers=5,
        ),
    },
    "deepseek_v3": {
        "plain": DEEPSEEK | dict(first_k_dense_replace=1),
        "tied, odd, no latent of queries": DEEPSEEK | dict(
            first_k_dense_replace=0, tie_word_embeddings=True, norm_topk_prob=False,
            vocab_size=101, hidden_size=44, q_lora_rank=None, v_head_dim=14, n_routed_experts=7,
            num_experts_per_tok=3, num_attention_heads=3, num_key_value_heads=3,
        ),
        "groups, yarn": DEEPSEEK | YARN_OF_DEEPSEEK | dict(
            n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3,
            n_shared_experts=2, first_k_dense_replace=2, num_hidden_layers=5,
        ),
    },
    "deepseek_v32": {
        "plain": DEEPSEEK | INDEXED | dict(first_k_dense_replace=1),
        "tied, odd, not normed": DEEPSEEK | INDEXED | dict(
            first_k_dense_replace=0, tie_word_embeddings=True, norm_topk_prob=False,
            vocab_size=101, hidden_size=44, v_head_dim=14, n_routed_experts=7,
            num_experts_per_tok=3, num_attention_heads=3, num_key_value_heads=3,
        ),
        "groups, yarn": DEEPSEEK | INDEXED | YARN_OF_DEEPSEEK | dict(
            n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3,
            n_shared_experts=2, first_k_dense_replace=2, num_hidden_layers=5,
        ),
    },
    "glm_moe_dsa": {
        "plain": DEEPSEEK | INDEXED | dict(first_k_dense_replace=1),
        "tied, odd, shared choices": DEEPSEEK | INDEXED | dict(
            mlp_layer_types=["sparse"] * 4, indexer_types=["full", "shared"] * 2,
            tie_word_embeddings=True, norm_topk_prob=False, num_hidden_layers=4,
            vocab_size=101, hidden_size=44, v_head_dim=14, n_routed_experts=7,
            num_experts_per_tok=3, num_attention_heads=3, num_key_value_heads=3,
        ),
        "groups, sparse first": DEEPSEEK | INDEXED | dict(
            n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3,
            n_shared_experts=2, num_hidden_layers=4,
            mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        ),
    },
    "llama4_text": {
        "plain": LLAMA4,
        "tied, odd, some dense, not normed": LLAMA4 | ODD | dict(
            tie_word_embeddings=True, use_qk_norm=False, interleave_moe_layer_step=2,
            attention_chunk_size=7, num_experts_per_tok=2, num_local_experts=5,
        ),
        "no chunks, one key head": LLAMA4 | LLAMA3 | dict(
            num_key_value_heads=1, attention_chunk_size=None, moe_layers=[1], num_hidden_layers=3,
            no_rope_layers=[0, 1, 1], attn_temperature_tuning=False,
        ),
        "dense first": LLAMA4 | LLAMA3 | dict(
            moe_layers=[1, 2, 4], num_hidden_layers=5, no_rope_layers=[1, 0, 1, 1, 0],
            num_experts_per_tok=2, attn_scale=0.4, floor_scale=5,
        ),
    },
    "glm4_moe": {
        "plain": GLM4,
        "tied, odd, all sparse": GLM4 | ODD | dict(
            head_dim=12,
            first_k_dense_replace=0, tie_word_embeddings=True, norm_topk_prob=False,
            attention_bias=True, n_routed_experts=7, num_experts_per_tok=3,
        ),
        "groups, one key head": GLM4 | dict(
            num_key_value_heads=1, n_routed_experts=12, n_group=4, topk_group=2,
            num_experts_per_tok=3, n_shared_experts=2, first_k_dense_replace=2, use_qk_norm=True,
            num_hidden_layers=5, attention_bias=True,
        ),
    },
    "glm4_moe_lite": {
        "plain": DEEPSEEK,
        "tied, odd, all sparse": DEEPSEEK | dict(
            mlp_layer_types=["sparse"] * 3, tie_word_embeddings=True, norm_topk_prob=False,
            vocab_size=101, hidden_size=44, v_head_dim=14, n_routed_experts=7,
            num_experts_per_tok=3, num_attention_heads=3, num_key_value_heads=3,
        ),
        "groups, sparse first": DEEPSEEK | dict(
            n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3,
            n_shared_experts=2, num_hidden_layers=4, q_lora_rank=None,
            mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
        ),
    },
    "gemma": {
        "plain": GEMMA,
        "untied, odd": dict(ODD, tie_word_embeddings=False),
        "one key head": GEMMA | dict(num_key_value_heads=1),
    },
    "mistral": {
        "plain": dict(sliding_window=None),
        "tied, odd": dict(ODD, sliding_window=9, tie_word_embeddings=True),
        "window": dict(sliding_window=6),
    },
    "ministral3": {
        "plain": MINISTRAL3,
        "tied, odd": MINISTRAL3 | ODD | dict(sliding_window=9, tie_word_embeddings=True),
        "one key head": dict(head_dim=8, num_key_value_heads=1, rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=4.0, beta_fast=4.0, beta_slow=1.0,
            original_max_position_embeddings=7, mscale=1.0, mscale_all_dim=0.0,
            llama_4_scaling_beta=0.3,
        )),
    },
    "minimax_m2": {
        "plain": MINIMAX,
        "tied, odd, whole heads": MINIMAX | ODD | dict(
            rotary_dim=10, tie_word_embeddings=True, num_local_experts=7, num_experts_per_tok=3,
        ),
        "one key head": MINIMAX | dict(num_key_value_heads=1, rotary_dim=4),
    },
    "mistral4": {
        "plain": DEEPSEEK | MISTRAL4,
        "tied, odd, no latent of queries": DEEPSEEK | MISTRAL4 | dict(
            tie_word_embeddings=True, norm_topk_prob=False, vocab_size=101, hidden_size=44,
            q_lora_rank=None, v_head_dim=14, n_routed_experts=7, num_experts_per_tok=3,
            num_attention_heads=3, num_key_value_heads=3, first_k_dense_replace=1,
        ),
        "groups, two shared": DEEPSEEK | MISTRAL4 | dict(
            rope_parameters=MISTRAL4["rope_parameters"] | dict(
                beta_fast=4.0, original_max_position_embeddings=7, mscale=0.7,
            ),
            n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3,
            n_shared_experts=2, routed_scaling_factor=1.5, first_k_dense_replace=1,
        ),
    },
    "nemotron_h": {
        "plain": NEMOTRON_H | dict(
            layers_block_type=["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"],
        ),
        "odd, no experts": NEMOTRON_H | ODD | dict(
            num_key_value_heads=4, hybrid_override_pattern="M-M*-M-", conv_kernel=3,
        ),
        "latent, groups, one key head": NEMOTRON_H | dict(
            layers_block_type=["mamba", "moe", "attention", "moe", "mamba", "mlp"],
            moe_latent_size=14, mamba_num_heads=6, n_groups=3, num_key_value_heads=1,
            n_routed_experts=7, num_experts_per_tok=3,
        ),
    },
    "olmo2": {
        "plain": {},
        "tied, all key heads": dict(num_key_value_heads=4, tie_word_embeddings=True, vocab_size=99),
        "one key head, linear": dict(num_key_value_heads=1) | LINEAR,
    },
    "olmo3": {
        "plain": dict(sliding_window=5, num_hidden_layers=4),
        "tied, all full": dict(
            layer_types=["full_attention"] * 3, tie_word_embeddings=True, vocab_size=101,
        ),
        "yarn": dict(sliding_window=6, num_hidden_layers=4, num_key_value_heads=4) | two(
            dict(
                rope_type="yarn", rope_theta=5e5, factor=8.0, original_max_position_embeddings=8192,
                attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0,
            ),
            dict(rope_type="default", rope_theta=5e5),
        ),
    },
    "olmoe": {
        "plain": dict(num_experts=6, num_experts_per_tok=2, intermediate_size=20),
        "tied, to one, all key heads": dict(
            num_experts=5, num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=True,
            num_key_value_heads=4, hidden_size=48, vocab_size=101,
        ),
        "one key head": dict(num_experts=7, num_experts_per_tok=3, num_key_value_heads=1),
    },
    "qwen2_moe": {
        "plain": EXPERTS35,
        "tied, to one, all key heads": EXPERTS35 | dict(
            num_experts=5, num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=True,
            num_key_value_heads=4, hidden_size=48, vocab_size=101,
        ),
        "one key head": EXPERTS35 | dict(
            num_experts=7, num_key_value_heads=1, head_dim=10, shared_expert_intermediate_size=28,
        ),
    },
    "qwen3_moe": {
        "plain": MOE | dict(head_dim=8, norm_topk_prob=True),
        "tied, not to one": MOE | dict(
            head_dim=10, norm_topk_prob=False, tie_word_embeddings=True, num_experts=5,
            num_experts_per_tok=3,
        ),
        "window": MOE | dict(
            head_dim=8, use_sliding_window=True, sliding_window=6, num_key_value_heads=1,
        ),
    },
    "mixtral": {
        "plain": dict(num_local_experts=4, num_experts_per_tok=2),
        "tied, odd": dict(
            ODD, num_local_experts=5, num_experts_per_tok=3, tie_word_embeddings=True,
        ),
        "window": dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=6),
    },
    "seed_oss": {
        "plain": dict(head_dim=8),
        "tied, odd": dict(ODD, num_key_value_heads=4, tie_word_embeddings=True),
        "one key head, wide": dict(head_dim=16, num_key_value_heads=1, vocab_size=101),
    },
    "smollm3": {
        "plain": dict(num_hidden_layers=4),
        "untied, own layers": dict(
            tie_word_embeddings=False, no_rope_layers=[0, 1, 1], num_key_value_heads=1,
        ),
        "window, yarn": dict(
            num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True,
            sliding_window=5,
        ) | YARN,
    },
    "gpt_neox": {
        "plain": ALL_HEADS,
        "tied, odd, all turned": ALL_HEADS | dict(
            hidden_size=44, num_attention_heads=2, vocab_size=101, tie_word_embeddings=True,
            rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=1.0),
        ),
        "one after the other, linear": ALL_HEADS | dict(
            use_parallel_residual=False, hidden_act="gelu_fast", rope_parameters=dict(
                rope_type="linear", rope_theta=1e4, factor=4.0, partial_rotary_factor=0.5,
            ),
        ),
    },
    "stablelm": {
        "plain": dict(head_dim=None),
        "tied, odd, biases, all turned": dict(
            hidden_size=44, num_attention_heads=2, num_key_value_heads=2, vocab_size=101,
            tie_word_embeddings=True, use_qkv_bias=True, partial_rotary_factor=1.0,
        ),
        "beside, norms of heads": dict(
            use_parallel_residual=True, qk_layernorm=True, rope_parameters=dict(
                rope_type="linear", rope_theta=1e4, factor=4.0, partial_rotary_factor=0.5,
            ),
        ),
    },
    "starcoder2": {
        "plain": {},
        "untied, odd": dict(ODD, num_key_value_heads=4, tie_word_embeddings=False),
        "window, one key head": dict(sliding_window=6, num_key_value_heads=1, vocab_size=101),
    },
    "phi3": {
        "plain": {},
        "long factors": longrope(4, 16) | dict(max_position_embeddings=128),
        "short factors, partial": longrope(3, 64) | dict(
            num_attention_heads=4, hidden_size=32, partial_rotary_factor=0.75,
            tie_word_embeddings=True, max_position_embeddings=128,
        ),
        "window, one key head": dict(sliding_window=6, num_key_value_heads=1),
    },
    "gpt_oss": {
        "plain": OSS,
        "odd": OSS | dict(
            hidden_size=44, vocab_size=101, head_dim=10, num_key_value_heads=4,
            num_local_experts=3, num_experts_per_tok=3, swiglu_limit=0.5, sliding_window=3,
        ),
        "one key head": OSS | dict(num_key_value_heads=1, intermediate_size=40),
    },
    "gpt2": {
        "plain": GPT2,
        "inner": GPT2 | dict(n_inner=40, n_embd=24, vocab_size=101),
        "untied, one head": GPT2 | dict(n_head=1, tie_word_embeddings=False),
    },
    "granite": {shape: GRANITE | said for shape, said in GQA.items()},
    "lfm2": {
        "plain": LFM2,
        "untied, odd, own width": LFM2 | ODD | dict(
            tie_word_embeddings=False, block_auto_adjust_ff_dim=False, num_key_value_heads=4,
            num_hidden_layers=3, layer_types=["full_attention", "conv", "conv"],
        ),
        "long taps, one key head": LFM2 | dict(
            block_ffn_dim_multiplier=1.3, block_multiple_of=5, conv_L_cache=7, norm_eps=1e-3,
            num_key_value_heads=1, rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
    },
    "lfm2_moe": {
        "plain": LFM2_MOE | dict(
            num_hidden_layers=2, layer_types=["conv", "full_attention"],
        ),
        "untied, odd, all sparse": LFM2_MOE | ODD | dict(
            num_dense_layers=0, tie_word_embeddings=False, num_key_value_heads=4,
            num_experts=7, num_experts_per_tok=3,
        ),
        "long taps, one key head": LFM2_MOE | dict(
            num_dense_layers=2, conv_L_cache=7, norm_eps=1e-3, num_key_value_heads=1,
            routed_scaling_factor=1.5,
        ),
    },
    "falcon_h1": {
        "plain": dict(mamba_d_ssm=48, mamba_n_heads=4, mamba_d_state=10),
        "tied, odd": FALCON_H1 | ODD | dict(
            tie_word_embeddings=True, mamba_d_ssm=None, mamba_expand=1, mamba_d_conv=3,
            num_key_value_heads=4,
        ),
        "norm, groups, one key head": FALCON_H1 | dict(
            num_key_value_heads=1, mamba_rms_norm=True, mamba_norm_before_gate=False,
            mamba_n_groups=2, num_hidden_layers=4,
        ),
    },
    "granitemoehybrid": {
        "plain": GRANITE4,
        "tied, odd, no positions": GRANITE4 | dict(
            vocab_size=101, hidden_size=44, head_dim=10, num_key_value_heads=4,
            tie_word_embeddings=True, position_embedding_type="nope", num_hidden_layers=5,
            mamba_d_conv=3, mamba_expand=1,
            layer_types=["mamba", "mamba", "attention", "mamba", "mamba"],
        ),
        "attention alone": GRANITE4 | dict(layer_types=["attention"] * 2),
        "experts, groups, one key head": GRANITE4 | dict(
            num_key_value_heads=1, num_hidden_layers=6, mamba_n_heads=8, mamba_n_groups=2,
            layer_types=["mamba", "mamba", "attention"] * 2, num_local_experts=6,
            num_experts_per_tok=2, intermediate_size=20,
        ),
    },
    "cohere2": {
        "plain": dict(sliding_window=6),
        "untied": dict(tie_word_embeddings=False, sliding_window=5, logit_scale=0.3),
        "one key head, pattern of two": dict(
            num_key_value_heads=1, sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    },
    "ernie4_5": {
        "plain": dict(head_dim=8),
        "untied, odd": dict(ODD, num_key_value_heads=4, tie_word_embeddings=False),
        "one key head, wide": dict(head_dim=16, num_key_value_heads=1, vocab_size=101),
    },
    "apertus": {
        "plain": LLAMA3,
        "tied, odd, its own rope": dict(ODD, num_key_value_heads=4, tie_word_embeddings=True),
        "one key head, wide": LLAMA3 | dict(head_dim=16, num_key_value_heads=1, vocab_size=101),
    },
    "exaone4": {
        "plain": dict(sliding_window=6, num_hidden_layers=4),
        "tied, odd, no window": ODD | LLAMA3 | dict(
            sliding_window=None, layer_types=["full_attention"] * 3, num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
        "one key head, own layers": LLAMA3 | dict(
            num_key_value_heads=1, sliding_window=4, head_dim=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    },
    "hunyuan_v1_dense": {
        "plain": HUNYUAN,
        "tied, odd, no alpha": dict(ODD, num_key_value_heads=4, tie_word_embeddings=True),
        "one key head, wide": HUNYUAN | dict(head_dim=16, num_key_value_heads=1, vocab_size=101),
    },
}  # fmt: skip
RICHEST = {family: list(shapes)[-1] for family, shapes in TWINS.items()}
SHAPES = [(family, shape) for family, shapes in TWINS.items() for shape in shapes]

# Every family with one rope, and every kind of it: two layers, heads of 8. Phi has the default and
# longrope alone, gpt-oss and SmolLM3 come with their windows and layers without positions above.
KINDS = {"linear": LINEAR, "dynamic": DYNAMIC, "llama3": LLAMA3, "yarn": YARN,
         "longrope": longrope(4, 16) | dict(max_position_embeddings=64)}  # fmt: skip
# All families but those with a rope for each kind of layer, one for a part of the head or in some
# layers, or none.
OWN_ROPES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "gemma3_text", "gemma4_text",
    "gemma4_unified_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_neox",
    "llama4_text", "minimax_m2", "ministral3", "mistral4", "nemotron_h", "olmo3", "phi3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "stablelm",
)  # fmt: skip
WITH_ONE_ROPE = [f for f in TWINS if f not in OWN_ROPES]
ROPES = {(family, kind): {"num_hidden_layers": 2, "head_dim": 8} | said
         for family in WITH_ONE_ROPE for kind, said in KINDS.items()}  # fmt: skip
# Families with a rope for each kind of layer: those whose angles depend on the length are refused.
ROPES |= {
    (family, kind): {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    | two(KINDS[kind]["rope_parameters"], dict(PLAIN_ROPE))
    for family in ("gemma3_text", "olmo3") for kind in ("linear", "llama3", "yarn")
}  # fmt: skip

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 40))


def config_of(family: str, shape: str):
    """Transformers' config of a twin."""
    import transformers

    first = next(iter(TWINS[family].values()))
    said = TWINS[family].get(shape) or first | ROPES.get((family, shape), {})
    return transformers.AutoConfig.for_model(family, **(said if family == "gpt2" else SIZES | said))


def untrained(family: str, shape: str):
    """Our model of a twin's config, without torch, with large weights half as large as the twin's.

    With weights of full size float32 itself moves a log-probability of -13 by 1.7e-5 between two
    shapes of the same text.
    """
    from flax import nnx

    from tests.conftest import large_weights

    arch = zoo.ARCHITECTURES[family]
    said = json.loads(config_of(family, shape).to_json_string(use_diff=True))
    model = large_weights(arch.Model(arch.Config.from_hf(said), nnx.Rngs(0)), scale=0.5)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "decay_log":  # so slow that a text is remembered
            nnx.update(model, nnx.from_flat_state([(path, param.replace(param[...] - 3))]))
    return model


def class_of(family: str):
    """Transformers' class of a twin, which Mistral 4 has as a half of another model alone."""
    import transformers

    return getattr(transformers, zoo.ARCHITECTURES[family].Config.architecture)


@functools.cache
def twin(family: str, shape: str):
    """Transformers' model with large weights, in float32, and the folder it was written to."""
    import torch

    torch.manual_seed(0)
    how = dict(attn_implementation="eager", experts_implementation="eager")
    model = class_of(family)._from_config(config_of(family, shape), **how)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if name.endswith("scale") or "bias" in name:  # of Gemma 4's router: 1 and a little
                weight.add_(0.1 * noise)
            elif name.endswith("A_log"):  # so slow that a text is remembered
                weight.copy_(noise - 2)
            elif weight.ndim == 1:  # norms, sinks
                weight.add_(0.3 * noise)
            else:
                fan_in = weight.shape[-1]
                if ("gate_up_proj" in name and family == "gpt_oss") or family == "gpt2":
                    fan_in = weight.shape[-2]
                weight.copy_(0.5 * (32 / fan_in) ** 0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "act_fn.beta")):
                buffer.copy_(1 + 0.1 * torch.randn(buffer.shape, generator=draw))
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=draw))
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"twin-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.eval().save_pretrained(folder)
    return model, folder


def logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Of a torch model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.float().numpy()

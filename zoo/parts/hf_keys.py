"""Keys of a config.json beyond an architecture's fields: those that matter, and those that do not.

A key in no list is unknown: no known implementation reads it.
"""

from collections.abc import Mapping
import functools
import logging

_NAMES = """
    _attn_implementation _attn_implementation_autoset _commit_hash _model_name_or_path
    _name_or_path architectures attn_implementation audio_token_id auto_map boa_token_id
    boi_token_id boi_token_index bos_token_id cls_token_id context_length decoder_start_token_id
    dtype eoa_token_id eoa_token_index eod_token_id eoi_token_id eoi_token_index eos_token_id
    experts_implementation image_token_id image_token_index is_decoder mask_token_id
    max_position_embeddings max_seq_len max_sequence_length model_max_length model_type
    name_or_path output_attentions output_hidden_states output_router_logits pad_token_id prefix
    return_dict sep_token_id tie_last_hidden_states tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version
    use_bfloat16 use_cache use_return_dict video_token_id vision_end_token_id
    vision_start_token_id
"""
_GENERATION = """
    bad_words_ids begin_suppress_tokens cache_implementation diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    min_new_tokens min_p no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
"""
_TRAINING = """
    _num_labels activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop
    aux_loss_coef classifier_activation classifier_dropout classifier_dropout_prob
    decoder_layerdrop disable_ngram_loss dropout dropout_p emb_pdrop embd_pdrop embed_dropout
    embed_init_std embedding_dropout embedding_initializer_range encoder_layerdrop
    finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label
    init_device init_std initializer_cutoff_factor initializer_factor initializer_range
    input_jitter_noise label2id layerdrop local_attention_probs_dropout_prob
    lsh_attention_probs_dropout_prob mlp_dropout moe_jitter_eps mtp_loss_scaling_factor
    num_labels pretraining_tp problem_type resid_dropout resid_pdrop residual_dropout
    router_aux_loss_coef router_jitter_noise seed summary_first_dropout summary_last_dropout
    task_specific_params tf_legacy_loss w_init_variance_scale z_loss_coefficient
"""
# Keys that never change the logits: names, what is returned, sampling, dropout, losses and initial
# weights.
IGNORED = frozenset((_NAMES + _GENERATION + _TRAINING).split())

# Keys that some implementation reads, and the value at which they have no effect: transformers
# writes many of them into every file.
NEUTRAL: dict[str, object] = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_bias": False,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "logit_scale": 1,
    "mlp_bias": False,
    "mlp_only_layers": [],
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "qk_layernorm": False,
    "quantization_config": {},
    "rope_interleaved": False,
    "rope_ratio": 1,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}


def without_effect(hf: Mapping[str, object]) -> set[str]:
    """Keys without effect given the other keys: windows that are off, layers all alike."""
    off = hf.get("use_sliding_window") is False or hf.get("sliding_window") is None
    kinds = hf.get("layer_types")
    alike = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    return {*(["sliding_window", "max_window_layers"] * off), *(["layer_types"] * alike)}


# Keys that only vLLM reads, or that a file has among its rope keys.
_ELSEWHERE = """
    attn_output_gate attn_type_list llama_4_scaling_beta mamba_ssm_dtype qk_norm_type rotary_dim
    use_routing_bias
"""
# Keys that name remote code or allow it to run: nothing here runs it, and no one should rely on it.
_CODE = "_attn_implementation_internal _target_ kernels model_file trust_remote_code"
# Keys that the decoders of transformers 5.24 read (the fields of every config that it maps to a
# causal LM, and the older spellings that it accepts), and that models with remote code read.
_READ = """
    H_cycles L_bp_cycles L_cycles _remove_final_layer_norm _sliding_window_pattern activation
    activation_function activation_sparsity_pattern adapter_layer_norm adapter_output_size
    adapter_rank adapter_reduction_factor adapter_reuse_layer_norm add_bias_linear
    add_cross_attention add_out_norm add_qkv_bias afn alibi altup_active_idx altup_coef_clip
    altup_correct_scale altup_num_inputs apply_query_key_layer_scaling
    apply_residual_connection_post_layernorm apply_spec_augment asm attention_bias
    attention_chunk_size attention_head_dim attention_head_size attention_heads
    attention_hidden_size attention_in_multiplier attention_k_eq_v attention_multiplier
    attention_out_bias attention_out_multiplier attention_sink_size attention_softmax_in_fp32
    attention_type attention_types attention_value_scale attention_window_size attn_config
    attn_layer_indices attn_layer_offset attn_layer_period attn_layers attn_logit_softcapping
    attn_scale attn_temperature_tuning attn_type audio_chunk_size audio_config audio_encoder
    audio_encoder_config audio_merge_size audio_soft_tokens_per_image audio_vocab_size
    autocast_kernel_dtype axial_norm_std axial_pos_embds axial_pos_embds_dim axial_pos_shape
    backbone_hidden_size bi_data bias block_auto_adjust_ff_dim block_configs block_ff_dim
    block_ffn_dim_multiplier block_multiple_of block_size block_types bos_index capacity_factor
    causal cca_time0 cca_time1 centroid_intermediate_top_k chain_hidden_post_norm chroma_length
    chunk_size chunk_size_feed_forward chunk_size_lm_head chunkwise_kernel clamp_len
    classifier_bias classifier_proj_size clip_qkv compress_rate_csa compress_rate_hca
    compress_rates compress_ratios compress_rope_theta compression_config concat_input
    conv1d_width conv_L_cache conv_bias conv_kernel conv_kernel_size cross_attention_hidden_size
    cross_attn_k d_head d_inner d_model d_rel decoder decoder_attention_heads decoder_bias
    decoder_config decoder_ffn_dim decoder_layers decoder_sparse_step decoder_vocab_size
    default_language dense_intermediate_size dense_mlp_idx depth_decoder_config dff dim_ff
    dim_head dim_model_base do_layer_norm_before dynamic_ntk emb_dim embed_dim embedding_dim
    embedding_fraction embedding_multiplier embedding_scale embedding_size enable_bias
    enable_moe_block enable_moe_fp32_combine enable_pronunciation enable_shape
    encoder_attention_heads encoder_config encoder_ffn_dim encoder_hash_byte_group_nb_functions
    encoder_hash_byte_group_size encoder_hash_byte_group_vocab encoder_layers end_n_top
    eos_index eps expand expansion_ratio expert_capacity expert_capacity_factor
    expert_ffn_hidden_size expert_layer_offset expert_layer_period expert_selection_fn
    feed_forward_size ff_activation ffn_config ffn_dim ffn_hidden_size ffn_proj_factor
    ffn_round_up_to_multiple_of final_logit_softcapping first_k_dense_replace floor_scale
    full_attention_interval full_attn_alpha_factor full_attn_beta_factor full_attn_idxs
    full_attn_mod gate_soft_cap gated_norm_rank gating gelu_activation
    global_attn_every_n_layers global_config global_head_dim global_rope_theta hash_seed
    hc_count hc_eps hc_lowrank hc_magnitude hc_mult hc_sinkhorn_iters head_dim heads_per_ngram
    hidden_act hidden_activation hidden_mamba_act hidden_size hidden_size_global
    hidden_size_per_layer_input hybrid_layer_ids hybrid_override_pattern image_seq_length
    image_size index_block_size index_head_dim index_local_blocks index_n_heads
    index_skip_topk_offset index_topk index_topk_blocks index_topk_freq index_topk_pattern
    indexer_budget indexer_compress_ratio indexer_head_dim indexer_kv_heads indexer_n_heads
    indexer_types inference_state_dtype input_embedding_size interleave_moe_layer_step
    interleaved_qkv intermediate_multiple_size intermediate_size intermediate_size_mlp
    interpolate_factor is_causal is_encoder is_encoder_decoder is_moe kda_lower_bound
    kda_safe_gate keep_window_size key_multiplier kv_channels kv_lora_rank kv_n_heads
    kv_sharing_modes lambda_std_dev lang_id languages laurel_rank layer_group_size
    layer_norm_elementwise_affine layer_norm_eps layer_norm_epsilon layer_rope_theta layer_types
    layernorm_embedding layers_block_type learnable_sink_init learned_pos_emb linear_a_log_max
    linear_a_log_min linear_allow_neg_eigval linear_attn_alpha_factor linear_attn_beta_factor
    linear_attn_config linear_conv_kernel_dim linear_dt_init_floor linear_dt_max linear_dt_min
    linear_head_dim linear_key_head_dim linear_num_heads linear_num_key_heads
    linear_num_value_heads linear_value_head_dim lm_head_bias lm_head_multiplier
    ln_before_adapter local_attention local_attention_window_len local_attn_chunk_length
    local_layer_ids local_num_chunks_after local_num_chunks_before local_rope_theta
    log_scaling_alpha log_scaling_n_floor logit_scale logits_mup_width_multiplier logits_scaling
    logits_soft_cap loop_config loop_gate_rank loop_layer_index_end loop_layer_index_start
    loop_num_passes lru_width lsh_attn_chunk_length lsh_num_chunks_after lsh_num_chunks_before
    make_ngram_vocab_size_divisible_by mamba_chunk_size mamba_conv_bias mamba_d_conv
    mamba_d_head mamba_d_ssm mamba_d_state mamba_dt_init_floor mamba_dt_limit mamba_dt_max
    mamba_dt_min mamba_dt_rank mamba_expand mamba_head_dim mamba_hidden_act mamba_n_groups
    mamba_n_heads mamba_ngroups mamba_norm_before_gate mamba_num_heads mamba_proj_bias
    mamba_rms_norm mamba_ssm_cache_dtype mask_feature_length mask_feature_min_masks
    mask_feature_prob mask_index mask_time_length mask_time_min_masks mask_time_prob
    max_inference_chunksize max_patch_length max_source_positions max_target_positions
    max_window_layers median_filter_width mem_len mixer_rms_eps mlp_alpha_factor mlp_beta_factor
    mlp_bias mlp_gate_softcap mlp_hidden_act mlp_layer_types mlp_multipliers mlp_only_layers
    mlp_up_softcap mm_tokens_per_image mode moe_apply_router_weight_on_input moe_capacity_factor
    moe_intermediate_size moe_k moe_latent_size moe_layer_end_index moe_layer_freq
    moe_layer_interval moe_layer_start_index moe_layers moe_norm_min moe_num_experts
    moe_num_shared_experts moe_renormalize moe_routed_scaling_factor
    moe_router_logit_softcapping moe_shared_expert_intermediate_size moe_shared_expert_overlap
    moe_topk mtp_config mtp_hidden_states_first mtp_hybrid_override_pattern mtp_layer_types
    mtp_layers_block_type mtp_local_layer_ids mtp_mlp_layer_types multi_query
    multi_query_attention multi_query_group_num mup_base_width mup_enabled n_ctx n_embd n_embed
    n_group n_groups n_head n_heads n_inner n_input_layers n_langs n_layer n_layers
    n_layers_per_attn_res_block n_mamba_heads n_output_layers n_positions n_recurrent_layers
    n_recurrent_loops n_routed_experts n_shared_experts n_token n_words new_decoder_architecture
    ngpt_alpha_init ngram ngram_size ngram_vocab_size_base no_bias no_rope_layer_interval
    no_rope_layers norm_bias norm_eps norm_epsilon norm_reduction_force_float32 norm_topk_prob
    norm_type ntk_alpha num_attention_heads num_attention_heads_per_layer num_blocks num_buckets
    num_centroids num_channels num_chroma num_codebooks num_decoder_attention_heads
    num_decoder_layers num_dense_layers num_encoder_attention_heads num_encoder_layers
    num_expert_group num_experts num_experts_per_tok num_experts_per_token
    num_global_key_value_heads num_global_layers num_hash_layers num_hashes num_heads
    num_hidden_layers num_image_with_embedding num_key_value_heads num_kv_heads
    num_kv_shared_layers num_layers num_layers_per_stack num_ln_in_parallel_attn
    num_local_experts num_logits_to_keep num_mel_bins num_mem_blocks num_mtp_layers
    num_nextn_predict_layers num_random_blocks num_shared_experts o_groups o_lora_rank
    original_max_position_embeddings output_embedding_size output_gate_type
    output_logit_soft_cap output_vocab_size pad_index parallel_attn parallel_residual
    partial_rotary_factor patch_in_forward patch_size patcher_config patching_batch_size
    patching_mode patching_threshold per_layer_config ple_conv_kernel_size ple_embed_dim
    ple_layer_ids pooling position_bias_max_distance position_bias_num_buckets
    position_embedding_type post_layer_norm pre_norm prefix_dense_intermediate_size
    prefix_dense_sliding_window_pattern prefix_lm projector_bias projector_hidden_act
    projectors_bias prompt_length prompt_mid_dim prompt_types pronunciation_embed_dim
    pronunciation_vocab_size pruned_heads pyramid_num_routed q_head_dim q_lora_rank
    qk_dim_factor qk_head_dim qk_l2_clip_threshold qk_layernorm qk_nope_head_dim qk_norm
    qk_rope_head_dim qkv_bias quantization quantization_config query_key_layer_scaling
    query_pre_attn_scalar recurrent_kv_cache_mode rel_extent rel_l2_clip_threshold
    relative_max_distance reorder_and_upcast_attn rescale_embeddings rescale_every
    rescale_prenorm_residual residual_in_fp32 residual_multiplier residual_weight
    return_last_states reuse_len rms_norm_eps rms_norm_eps_moe_gate rope_interleave
    rope_interleaved rope_local_base_freq rope_parameters rope_percent rope_ratio rope_scaling
    rope_theta rotary_dim rotary_emb_base rotary_pct rotary_percent rotary_value route_scale
    routed_scaling_factor router_bias router_hidden_size router_scale router_scaling_factor
    same_length scale_attention_softmax_in_fp32 scale_attn_by_inverse_layer_idx
    scale_attn_weights scale_depth scale_emb scale_embedding sconv_kernel_size scoring_func
    segment_types sequence_kernel shape_embed_dim shape_vocab_size
    share_encoder_decoder_embeddings shared_expert_combination_strategy
    shared_expert_intermediate_size shared_expert_sink shared_experts_intermediate_size
    shared_intermediate_size short_conv_kernel_size sinusoidal_embeddings sliding_window
    sliding_window_pattern sliding_window_size slow_but_exact sparse_attention_config
    split_ngram_parts ssm_in_multiplier ssm_multipliers ssm_out_multiplier ssm_state_size
    start_n_top state_size step_kernel summary_activation summary_proj_to_labels summary_type
    summary_use_proj swa_head_dim swa_num_attention_heads swa_num_key_value_heads
    swa_qk_rope_head_dim swa_rope_theta swiglu_alpha swiglu_limit task_type_vocab_size
    text_config text_encoder tie_embedding tie_encoder_decoder tie_word_embeddings
    time_step_floor time_step_init_scheme time_step_limit time_step_max time_step_min
    time_step_rank time_step_scale top_k_experts topk_group topk_method type_vocab_size
    unk_index unpadded_vocab_size use_alibi use_associative_scan use_attention_gate use_bias
    use_bidirectional_attention use_conv_bias use_double_wide_mlp use_dsa use_dynamic_ntk
    use_expert_bias use_falcon_mambapy use_lang_emb use_learned_position_embeddings
    use_logn_attn use_long_context use_mamba_kernels use_mambapy use_mem_eff_path use_mem_rope
    use_mems_eval use_mems_train use_mrope use_ntk use_ordered_embeddings use_parallel_residual
    use_post_norm use_prompt use_qk_norm use_qkv_bias use_rotary_embeddings use_sandwich_norm
    use_shared_attention_adapter use_sliding_window use_task_id use_weighted_layer_sum
    v_dim_factor v_head_dim vision_config vision_soft_tokens_per_image vocab_size
    vocab_size_per_layer_input vocabulary_map vq_config weight_mode whisper_adapter_in_dim
    whisper_adapter_out_dim whisper_config window_size word_embed_proj_dim zero_expert_num
"""
READ = frozenset(f"{_READ} {_CODE} {_ELSEWHERE}".split())


@functools.cache
def say_ignored(kind: str, keys: tuple[str, ...]) -> None:
    """Logs, once per process, that nothing reads these keys of a config.json."""
    told = ", ".join(repr(key)[:80] for key in keys[:8])
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    logging.getLogger(__name__).warning(
        "config.json of a %s: no known implementation reads %s%s; ignored", kind, told, more
    )

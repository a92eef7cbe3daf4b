"""Shapes of published models, as their config.json says them, and small ones to try out."""

LLAMA = dict(
    model_type="llama", vocab_size=128256, rms_norm_eps=1e-5, rope_theta=5e5,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)  # fmt: skip
QWEN3 = dict(
    vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6, head_dim=128, tie_word_embeddings=False
)
QWEN3_5 = dict(
    model_type="qwen3_5_text", vocab_size=248320, rms_norm_eps=1e-6, tie_word_embeddings=True,
    linear_conv_kernel_dim=4,
)  # fmt: skip
SHAPES: dict[str, dict[str, object]] = {
    "1B": LLAMA | dict(  # of Llama 3.2, as 3B; 8B is of 3.1
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        head_dim=64, tie_word_embeddings=True,
    ),
    "3B": LLAMA | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "8B": LLAMA | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    ),
    "32B": QWEN3 | dict(  # Qwen3-32B
        model_type="qwen3", hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8,
    ),
    "30B-A3B": QWEN3 | dict(  # Qwen3-30B-A3B
        model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    ),
    "gpt-oss-20b": dict(
        model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880,
        num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
        num_local_experts=32, num_experts_per_tok=4, sliding_window=128, rms_norm_eps=1e-5,
        rope_theta=15e4, tie_word_embeddings=False,
    ),
    "qwen3_5-4B": QWEN3_5 | dict(
        hidden_size=2560, intermediate_size=9216, num_hidden_layers=32, num_attention_heads=16,
        num_key_value_heads=4, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32,
        linear_key_head_dim=128, linear_value_head_dim=128,
    ),
    "tiny": LLAMA | dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    ),
    "tiny-experts": QWEN3 | dict(
        model_type="qwen3_moe", vocab_size=512, hidden_size=64, intermediate_size=128,
        moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "tiny-recurrence": QWEN3_5 | dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
}  # fmt: skip

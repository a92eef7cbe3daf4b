"""What a config.json may ask for, and how the rest is refused."""

import dataclasses
import json

from flax import nnx
import pytest

from tests.conftest import TINY, small_config
from tests.zoo import twins
import zoo
from zoo import gemma3_text, llama, models
from zoo.parts import growing, rope, spans, text_half

BASE = dict(
    model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4,
)  # fmt: skip


def test_an_old_file_says_little_and_means_llama_2():
    config = llama.Config.from_hf(BASE)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 8
    assert config.rope_parameters == rope.Rope(rope_theta=10_000.0)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (dict(rope_interleaved=True), "rope_interleaved"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(sliding_window=128), "sliding_window"),
        (dict(quantization_config=dict(quant_method="gptq")), "gptq"),
        (dict(rope_scaling=dict(rope_type="mrope", factor=4.0)), "mrope"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "original_max"),
        (dict(rope_scaling=dict(rope_type="linear", factor=4.0, beta_fast=1)), "beta_fast"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "low_freq_factor"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(head_dim=7), "head_dim"),
        (dict(hidden_size="32"), "'32'"),
        (dict(hidden_size=-32), "-32"),
        (dict(num_hidden_layers=True), "num_hidden_layers"),
        (dict(num_attention_heads=0), "num_attention_heads"),
        (dict(hidden_size=2**31), "hidden_size"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps"),
        (dict(rms_norm_eps=float("inf")), "rms_norm_eps"),
        (dict(rope_theta=10**400), "rope_theta"),
        (dict(rope_theta=float("nan")), "rope_theta"),
        (dict(tie_word_embeddings="true"), "tie_word_embeddings"),
        (dict(rope_theta="big"), "rope_theta"),
        (dict(rope_theta=1.0), "above 1"),
        (dict(rope_theta=0), "above 1"),
        (
            dict(
                rope_scaling=dict(rope_type="dynamic", factor=2.0, max_position_embeddings=64),
                head_dim=2,
            ),
            "more than one pair",
        ),
        (
            dict(
                rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=1)
            ),
            "above 1",
        ),
        (dict(rope_scaling=[1]), "rope should be an object"),
        (dict(rope_scaling=dict(type=[1])), "rope_type"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(other, told):
    with pytest.raises(ValueError, match=told):
        llama.Config.from_hf(BASE | other)


def said_of(family):
    return json.loads(twins.config_of(family, "plain").to_json_string(use_diff=True))


@pytest.mark.parametrize(
    ("family", "other", "told"),
    [
        ("gemma4_text", dict(enable_moe_block=True), r"lacks \['num_experts', 'top_k_experts'"),
        ("gemma4_text", dict(per_layer_config={"0": {"head_dim": 16}}), "per_layer_config"),
        ("gemma4_text", dict(per_layer_config={"6": {"sliding_window": 3}}), "per_layer_config"),
        ("gemma4_text", dict(num_kv_shared_layers=7), "there is none"),
        ("deepseek_v3", dict(rope_interleave=False), "rope_interleave"),
        ("deepseek_v3", dict(num_key_value_heads=2), "as many as num_attention_heads, 4"),
        ("deepseek_v3", dict(n_group=4), "cannot be chosen from 1 of 4 groups of 6 experts"),
        ("deepseek_v3", dict(mlp_layer_types=["dense", "moe", "dense"]), "not {'moe'}"),
        ("glm4_moe", dict(first_k_dense_replace=-1), "is not a number of layers: -1"),
        ("glm4_moe_lite", dict(mlp_layer_types=["dense"]), "names 1 layers"),
        ("minimax_m2", dict(attn_type_list=[1, 0, 1]), "attn_type_list"),
        ("ministral3", dict(rope_parameters=dict(rope_theta=1e4, llama_4_scaling_beta=0.1)),
         "llama_4_scaling_beta is 0.1, and a default rope has no"),
        ("ministral3", dict(rope_parameters=[1]), "rope should be an object"),
        ("qwen3_5_text", dict(linear_num_key_heads=3), "4 heads of a linear_attention layer must"),
        ("qwen3_5_text", dict(layer_types=["sliding_attention"] * 4), "layer_types"),
        ("hunyuan_v1_dense", dict(rope_parameters=dict(type="dynamic", alpha=-1.0)),
         "stretched by alpha -1.0 for head_dim 8"),
        ("hunyuan_v1_dense", dict(head_dim=None), "for head_dim None from rope_theta 10000.0"),
        ("hunyuan_v1_dense", dict(rope_parameters=dict(type="linear", factor=2.0, alpha=9.0)),
         "'linear' has .'alpha'"),
        ("seed_oss", dict(attention_out_bias=True), "attention_out_bias"),
        ("ernie4_5", dict(use_bias=True), "use_bias"),
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv"),
        ("apertus", dict(hidden_act="silu"), "'silu'"),
        ("qwen2_moe", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        ("qwen2_moe", dict(use_sliding_window=True), "use_sliding_window"),
        ("gpt_neox", dict(hidden_act="relu"), "hidden_act 'relu'"),
        ("gpt_neox", dict(num_attention_heads=5), "hidden_size 32 must be a multiple"),
        ("gpt_neox", dict(num_key_value_heads=2), "num_key_value_heads"),
        ("stablelm", dict(head_dim=16), "head_dim"),
        ("qwen3_next", dict(mlp_only_layers=[1]), "mlp_only_layers"),
        ("lfm2", dict(conv_bias=True), "conv_bias"),
        ("lfm2", dict(layer_types=None, full_attn_idxs=2), "full_attn_idxs should be a list"),
        ("falcon_h1", dict(mamba_rms_norm=True, mamba_norm_before_gate=None), "norm_before_gate"),
        ("falcon_h1", dict(ssm_multipliers=[1.0]), "ssm_multipliers should be 5 numbers"),
        ("lfm2_moe", dict(use_expert_bias=False), "use_expert_bias"),
        ("lfm2_moe", dict(layer_types=None), r"lacks \['layer_types'\]"),
        ("nemotron_h", dict(layers_block_type=None, hybrid_override_pattern="MX"), "M, .*, - or E"),
        ("nemotron_h", dict(layers_block_type=["conv"] * 7), "layer_types"),
        ("nemotron_h", dict(tie_word_embeddings=True), "tie_word_embeddings"),
        ("nemotron_h", dict(n_groups=3), "cannot have 4 heads in 3 groups"),
        ("granitemoehybrid", dict(mamba_d_head=7), "4 heads of Mamba .* each 7 wide .* 64 wide"),
        ("granitemoehybrid", dict(mamba_n_groups=3), "cannot have 4 heads in 3 groups"),
        ("granitemoehybrid", dict(time_step_limit=[0.001, 0.1]), "time_step_limit"),
        ("granitemoehybrid", dict(position_embedding_type="alibi"), "rope or nope"),
    ],
)  # fmt: skip
def test_what_new_families_do_not_implement_is_refused_by_name(family, other, told):
    pytest.importorskip("transformers")
    said = {key: value for key, value in (said_of(family) | other).items() if value is not None}
    with pytest.raises(ValueError, match=told):
        zoo.abstract(said)


def test_a_ministral_without_a_stretch_does_not_grow():
    """As transformers' mistral, whose file it then is."""
    pytest.importorskip("transformers")
    said = said_of("ministral3") | {"rope_parameters": dict(rope_theta=1e4)}
    config = zoo.ARCHITECTURES["ministral3"].Config.from_hf(said)
    assert config.llama_4_scaling_beta is None
    assert growing.lengths(config, spans.causal(1, 40)).tolist() == [[1.0] * 40]


@pytest.mark.parametrize(("outer", "inner", "tied"), [
    (None, None, True), (None, False, False), (True, False, True), (False, True, False),
])  # fmt: skip
def test_of_a_whole_and_its_text_the_whole_says_whether_the_head_is_tied(outer, inner, tied):
    text = {"num_hidden_layers": 1} | ({} if inner is None else {"tie_word_embeddings": inner})
    whole = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": outer}
    assert text_half.of(whole)["tie_word_embeddings"] is tied


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_counts_that_no_model_has_are_refused_before_anything_is_listed(key):
    for config in (
        BASE | {key: 10**9},
        {"model_type": "gemma3", "text_config": {key: 10**9}},
        {"model_type": "smollm3", "text_config": {}, key: 10**9},  # which no text half hides
    ):
        with pytest.raises(ValueError, match=f"{key} is 1000000000, and may be [0-9]+ at most"):
            zoo.abstract({"model_type": "llama"} | config)


def test_of_two_patterns_of_windows_the_one_that_transformers_reads_counts():
    asked = BASE | {"sliding_window_pattern": 2, "_sliding_window_pattern": 3}
    assert gemma3_text.Config.from_hf(asked).layer_types == (
        "sliding_attention", "full_attention", "sliding_attention",
    )  # fmt: skip


def test_an_unknown_architecture_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'bert'; the zoo has .*gemma, .*llama"):
        zoo.abstract({"model_type": "bert"})


def test_a_config_written_is_the_config_read():
    for turning in (rope.Rope(1e4), rope.Rope(5e5, "linear", factor=2.0)):
        config = small_config(rope_parameters=turning)
        assert llama.Config.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("family", "said", "longest"),
    [
        ("llama", dict(max_position_embeddings=4096), 4096),
        ("gpt2", dict(n_positions=512), 512),
        ("glm_moe_dsa", dict(max_position_embeddings=1_048_576, index_topk=2048), 2048),
        ("glm_moe_dsa", dict(max_position_embeddings=1024, index_topk=2048), 1024),
    ],
)
def test_the_longest_text_is_what_was_trained_on_or_what_is_read_here(family, said, longest):
    config = twins.config_of(family, "plain").to_dict()
    assert zoo.longest_text(config | said) == longest


def test_a_config_made_by_hand_may_say_what_a_file_may():
    """A rope as a file has it, too; and nothing that jax alone would stumble over."""
    made = small_config()

    def by_hand(**fields):  # where no annotation is checked
        config = dataclasses.replace(made)
        for name, value in fields.items():
            object.__setattr__(config, name, value)
        return config

    ropes = made.to_hf()["rope_parameters"]
    assert isinstance(ropes, dict)
    assert models.config_of(by_hand(rope_parameters=ropes)) == made
    for wrong in ({"num_attention_heads": 3}, {"hidden_size": 64.0}, {"intermediate_size": None}):
        with pytest.raises(ValueError, match=r"config.json"):
            zoo.abstract(by_hand(**wrong))


def test_the_longest_text_of_a_model_is_that_of_its_file(tmp_path):
    """Its Config has forgotten it, where no number depends on it."""
    read = zoo.load(TINY / "model")
    assert zoo.longest_text(read) == 256
    # As a run has it: taken apart, and put together again.
    assert zoo.longest_text(nnx.merge(*nnx.split(read))) == 256
    config = twins.config_of("llama", "plain").to_dict() | {"max_position_embeddings": 48}
    assert zoo.longest_text(zoo.fresh(config)) == 48
    assert zoo.longest_text(twins.untrained("gpt2", "plain")) == 96

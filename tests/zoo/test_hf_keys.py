"""Which keys of a stranger's config.json are ignored, which are said, and which are refused."""

import dataclasses
import json
import logging
import pathlib
import re

import pytest

from checkpoints_io import hf_folder
from tests.conftest import ROOT, TINY
from tests.zoo import twins
import zoo
from zoo import gpt_oss, llama
from zoo.parts import hf_keys

BASE = dict(
    model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4,
)  # fmt: skip
# What transformers 4 wrote besides: `PretrainedConfig().to_dict()` of 4.40 and 4.57.
OF_4 = dict(
    return_dict=True, output_hidden_states=False, output_attentions=False, torchscript=False,
    torch_dtype="bfloat16", use_bfloat16=False, tf_legacy_loss=False, pruned_heads={},
    tie_word_embeddings=True, chunk_size_feed_forward=0, is_encoder_decoder=False,
    is_decoder=False, cross_attention_hidden_size=None, add_cross_attention=False,
    tie_encoder_decoder=False, max_length=20, min_length=0, do_sample=False, early_stopping=False,
    num_beams=1, num_beam_groups=1, diversity_penalty=0.0, temperature=1.0, top_k=50, top_p=1.0,
    typical_p=1.0, repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0,
    encoder_no_repeat_ngram_size=0, bad_words_ids=None, num_return_sequences=1,
    output_scores=False, return_dict_in_generate=False, forced_bos_token_id=None,
    forced_eos_token_id=None, remove_invalid_values=False, exponential_decay_length_penalty=None,
    suppress_tokens=None, begin_suppress_tokens=None, finetuning_task=None,
    id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, tokenizer_class=None, prefix=None,
    bos_token_id=None, pad_token_id=None, eos_token_id=2, sep_token_id=None,
    decoder_start_token_id=None, task_specific_params=None, problem_type=None,
    _name_or_path="here", transformers_version="4.57.3", _attn_implementation_autoset=False,
)  # fmt: skip
# What other programs leave, and words that change nothing.
LEFT = dict(
    _model_name_or_path="there",
    unk_token_id=0,
    is_decoder=True,
    quantization_config={},
    partial_rotary_factor=1.0,
    num_nextn_predict_layers=0,
    use_qk_norm=False,
)


@pytest.fixture
def said(caplog):
    hf_keys.say_ignored.cache_clear()
    caplog.set_level(logging.WARNING)
    own = lambda record: record.name == "zoo.parts.hf_keys"
    return lambda: [record.getMessage() for record in filter(own, caplog.records)]


def test_what_is_known_to_change_nothing_is_read_without_a_word(said):
    plain = llama.Config.from_hf(BASE | dict(tie_word_embeddings=True))
    assert llama.Config.from_hf(BASE | OF_4 | LEFT) == plain
    assert not said()


@pytest.mark.parametrize("family", twins.TWINS)
def test_all_that_transformers_writes_of_a_model_is_read(family, said):
    pytest.importorskip("transformers")
    from_hf = zoo.ARCHITECTURES[family].Config.from_hf
    for shape in twins.TWINS[family]:
        config = twins.config_of(family, shape)
        changed, whole = (
            json.loads(config.to_json_string(use_diff=diff)) for diff in (True, False)
        )
        assert len(whole) > len(changed)
        assert from_hf(whole) == from_hf(changed)
    assert not said()


def test_what_nobody_reads_is_said_once(said):
    strange = BASE | dict(my_experiment=7, sequence_parallel_enabled=False)
    for _ in range(3):
        assert llama.Config.from_hf(strange) == llama.Config.from_hf(BASE)
    assert said() == [
        "config.json of a llama: no known implementation reads 'my_experiment', "
        "'sequence_parallel_enabled'; ignored"
    ]


def test_a_thousand_keys_and_odd_names_are_told_in_a_line(said):
    llama.Config.from_hf(BASE | {f"k{i:03}\n\x1b[2J" + "x" * 500: 1 for i in range(1000)})
    (line,) = said()
    assert len(line) < 900 and line.isprintable() and "and 992 more" in line


@pytest.mark.parametrize(
    "other",
    [
        dict(attention_multiplier=0.5), dict(num_nextn_predict_layers=1), dict(rope_ratio=4),
        dict(use_logn_attn=True), dict(is_encoder_decoder=True), dict(partial_rotary_factor=0.5),
        dict(attn_logit_softcapping=50.0), dict(per_layer_config={"0": {"head_dim": 4}}),
    ],
)  # fmt: skip
def test_what_some_implementation_reads_is_refused(other):
    with pytest.raises(ValueError, match=next(iter(other))):
        llama.Config.from_hf(BASE | other)


@pytest.mark.parametrize(
    "other",
    [  # a Qwen that was rewritten as a Llama keeps them
        dict(use_sliding_window=False, sliding_window=32768, max_window_layers=28),
        dict(use_sliding_window=False, sliding_window=None, max_window_layers=28),
        dict(sliding_window=None, max_window_layers=28),
        dict(layer_types=["full_attention"] * 2),
    ],
)
def test_windows_that_are_off_change_nothing(other):
    assert llama.Config.from_hf(BASE | other) == llama.Config.from_hf(BASE)
    for key, on in (
        ("sliding_window", dict(sliding_window=32768, use_sliding_window=None)),
        ("layer_types", dict(layer_types=["full_attention", "sliding_attention"])),
    ):
        with pytest.raises(ValueError, match=key):
            llama.Config.from_hf(BASE | other | on)


def test_no_key_of_an_architecture_is_ignored():
    for arch in zoo.ARCHITECTURES.values():
        own = {field.name for field in dataclasses.fields(arch.Config)} | arch.Config.fixed.keys()
        assert not own & hf_keys.IGNORED
        assert own <= hf_keys.READ | {"lm_head_bias"}
    assert not hf_keys.IGNORED & (hf_keys.NEUTRAL.keys() | hf_keys.READ)
    assert hf_keys.NEUTRAL.keys() <= hf_keys.READ
    with pytest.raises(ValueError, match="attention_bias"):  # neutral elsewhere
        gpt_oss.Config.from_hf(BASE | dict(model_type="gpt_oss", attention_bias=False))


def test_every_key_of_a_decoder_in_transformers_is_in_a_list():
    """If this fails after an upgrade: put the new names into hf_keys, by what they do."""
    pytest.importorskip("torch")  # which transformers asks for here
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto

    folder, missing = pathlib.Path(transformers.__file__).parent / "models", set()
    for kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = transformers.CONFIG_MAPPING[kind]
        keys = {field.name for field in dataclasses.fields(config)} | {*config.attribute_map}
        for path in (folder / config.__module__.split(".")[-2]).glob("configuration_*.py"):
            keys |= {*re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', path.read_text())}
        missing |= keys - hf_keys.IGNORED - hf_keys.READ
    assert not missing


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "FP8"),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "'bits': 4"),
        ("quant_config.json", {"w_bit": 4, "version": "GEMM"}, "GEMM"),
    ],
)
def test_weights_that_another_file_calls_quantised_are_refused(tmp_path, name, content, told):
    (tmp_path / "config.json").write_text((TINY / "model" / "config.json").read_text())
    (tmp_path / name).write_text(json.dumps(content))
    for refused in (zoo.load, zoo.check):
        with pytest.raises(ValueError, match=rf"quantised \({name}: .*{told}"):
            refused(tmp_path)
    assert name in hf_folder.CONFIG_FILES  # fetched before the weights are


def test_a_narrow_cache_of_keys_is_not_quantised_weights(tmp_path):
    (tmp_path / "config.json").write_text((TINY / "model" / "config.json").read_text())
    told = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    assert zoo.abstract(hf_folder.read_config(tmp_path))


@pytest.mark.parametrize(
    "other",
    [
        dict(quantization=dict(group_size=64, bits=4)), dict(compression_config=dict(format="int")),
        dict(quantization_config=dict(bits=8)),
    ],
)  # fmt: skip
def test_other_words_for_quantised_are_known(other):
    with pytest.raises(ValueError, match=f"quantised .{next(iter(other))}"):
        llama.Config.from_hf(BASE | other)


def test_the_cases(shared):
    cases = shared / "cases"
    whole = json.loads((cases / "config_full_dump.json").read_text())
    own = json.loads((ROOT / "recipes" / "tiny" / "model" / "config.json").read_text())
    assert llama.Config.from_hf(whole) == llama.Config.from_hf(own)
    yarn = json.loads((cases / "config_yarn_added.json").read_text())
    assert llama.Config.from_hf(yarn).rope_parameters.factor == 4.0

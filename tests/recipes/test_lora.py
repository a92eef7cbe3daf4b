"""Runs that train adapters: what they keep, what they refuse, and which reference they have."""

import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import peft_folder
from recipes import dpo, sft
from recipes.configs import tiny_sft
from recipes.preference import reference
from recipes.training import checks, settings
from tests.conftest import TINY, check_resume, exported, few_pairs, held, records, sigmoid
import zoo

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def config(tiny_config, tmp_path) -> ml_collections.ConfigDict:
    """A run of three steps on a few pairs, with adapters."""
    config = tiny_config
    config.train_data = few_pairs(tmp_path, 12)
    config.validation = {}
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 3, 0.0
    config.learning_rate = 1e-3
    config.steps_per_checkpoint, config.steps_per_eval = 1, None
    config.steps_per_hf_export = config.max_eval_pairs = None
    config.adapter = dict(rank=4, alpha=8.0, lora_plus=4.0, dora=False)
    return config


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({}, id="AdamW", marks=pytest.mark.full),
        pytest.param(
            {"optimizer": "muon", "adapter.dora": True},
            id="Muon, and magnitudes",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, capfd, other):
    with config.ignore_type():
        config.update_from_flattened_dict(other)
    dpo.train(config)
    assert records(config)[0]["train/dpo_loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert records(config)[-1]["train/dpo_loss"] < 0.69
    assert "must agree to the last bit" in capfd.readouterr().out
    size = held(pathlib.Path(config.directory) / "checkpoints")
    weights = (TINY / "model" / "model.safetensors").stat().st_size
    assert size < weights  # which hold two bytes of each number, and the base is not among them
    check_resume(dpo.train, config, tmp_path / "parts", capfd, after=2)


@pytest.mark.full
def test_a_run_is_not_resumed_on_other_weights(config, tmp_path):
    config.initialize_from_hf = str(tmp_path / "base")
    shutil.copytree(TINY / "model", tmp_path / "base")
    config.num_train_steps, config.steps_per_hf_export = 1, -1
    dpo.train(config)
    other = zoo.load(TINY / "model")
    norm = other.norm.scale
    norm.set_value(norm[...] * 1.5)
    shutil.rmtree(tmp_path / "base")
    zoo.save(other, tmp_path / "base", dtype=np.float32)
    with pytest.raises(ValueError, match=r"the frozen weights have changed since the checkpoint"):
        dpo.train(config)


def test_adapters_of_an_sft_run_are_start_and_reference(config, tmp_path, capfd):
    """The chain: the first log-ratios are exactly 0, though the start is not the base."""
    first = tiny_sft.get_config()
    first.directory = str(tmp_path / "sft")
    first.initialize_from_hf, first.train_data = config.initialize_from_hf, config.train_data
    first.validation, first.token_cache, first.compile_cache = {}, None, None
    first.train_batch_size, first.num_train_steps, first.warmup = 8, 2, 0.0
    first.learning_rate, first.sample_tokens, first.tensorboard = 1e-2, 0, False
    first.steps_per_eval = None
    first.adapter = dict(rank=4)
    first.chat_template = str(TINY / "model" / "chat_template.jinja")
    sft.train(first)
    folder = pathlib.Path(first.directory) / "hf" / "step-2"
    assert (folder / WEIGHTS).is_file()
    assert peft_folder.has_tokenizer(folder)  # with its template, which is not the base's
    config.chat_template = first.chat_template
    config.adapter = dict(path=str(folder))
    config.num_train_steps = 1
    dpo.train(config)
    assert "the reference: the policy as it starts" in capfd.readouterr().out
    (only,) = records(config)
    assert only["train/dpo_loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert only["train/dpo_margin_policy"] == only["train/dpo_margin_ref"]

    config.directory += "-base"
    config.reference_mode = "base"
    dpo.train(config)
    assert "the reference: the policy without its adapters" in capfd.readouterr().out
    (of_base,) = records(config)
    assert of_base["train/dpo_margin_policy"] == only["train/dpo_margin_policy"]
    assert of_base["train/dpo_margin_ref"] != only["train/dpo_margin_ref"]


@pytest.mark.full
def test_a_merged_export_is_the_model_of_weights_and_adapters(config, tmp_path, capfd):
    config.num_train_steps = 1
    config.adapter.export = "merged"
    config.hf_save_dtype = "float32"
    dpo.train(config)
    assert "merged: float32 holds all of what the adapters add" in capfd.readouterr().out
    merged = exported(config, "1-merged")
    # A finished run that is asked for its adapters writes them beside the merged model.
    config.adapter.export = "adapter"
    dpo.train(config)
    of_adapters = pathlib.Path(config.directory) / "hf" / "step-1"
    zoo.save(zoo.load(TINY / "model", adapter=of_adapters), tmp_path / "other", dtype=np.float32)
    expected = safetensors.numpy.load_file(tmp_path / "other" / "model.safetensors")
    before = safetensors.numpy.load_file(TINY / "model" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(merged[name], weight, rtol=0, atol=1e-6)
        moved = not np.array_equal(weight, before[name].astype(np.float32))
        assert moved == ("_proj" in name), name


def test_a_separate_reference_of_the_same_weights_agrees_to_the_bit(config, tmp_path, capfd):
    shutil.copytree(TINY / "model", tmp_path / "copy")
    config.reference_model_path = str(tmp_path / "copy")
    config.num_train_steps = 1
    dpo.train(config)
    assert "must agree to the last bit" in capfd.readouterr().out
    assert records(config)[0]["train/dpo_loss"] == pytest.approx(np.log(2), abs=1e-7)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"adapter.rank": None}, r"adapter.alpha has no effect: all weights are trained"),
        ({"adapter.path": "here"}, "adapter.alpha has no effect: the adapters in"),
        ({"adapter.dropout": 0.05}, "would make policy and reference differ"),
        ({"adapter.rank": 0}, "adapter.rank must be above 0"),
        ({"adapter.zero": "C"}, "adapter.zero='C' is not one of A, B"),
        ({"reference_mode": "base", "reference_model_path": "x"}, "names another reference"),
        ({"hf_text_only": True}, "hf_text_only=True has no effect: exports hold only adapters"),
    ],
)
def test_settings_that_contradict_each_other(config, values, words):
    for name, value in values.items():
        room, _, last = name.rpartition(".")
        (config[room] if room else config)[last] = value
    with pytest.raises(ValueError, match=words):
        checks.checked(config, settings.table_of(settings.DPO))


def test_a_base_is_a_reference_of_adapters_alone(config):
    del config.adapter
    config.reference_mode = "base"
    with pytest.raises(ValueError, match=r"it has none: set --config.adapter.rank"):
        checks.checked(config, settings.table_of(settings.DPO))


def test_the_reference_is_the_policy_unless_another_is_named(config):
    given = checks.checked(config, settings.table_of(settings.DPO))
    shares = lambda **other: reference.wanted(given | other, sigmoid()).of_policy
    assert shares()
    assert not shares(reference_model_path="other")
    assert not shares(**{"adapter.rank": None})
    # Named as people name it who come from TRL's `ref_model`: the weights are there already.
    same = {"reference_model_path": given["initialize_from_hf"]}
    found = reference.wanted(given | same, sigmoid())
    assert (found.mode, found.of_policy) == ("base", True)
    for other in ({"reference_mode": "cached"}, {"adapter.rank": None}):
        found = reference.wanted(given | same | other, sigmoid())
        assert (found.mode != "base", found.of_policy) == (True, False)

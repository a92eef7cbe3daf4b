"""Runs whose frozen weights are kept in few bits: the gates hold, and what is written fits them."""

import pathlib

import numpy as np
import pytest

from recipes import dpo
from recipes.training import checks, settings
from tests.conftest import check_resume, few_pairs, records
import zoo


@pytest.fixture
def config(tiny_config, tmp_path):
    """A run of two steps on a few pairs."""
    config = tiny_config
    config.train_data, config.validation = few_pairs(tmp_path, 16), {}
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 2, 0.0
    config.learning_rate, config.steps_per_checkpoint, config.steps_per_eval = 1e-3, 1, None
    config.steps_per_hf_export, config.sample_tokens, config.max_eval_pairs = None, 0, None
    config.adapter = dict(rank=4, alpha=8.0)
    return config


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_starts_equal_and_resumes_exactly(config, tmp_path, capfd, kind):
    config.frozen = kind
    dpo.train(config)
    first, last = records(config)[0], records(config)[-1]
    assert "must agree to the last bit" in capfd.readouterr().out
    assert first["train/dpo_margin_policy"] == first["train/dpo_margin_ref"]
    assert first["train/dpo_loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert last["train/dpo_loss"] < first["train/dpo_loss"]
    check_resume(dpo.train, config, tmp_path / "parts", capfd, after=1)

    # Adapters go with the weights that they were trained on.
    base, folder = config.initialize_from_hf, pathlib.Path(config.directory) / "hf" / "step-2"
    model = zoo.load(base, adapter=folder)
    assert zoo.narrow.kind_of(model) == kind
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    with pytest.raises(ValueError, match=rf"kept in {kind}, and those .* in {other}: .*--config"):
        zoo.load(base, adapter=folder, frozen=other)
    config.adapter, config.frozen = dict(path=str(folder)), None
    config.directory = str(tmp_path / "more")
    with pytest.raises(ValueError, match=rf"kept in {kind}, and those .* kept whole"):
        dpo.train(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(frozen="int4"), "frozen='int4' is not one of bfloat16, float32, int8, nf4"),
        (dict(frozen="nf4", adapter=dict(rank=None)), "frozen has no effect: all weights are"),
        (dict(frozen="nf4", remat="none"), "remat=none keeps the weights of all layers"),
    ],
)
def test_what_has_no_effect_is_refused(config, values, words):
    for name, value in values.items():
        config[name] = value
    with pytest.raises(ValueError, match=words):
        checks.checked(config, settings.table_of(settings.DPO))

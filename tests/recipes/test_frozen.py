"""Runs whose frozen weights are kept in few bits: the gates hold, and what is written fits them."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from recipes import dpo
from recipes.training import checks, loop, settings
from tests.conftest import TINY
import zoo

CLOCK = {"train/tokens_per_second", "train/input_wait"}


class Stopped(Exception):
    pass


@pytest.fixture
def config(tiny_config, tmp_path):
    """A run of two steps on a few pairs."""
    config = tiny_config
    rows = (TINY / "train.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[::16]) + "\n")
    config.train_data, config.validation = str(tmp_path / "rows.jsonl"), {}
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 2, 0.0
    config.learning_rate, config.steps_per_checkpoint, config.steps_per_eval = 1e-3, 1, None
    config.steps_per_hf_export, config.sample_tokens, config.max_eval_pairs = None, 0, None
    config.adapter = dict(rank=4, alpha=8.0)
    return config


def records(config):
    lines = (pathlib.Path(config.directory) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def stop_after_one(monkeypatch):
    taken, real = [], loop.applied

    def applied(*args):
        if taken:
            raise Stopped
        taken.append(real(*args))
        return taken[-1]

    monkeypatch.setattr(loop, "applied", applied)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_starts_equal_and_resumes_exactly(config, tmp_path, capfd, kind):
    config.frozen = kind
    dpo.train(config)
    first, last = records(config)[0], records(config)[-1]
    assert "they must agree to the last bit" in capfd.readouterr().out
    assert first["train/dpo_margin_policy"] == first["train/dpo_margin_ref"]
    assert first["train/dpo_loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert last["train/dpo_loss"] < first["train/dpo_loss"]
    parts = config.copy_and_resolve_references()
    parts.directory = str(tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        stop_after_one(patched)
        dpo.train(parts)
    dpo.train(parts)
    assert records(parts) == records(config)
    folders = [pathlib.Path(one.directory) / "hf" / "step-2" for one in (parts, config)]
    ours, theirs = (safetensors.numpy.load_file(f / "adapter_model.safetensors") for f in folders)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)

    # Adapters go with the weights that they were trained on.
    base = config.initialize_from_hf
    model = zoo.load(base, adapter=folders[0])
    assert zoo.narrow.kind_of(model) == kind
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    with pytest.raises(ValueError, match=rf"kept in {kind}, and those .* in {other}: .*--config"):
        zoo.load(base, adapter=folders[0], frozen=other)
    config.adapter, config.frozen = dict(path=str(folders[0])), None
    config.directory = str(tmp_path / "more")
    with pytest.raises(ValueError, match=rf"kept in {kind}, and those .* kept whole"):
        dpo.train(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(frozen="int4"), "frozen='int4' is none of bfloat16, float32, int8, nf4"),
        (dict(frozen="nf4", adapter=dict(rank=None)), "frozen has no effect: all weights are"),
        (dict(frozen="nf4", remat="none"), "remat=none keeps the weights of all layers"),
    ],
)
def test_what_has_no_effect_is_refused(config, values, words):
    for name, value in values.items():
        config[name] = value
    with pytest.raises(ValueError, match=words):
        checks.checked(config, settings.table_of(settings.DPO))

"""The reference's kept answers are those it gives, and say so when they are not."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import places
from recipes import dpo
from recipes.preference import reference, reference_cache


def losses(config):
    lines = (pathlib.Path(config.directory) / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return [r["train/dpo_loss"] for r in records if "train/dpo_loss" in r]


def run(config, name, **other):
    config = config.copy_and_resolve_references()
    config.update(other)
    config.directory = str(pathlib.Path(config.directory).parent / name)
    dpo.train(config)
    return config


@pytest.fixture
def short(tiny_config):
    tiny_config.num_train_steps = 3
    tiny_config.run_initial_eval = True
    return tiny_config


@pytest.fixture
def cached(short, tmp_path):
    return run(short, "cached", reference_mode="cached", reference_cache=str(tmp_path / "cache"))


def files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_cached_is_resident(short, cached, monkeypatch):
    resident = run(short, "resident")
    apart = np.abs(np.array(losses(resident)) - losses(cached))
    print(f"losses apart by {apart.max():.2g}")
    assert apart.max() <= 2e-6


@pytest.mark.full
def test_answers_are_shared_and_only_what_is_new_is_asked(short, cached, tmp_path, monkeypatch):
    before = files(tmp_path)
    assert len(before) == 2  # training and held-out pairs
    asked = []
    of_examples = reference_cache.logps.of_examples

    def counting(forward, pairs, place):
        asked.append(len(pairs))
        return of_examples(forward, pairs, place)

    monkeypatch.setattr(reference_cache.logps, "of_examples", counting)
    run(cached, "another", learning_rate=1e-4, beta=0.3)
    assert files(tmp_path) == before
    assert max(asked) <= 64  # the sample, and the policy on held-out pairs
    # A lost file is made again; a file cut short is passed over.
    before[0].unlink()
    before[1].write_bytes(before[1].read_bytes()[:50])
    run(cached, "mended")
    assert sum(asked) > 320


def test_kept_answers_that_are_wrong_stop_the_run(cached, tmp_path):
    for path in files(tmp_path):
        part = safetensors.numpy.load_file(path)
        content = safetensors.numpy.save(part | {"logps": part["logps"] - 0.5})
        path.with_name(reference_cache._name(content)).write_bytes(content)
        path.unlink()
    with pytest.raises(RuntimeError, match="delete that folder"):
        run(cached, "wrong")


@pytest.mark.parametrize(("name", "at"), [("train", 0), ("heldout", 1)])
def test_values_that_are_not_finite_are_named_and_never_kept(
    short, tmp_path, monkeypatch, name, at
):
    of_examples, calls = reference_cache.logps.of_examples, []

    def overflowing(forward, pairs, place):
        found = of_examples(forward, pairs, place)
        calls.append(pairs[2].row)
        if len(calls) == at + 1:
            found[2, 1] = np.nan
        return found

    monkeypatch.setattr(reference_cache.logps, "of_examples", overflowing)
    how = {"reference_mode": "cached", "reference_cache": str(tmp_path / "cache")}
    told = "has .* under the reference .*tiny/model that is NaN or .*--config.mp$"
    with pytest.raises(RuntimeError, match=told) as error:
        run(short, "overflowing", **how)
    assert str(error.value).startswith(f"row {calls[at]} of {name} has")
    assert len(files(tmp_path)) == at


def test_another_reference_has_another_folder(tmp_path):
    open_ = lambda **other: reference_cache.opened(
        places.Disk(tmp_path),
        **({"fingerprint": "a", "compute": np.float32, "attention": "blocks"} | other),
    )
    folders = {
        open_(**other).folder
        for other in (
            {}, {"fingerprint": "b"}, {"compute": np.float16}, {"attention": "dense"},
            {"ld_alpha": 0.5}, {"ld_alpha": 0.25},
        )
    }  # fmt: skip
    assert len(folders) == 6
    assert open_().folder in folders


def test_a_cached_reference_leaves_memory(short, monkeypatch, tmp_path):
    kept = []
    ready = reference.ready
    monkeypatch.setattr(reference, "ready", lambda *args: kept.append(ready(*args)) or kept[-1])
    run(short, "gone", reference_mode="cached", reference_cache=str(tmp_path / "cache"))
    assert kept[0].model is None

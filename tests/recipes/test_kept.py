"""A checkpoint that an earlier version wrote is resumed, or refused by version.

Before what a checkpoint holds is changed, the run of the version before is kept:
`python -m tests.recipes.kept_run tests/recipes/kept/NAME`.
"""

import json
import pathlib
import shutil

from flax import nnx
import ml_collections
import numpy as np
import pytest

from checkpoints_io import hf_folder, places
from checkpoints_io.run_state import RunStore
from checkpoints_io.sealed import FORMAT
from recipes import dpo
from recipes.training import policy, resume, settings
from recipes.training.policy import Policy
from tests.conftest import run_with
from tests.recipes import kept_run
import zoo

HERE = places.at(".")
KEPT = sorted((pathlib.Path(__file__).parent / "kept").iterdir())


@pytest.fixture
def kept(request, tmp_path, monkeypatch) -> ml_collections.ConfigDict:
    """The kept run, in a folder of its own that is also here, and its settings."""
    folder = tmp_path / "run"
    shutil.copytree(request.param, folder)
    monkeypatch.chdir(folder)
    config = kept_run.config_of_run()
    with config.ignore_type():
        for name, value in facts_of(folder)["settings"].items():
            config.update_from_flattened_dict({name: value})
    return config


def facts_of(folder):
    with RunStore(places.at(f"{folder}/checkpoints"), keep=None) as store:
        (step,) = store.steps()
        return store.facts(step)


def records():
    lines = map(json.loads, pathlib.Path("metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/dpo_loss"] for r in lines if "train/dpo_loss" in r}


NEWEST, OLD = f"format-{FORMAT}", pytest.mark.full


@pytest.mark.parametrize(
    "kept",
    [pytest.param(path, marks=() if path.name == NEWEST else OLD, id=path.name) for path in KEPT],
    indirect=True,
)
def test_a_kept_run_goes_on_as_it_went(kept, capfd):
    before = records()
    assert list(before) == [1, 2, 3, 4]
    dpo.train(kept)
    assert "resuming from step 2" in capfd.readouterr().out
    assert records() == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_a_kept_checkpoint_is_read(path):
    """Its facts as they were sealed, and its weights bit for bit by their fingerprint."""
    model = zoo.abstract(hf_folder.read_config(path / "model"))
    like = {"policy": nnx.to_pure_dict(nnx.state(model))}
    with RunStore(places.Disk(path / "checkpoints"), keep=None) as store:
        here = places.Disk(path)
        same = lambda saved: resume.refuse_other_run(saved, {"models": {}} | saved, here)
        found = store.newest(same, like)
    assert found.step == 2
    assert found.trees["policy"]["embedding"].shape == (260, 8)


@pytest.mark.parametrize("kept", KEPT[:1], indirect=True)
def test_a_kept_run_is_still_known_by_what_it_says(kept):
    """Its settings, pairs and reference are compared, whatever else its facts lack."""
    saved, here = facts_of(pathlib.Path()), HERE
    resume.refuse_other_run(saved, saved, here)
    for name, other in (("data", "0"), ("reference", "0"), ("settings", {"beta": 0.2})):
        now = saved | {name: saved[name] | other if isinstance(other, dict) else other}
        with pytest.raises(ValueError, match="beta" if name == "settings" else f"{name}|pairs"):
            resume.refuse_other_run(saved, now, here)


def test_frozen_weights_are_known_by_their_fingerprint():
    """What is trained beside them means nothing without them."""
    weights = {"w": np.arange(6, dtype=np.float32)}
    facts = lambda frozen: policy.facts_of(
        Policy(None, None, frozen, None), run_with(facts=facts_of(KEPT[0]))
    )
    saved = facts(weights)
    resume.refuse_other_run(saved, facts({"w": weights["w"].copy()}), HERE)
    with pytest.raises(ValueError, match="the frozen weights have changed since the checkpoint"):
        resume.refuse_other_run(saved, facts({"w": weights["w"] * 1.5}), HERE)
    assert "frozen" not in facts({})


def test_facts_without_models_say_nothing_of_them_and_others_are_compared():
    (old,) = [facts_of(path) for path in KEPT if path.name == "format-2-without-models"]
    (new,) = [facts_of(path) for path in KEPT if path.name == "format-2"]
    assert "models" not in old
    resume.refuse_other_run(old, new, HERE)
    other = new | {"models": {"policy": new["models"]["policy"] | {"rms_norm_eps": "1.0"}}}
    resume.refuse_other_run(old, other, HERE)
    with pytest.raises(ValueError, match=r"config.json of the policy .*\(rms_norm_eps"):
        resume.refuse_other_run(new, other, HERE)


def test_a_fact_that_is_needed_and_not_there_is_told_by_version():
    (new,) = [facts_of(path) for path in KEPT if path.name == "format-2"]
    for name in ("settings", "data", "reference"):
        less = {key: value for key, value in new.items() if key != name}
        with pytest.raises(
            ValueError, match=rf"not record its {name!r}.*the version that wrote it"
        ):
            resume.refuse_other_run(less, new, places.at("runs/x"))
    with pytest.raises(
        ValueError, match="does not record its 'settings'"
    ):  # as a run does first of all
        resume.fact({}, "settings", HERE)


def test_a_setting_that_the_checkpoint_does_not_know_may_be_unset():
    old = {"beta": 0.1}
    resume.refuse_other_settings(old, {"beta": 0.1, "new": None}, HERE)
    with pytest.raises(ValueError, match="new: None there, 2 here"):
        resume.refuse_other_settings(old, {"beta": 0.1, "new": 2}, HERE)


def test_a_setting_that_the_checkpoint_does_not_know_may_have_its_default():
    old = {"beta": 0.1}
    for name in ("lr_schedule", "label_smoothing", "data.scored_turns", "reference_is_hf"):
        default = settings.ALL[name].default
        assert default is not None
        resume.refuse_other_settings(old, old | {name: default}, HERE)
    with pytest.raises(ValueError, match=r"label_smoothing: None there, 0\.2 here"):
        resume.refuse_other_settings(old, old | {"label_smoothing": 0.2}, HERE)
    for name, other in (("reference_is_hf", False), ("lr_schedule", ""), ("adam_beta2", 0.0)):
        assert settings.ALL[name].default != other
        with pytest.raises(ValueError, match=f"{name}: None there"):
            resume.refuse_other_settings(old, old | {name: other}, HERE)
    with pytest.raises(ValueError, match=r"data\.columns\.chosen: None there, 'better' here"):
        now = old | {"data.columns.chosen": "better"}
        resume.refuse_other_settings(old, now, HERE)


def test_a_reference_that_is_the_policy_may_be_named_or_not():
    named = {"initialize_from_hf": "m", "reference_model_path": "m"}
    unset = named | {"reference_model_path": None}
    resume.refuse_other_settings(named, unset, HERE)
    resume.refuse_other_settings(unset, named, HERE)
    with pytest.raises(ValueError, match="reference_model_path"):
        resume.refuse_other_settings(unset, named | {"reference_model_path": "r"}, HERE)


def test_a_checkpoint_of_the_format_of_today_is_kept():
    assert NEWEST in {path.name for path in KEPT}

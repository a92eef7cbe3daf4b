"""When a run ends early, what it then exports, and when it may take more steps."""

import functools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io import places
from checkpoints_io.run_state import Keep, RunStore
from recipes import dpo
from recipes.configs import tiny
from recipes.preference import evaluation
from recipes.training import checks, resume, settings, stopping, written
from recipes.training.run import Patience
from tests.conftest import exported, given_by, records

LOWER, HIGHER = (Patience("heldout/a", 2, higher) for higher in (False, True))


@pytest.mark.parametrize(
    ("patience", "values", "stale"),
    [
        (None, [1, 1, 1, 1], False),
        (LOWER, [], False),
        (LOWER, [3, 2, 1], False),
        (LOWER, [1, 2], False),
        (LOWER, [1, 2, 3], True),
        (LOWER, [1, 1, 1], True),  # a tie is no improvement
        (LOWER, [3, 2, 4, 1, 2], False),
        (LOWER, [3, 1, 4, 2], True),
        (LOWER, [1, math.nan, -math.inf], True),
        (LOWER, [math.nan], False),
        (HIGHER, [1, 2, 3], False),
        (HIGHER, [3, 2, 1], True),
        (HIGHER._replace(evaluations=1), [3, 3], True),
    ],
)
def test_a_figure_is_stale_after_so_many_evaluations(patience, values, stale):
    assert stopping.is_stale(patience, [float(value) for value in values]) == stale


def test_the_figures_so_far_are_those_of_the_records(tmp_path):
    lines = [{"step": 2, "eval/heldout/a": 0.5}, {"step": 2, "train/a": 3.0},
             {"step": 4, "eval/heldout/a": 0.25, "eval/heldout/ab": 9.0}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "eval/heldout/a": 1'
    (tmp_path / "metrics.jsonl").write_text(text)
    here = places.Disk(tmp_path)
    assert stopping.recorded(LOWER, here) == [0.5, 0.25]
    assert stopping.recorded(LOWER._replace(figure="other/a"), here) == []
    assert stopping.recorded(None, here) == []
    assert stopping.value(LOWER, {"eval/heldout/a": 0.5}) == 0.5
    with pytest.raises(RuntimeError, match=r"heldout/a: .* no such metric; they have heldout/b"):
        stopping.value(LOWER, {"eval/heldout/b": 0.5})
    told = stopping.told(LOWER, [0.5, math.nan, 0.75], 6)
    assert "after step 6: heldout/a has not improved for 2 evaluations (best 0.5, now 0.75)" in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stop_patience": 2}, "--config.stop_patience=2 has no effect without"),
        ({"stop_when": "heldout/loss"}, "--config.stop_when='heldout/loss' is not a held-out set"),
        ({"stop_when": "heldout/dpo_loss", "steps_per_eval": None}, "without evaluations during"),
        ({"eval_at": "5,"}, "--config.eval_at='5,' is not of the form 1,5,25"),
        ({"eval_at": "0"}, "--config.eval_at='0'"),
    ],
)
def test_what_has_no_effect_is_refused(given, told):
    config = tiny.get_config()
    config.update(given)
    with pytest.raises(ValueError, match=told):
        checks.checked(config, settings.table_of(settings.DPO))


def test_the_steps_of_a_list():
    assert written.steps_at("1,5,25") == {1, 5, 25}
    assert written.steps_at(None) == frozenset()


def test_a_run_of_epochs_is_made_longer_too():
    here, batch = places.at("runs/one"), tiny.get_config().train_batch_size
    of = lambda **given: resume.of_settings(
        given_by(tiny.get_config(), lr_schedule="constant", warmup=0.0, **given)
    )
    three, six = ({"num_epochs": n, "num_train_steps": None} for n in (3.0, 6.0))
    check = functools.partial(resume.refuse_other_settings, of(**three), directory=here)
    check(of(**six), step=30, examples=10 * batch)
    check(of(num_train_steps=40), step=30, examples=10 * batch)  # 30 before
    check(of(num_train_steps=30), step=30, examples=10 * batch)
    check(of(num_train_steps=20), step=15)  # it is not known yet what three epochs were
    for other in (of(num_train_steps=29), of(num_epochs=2.0, num_train_steps=None)):
        with pytest.raises(ValueError, match="A run can be made longer, not shorter"):
            check(other, step=15, examples=10 * batch)
    falling = of(**three) | {"lr_schedule": "cosine"}
    with pytest.raises(ValueError, match="holds a run of 30 steps; in one of 60 steps, the"):
        resume.refuse_other_settings(
            falling, falling | {"num_epochs": 6.0}, here, step=15, examples=10 * batch
        )


def test_a_run_is_made_longer_where_its_rates_stay_what_they_were():
    here = places.at("runs/one")

    def longer(step, **other):
        before = resume.of_settings(given_by(tiny.get_config(), num_train_steps=60, **other))
        resume.refuse_other_settings(before, before | {"num_train_steps": 90}, here, step)

    longer(60, lr_schedule="constant", warmup=5)
    longer(40, cooldown=10, warmup=5)  # before it begins
    for step, other in [
        (60, {}),
        (60, {"lr_schedule": "constant", "warmup": 0.1}),  # a share of another length
        (60, {"cooldown": 10, "warmup": 5}),
    ]:
        with pytest.raises(ValueError, match="can only be made longer at a constant rate") as found:
            longer(step, **other)
        assert f"--config.initialize_from_hf={here}/hf/step-60 " in str(found.value)
    constant = {"lr_schedule": "constant", "warmup": 0.0}
    saved = resume.of_settings(given_by(tiny.get_config(), num_train_steps=60, **constant))
    for other in ({"num_train_steps": 30}, {"num_train_steps": 90, "beta": 0.3}):
        with pytest.raises(ValueError, match="holds a run with other settings"):
            resume.refuse_other_settings(saved, saved | other, here, 60)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"num_train_steps": 60}, {"num_train_steps": 90}),  # its rate has fallen to 0
        ({"num_train_steps": 60}, {"num_train_steps": 30}),
        ({"num_epochs": 3.0, "num_train_steps": None}, {"num_epochs": 6.0}),
    ],
)
def test_where_no_longer_run_is_possible_the_way_on_is_named(tmp_path, there, here):
    saved = resume.of_settings(given_by(tiny.get_config(), **there))
    lora, folder = saved | {"adapter.rank": 8}, tmp_path / "hf" / "step-60"

    def told(saved):
        with pytest.raises(ValueError, match="what this one has learnt, ") as found:
            resume.refuse_other_settings(saved, saved | here, places.Disk(tmp_path), 60, 160)
        return str(found.value).partition(" has learnt, ")[2].partition("ANOTHER")[0]

    of_model = f"start a new run with --config.initialize_from_hf={folder} --config.directory="
    beside = f"--config.adapter.path={folder} --config.adapter.rank=None --config.directory="
    made = f"make its folder with python -m recipes.export {tmp_path} --step=60, and "
    assert told(saved) == made + of_model
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").touch()
    assert told(lora) == f"start a new run with {beside}"
    (folder / "config.json").touch()  # a merged model
    assert told(lora) == told(saved) == of_model


def test_the_best_checkpoint_is_read_back(tmp_path):
    place = places.Disk(tmp_path)
    like = {"a": {"x": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=jnp.zeros(2).sharding)}}
    keep = Keep(1, highest=lambda facts: facts.get("score"))
    with RunStore(place, keep=keep) as store:
        assert store.best(like) is None
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, None), (5, 0.1)):  # first of equals
            facts = {} if score is None else {"score": score}
            store.save(step, {"a": {"x": jnp.full(2, float(step))}}, facts)
            store.wait()
        found = store.best(like)
        assert (found.step, found.facts["score"]) == (2, 0.9)
        np.testing.assert_array_equal(found.trees["a"]["x"], [2.0, 2.0])
    with RunStore(place, keep=keep) as store:  # the next best, where that one is torn
        shutil.rmtree(tmp_path / "2" / "a")
        assert store.best(like).step == 5
    with RunStore(place, keep=Keep(1)) as store:
        assert store.best(like) is None


@pytest.fixture
def config(tiny_config):
    config = tiny_config
    config.num_train_steps, config.steps_per_checkpoint, config.steps_per_eval = 8, 1, 1
    config.train_batch_size, config.keep_checkpoints, config.steps_per_hf_export = 8, 1, None
    config.lr_schedule, config.warmup, config.learning_rate = "constant", 0.0, 1e-3
    return config


def judged(monkeypatch, accuracies):
    """Held-out accuracies that are given, not measured."""
    each, evaluate = iter(accuracies), evaluation.evaluate

    def told(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"eval/heldout/dpo_accuracy": next(each)}

    monkeypatch.setattr(evaluation, "evaluate", told)


@pytest.mark.full
@pytest.mark.parametrize("average", [None, 0.5])
def test_a_run_ends_early_and_exports_its_best(config, monkeypatch, capfd, average):
    config.stop_when, config.stop_patience = "heldout/dpo_accuracy", 2
    config.keep_best, config.ema_decay = "heldout/dpo_accuracy", average
    config.sample_tokens = 4
    with monkeypatch.context() as here:
        judged(here, [0.5, 0.9, 0.6, 0.7])
        dpo.train(config)
    told = capfd.readouterr().out
    assert "the run ends after step 4: heldout/dpo_accuracy has not improved for 2" in told
    assert "the best checkpoint is the one of step 2" in told and "after 2 steps" in told
    assert "heldout accuracy: no preference -> 0.900" in told
    folder = pathlib.Path(config.directory)
    assert [path.name for path in (folder / "hf").iterdir()] == ["step-2"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    # A finished run is finished,
    dpo.train(config)
    again = capfd.readouterr().out
    assert "this run is already finished" in again and "the best checkpoint is the one of" in again
    assert max(r["step"] for r in records(config)) == 4
    # and what it exported is what a run of two steps ends with.
    short = config.copy_and_resolve_references()
    short.directory, short.num_train_steps = f"{config.directory}-short", 2
    short.stop_when = short.keep_best = None
    short.stop_patience = 3
    dpo.train(short)
    for name, array in exported(short, 2).items():
        np.testing.assert_array_equal(exported(config, 2)[name].view("u2"), array.view("u2"))
    # It goes on where nothing stops it.
    config.stop_when, config.stop_patience, config.num_train_steps = None, 3, 8
    with monkeypatch.context() as here:
        judged(here, [0.1] * 4)
        dpo.train(config)
    assert max(r["step"] for r in records(config)) == 8
    assert "the best checkpoint is the one of step 2" in capfd.readouterr().out


@pytest.mark.full
def test_an_early_end_is_the_same_after_a_kill(config, tmp_path, monkeypatch, capfd):
    """The evaluations before the kill count."""
    from tests.conftest import stopped_after

    config.stop_when, config.stop_patience = "heldout/dpo_loss", 2
    config.learning_rate = 1e-9  # nothing improves by much
    with monkeypatch.context() as here:
        evaluate, losses = evaluation.evaluate, iter([3.0, 1.0, 2.0, 1.5])
        judge = lambda *a, **k: evaluate(*a, **k) | {"eval/heldout/dpo_loss": next(losses)}
        here.setattr(evaluation, "evaluate", judge)
        with stopped_after(3):
            dpo.train(config)
        dpo.train(config)
    assert "the run ends after step 4: heldout/dpo_loss" in capfd.readouterr().out
    found = [r["step"] for r in records(config) if "eval/heldout/dpo_loss" in r]
    assert found == [1, 2, 3, 4]


@pytest.mark.full
@pytest.mark.parametrize("by_epochs", [False, True])
def test_a_longer_run_is_the_run_of_that_length(config, capfd, by_epochs):
    """And evaluations stand where the list has them."""
    pairs = len(pathlib.Path(config.train_data).read_text().splitlines())

    def of_length(steps):
        if by_epochs:
            config.num_train_steps, config.num_epochs = None, steps * 8 / pairs
        else:
            config.num_train_steps = steps

    config.steps_per_eval, config.eval_at, config.num_train_steps = None, "1,3", 5
    whole = config.copy_and_resolve_references()
    whole.directory = f"{config.directory}-whole"
    dpo.train(whole)
    found = [r["step"] for r in records(whole) if "eval/heldout/dpo_loss" in r]
    assert found == [1, 3, 5]
    of_length(3)
    dpo.train(config)
    of_length(5)
    capfd.readouterr()
    dpo.train(config)
    assert "resuming from step 3" in capfd.readouterr().out
    assert records(config) == records(whole)
    for name, array in exported(whole, 5).items():
        np.testing.assert_array_equal(exported(config, 5)[name].view("u2"), array.view("u2"))
    of_length(4)
    with pytest.raises(ValueError, match="A run can be made longer, not shorter"):
        dpo.train(config)
    config.eval_at = "9"
    with pytest.raises(
        ValueError, match=r"names step 9, but the run has only 4|holds a run with other"
    ):
        dpo.train(config)

"""What is said aloud, and when."""

import json
import math
import os
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io import places
from recipes.configs import tiny
from recipes.preference import objectives
from recipes.preference.displacement import Trend
from recipes.preference.metrics import preference
from recipes.training import records, run_parts
from recipes.training.run import Records
from recipes.training.update import Answers
from tests.conftest import ROOT, events, given_by, sigmoid


def readings(chosen, rejected, accuracy):
    names = "dpo_chosen_reward", "dpo_rejected_reward", "dpo_accuracy"
    for values in zip(chosen, rejected, accuracy, strict=True):
        yield {f"train/{name}": value for name, value in zip(names, values, strict=True)}


def said(*figures):
    trend = Trend(sigmoid())
    return [trend.read(reading) is not None for reading in readings(*figures)]


def test_both_rewards_falling_is_said_once_with_the_remedies():
    falling = [-0.1, -0.2, -0.3, -0.4], [-0.2, -0.5, -0.9, -1.4], [0.5, 0.6, 0.7, 0.8]
    assert said(*falling) == [False, False, True, False]
    trend = Trend(sigmoid())
    told = [trend.read(reading) for reading in readings(*falling)][2]
    assert "--config.loss=dpop" in told and "--config.beta" in told


@pytest.mark.parametrize(
    "figures",
    [
        ([-0.1, -0.2, -0.1], [-0.2, -0.5, -0.9], [0.5, 0.6, 0.7]),  # chosen came back
        ([0.3, 0.2, 0.1], [-0.2, -0.5, -0.9], [0.5, 0.6, 0.7]),  # still above the reference
        ([-0.1, -0.2, -0.3], [-0.2, -0.1, 0.0], [0.5, 0.6, 0.7]),
        ([-0.1, -0.2, -0.3], [-0.2, -0.5, -0.9], [0.7, 0.6, 0.5]),  # that is seen anyway
    ],
)
def test_what_is_no_such_trend_is_not_said(figures):
    assert not any(said(*figures))


def test_a_policy_in_ruins_is_said_once_whatever_its_accuracy_is():
    trend = Trend(sigmoid())
    figures = {"train/dpo_accuracy": 1.0, "train/dpo_chosen_reward": 1.0,
               "train/dpo_rejected_reward": -1e4, "train/length_chosen": 20.0}  # fmt: skip
    told = [
        trend.read(figures | {"train/drift_chosen": drift}) for drift in (-90.0, -200.0, -999.0)
    ]
    assert told[0] is told[2] is None
    assert "10 nats less likely" in told[1] and "--config.learning_rate" in told[1]


def test_a_run_without_a_name_has_that_of_its_directory():
    name = lambda **other: run_parts.records(given_by(tiny.get_config(), **other)).name
    assert name(directory="gs://bucket/runs/first/") == "tiny"
    for directory in ("gs://bucket/runs/first/", "runs/first", "first"):
        assert name(name=None, directory=directory) == "first"


def test_the_best_is_the_highest_or_the_lowest():
    best = lambda name: run_parts.keep(given_by(tiny.get_config(), keep_best=name)).highest
    figures = {"eval/heldout/dpo_loss": 0.25, "eval/heldout/dpo_accuracy": float("nan")}
    facts = {"held_out": figures}
    assert best(None) is None
    assert best("heldout/dpo_loss")(facts) == -0.25
    assert best("heldout/dpo_loss")({"held_out": {}}) is None
    assert best("heldout/dpo_loss")({}) is None
    assert best("heldout/dpo_accuracy")(facts) is None
    assert (
        best("heldout/dpo_reward_margin")({"held_out": {"eval/heldout/dpo_reward_margin": 0.5}})
        == 0.5
    )


def test_the_reward_margin_is_beta_times_what_chosen_gained_over_rejected():
    policy, reference = jnp.array([[-1.0, -5], [-2, -3]]), jnp.array([[-2.0, -4], [-2, -2]])
    answers = Answers(policy, reference, jnp.ones((2, 2), jnp.int32), jnp.full((2, 2), jnp.nan))
    objective = sigmoid(0.1)
    values = preference(answers, objective)
    assert float(values["dpo_reward_margin"]) == pytest.approx(0.1 * ((1 + 1) + (0 + 1)) / 2)
    assert float(values["dpo_margin_policy"]) == pytest.approx((4 + 1) / 2)
    one = preference(answers, objective, jnp.array([True, False]))
    assert float(one["dpo_reward_margin"]) == pytest.approx(0.2)


def test_how_far_the_policy_went_and_whether_it_learns_length():
    reference = jnp.full((3, 2), -20.0)
    policy = reference + jnp.array([[4.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    tokens = jnp.array([[8, 4], [6, 4], [4, 5]])
    values = preference(Answers(policy, reference, tokens), sigmoid(0.1))
    k3 = lambda d: math.exp(d) - 1 - d
    assert float(values["kl_chosen"]) == pytest.approx(
        (k3(4 / 8) + k3(2 / 6) + k3(-1 / 4)) / 3, rel=1e-5
    )
    margins, longer = [0.4, 0.2, -0.1], [4, 2, -1]
    expected = np.corrcoef(margins, longer)[0, 1]
    assert float(values["length_correlation"]) == pytest.approx(expected, rel=1e-5)
    same = preference(Answers(policy, reference, jnp.full((3, 2), 4)), sigmoid(0.1))
    assert float(same["length_correlation"]) == 0.0
    alone = objectives.objective({"loss": "simpo", "beta": 2.0})
    assert "kl_chosen" not in preference(Answers(policy, reference * 0, tokens), alone)


def test_several_losses_are_logged_by_name():
    answers = Answers(jnp.array([[-1.0, -5]]), jnp.array([[-2.0, -4]]), jnp.array([[2, 5]]))
    both = objectives.objective({"loss": "sigmoid,sft=0.5", "beta": 0.1})
    values = preference(answers, both)
    assert float(values["loss_sft"]) == 0.5
    expected = float(values["loss_sigmoid"]) + 0.25
    assert float(values["dpo_loss"]) == pytest.approx(expected, rel=1e-6)
    assert "loss_sigmoid" not in preference(answers, sigmoid(0.1))


def test_the_line_has_the_figures_to_watch():
    figures = {"dpo_loss": 0.5, "dpo_margin_policy": 7.0, "dpo_reward_margin": 0.25}
    figures = {f"eval/heldout/{name}": value for name, value in figures.items()}
    told = records.line(20, 60, figures)
    assert told == "step 20/60     eval/heldout     dpo_loss 0.5  dpo_reward_margin 0.25"
    told = records.line(20, 60, {"eval/arc/acc": 0.25, "eval/arc/acc_norm": 0.5})
    assert told == "step 20/60     eval/arc         acc 0.25  acc_norm 0.5"


def test_held_out_figures_of_a_step_are_read_back(tmp_path):
    assert records.of_held_out(places.Disk(tmp_path), 2) == {}
    written = [
        {"step": 2, "train/dpo_loss": 0.5},
        {"step": 2, "eval/heldout/dpo_loss": 0.75},  # of a run that was stopped behind it
        {"step": 2, "eval/heldout/dpo_loss": 0.25, "eval/heldout/odd": "word"},
        {"step": 4, "eval/heldout/dpo_loss": 0.125},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written) + '{"st')
    assert records.of_held_out(places.Disk(tmp_path), 2) == {"eval/heldout/dpo_loss": 0.25}
    assert records.of_held_out(places.Disk(tmp_path), 3) == {}


def test_tensorboard_does_not_import_torch_and_leaves_it_to_others(tmp_path):
    (tmp_path / "torch.py").write_text("came = True")  # whether there is a real one or not
    code = (
        "import sys; from checkpoints_io import places; from recipes.training import records\n"
        "from recipes.training.run import Records\n"
        "given = Records(tensorboard=True, wandb_project=None, name='a', tags=(), settings={})\n"
        "records.Log(places.at(sys.argv[1]), given, after=-1).close()\n"
        "assert 'tensorboardX' in sys.modules and 'torch' not in sys.modules\n"
        "import torch; assert torch.came"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def test_tensorboard_shows_first_what_people_watch(tmp_path):
    """Its groups of charts, and the charts of a group, stand in the order of their names."""
    log = records.Log(places.Disk(tmp_path), Records(True, None, "a", (), {}), after=-1)
    log.write(
        1, {"train/dpo_accuracy": 0.5, "train/gradient_norm": 2.0, "train/mine/dpo_loss": 1.0}
    )
    log.write(1, {"eval/validation/x/dpo_accuracy": 0.75, "eval/validation/x/dpo_reward_margin": 3})
    log.close()
    room = tmp_path / "tensorboard"
    found = {
        name: [value.tag for event in events(room / name) for value in event.summary.value]
        for name in ("", "train", "validation_x")
    }
    assert found["train"] == ["0_watch/2_dpo_accuracy"]
    assert found["validation_x"] == ["0_watch/2_dpo_accuracy", "0_watch/1_dpo_reward_margin"]
    assert "train/gradient_norm" in found[""] and "eval/validation/x/dpo_accuracy" in found[""]
    assert min([*found[""], *found["train"]]).startswith("0_watch/")


@pytest.mark.parametrize(("after", "first"), [(-1, 0), (7, 8)])
def test_tensorboard_forgets_steps_that_are_taken_again(tmp_path, after, first):
    log = records.Log(places.Disk(tmp_path), Records(True, None, "a", (), {}), after=after)
    log.write(9, {"train/loss": 0.5})
    log.close()
    starts = [e for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert [(e.session_log.status, e.step) for e in starts] == [(1, first)]  # 1: a start


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_tracker_is_given_every_record_and_the_samples(library, tmp_path, monkeypatch):
    """A stand-in: what is called, and with what."""
    called = []
    run = types.SimpleNamespace(
        log=lambda values, step: called.append((step, values)), finish=lambda: called.append("end")
    )
    module = types.SimpleNamespace(
        init=lambda **given: called.append(given) or run, Table=lambda **table: table
    )
    monkeypatch.setitem(sys.modules, library, module)
    projects = {"wandb_project": None, "trackio_project": None, f"{library}_project": "mine"}
    given = Records(
        tensorboard=False, name="a", tags=(), settings={"beta": 0.1}, samples=True, **projects
    )
    room = places.at(str(tmp_path), "here")
    for after in (-1, 2):  # started again it is the same run
        log = records.Log(room, given, after=after)
        log.write(2, {"train/loss": 0.5})
        log.samples(2, [{"step": 2, "policy": "yes", "log_ratios": {}}])
        log.close()
    first, *told = called[:4]
    assert first["project"] == "mine" and first["config"] == {"beta": 0.1}
    table = {"columns": ["step", "policy"], "data": [[2, "yes"]]}
    assert told == [(2, {"train/loss": 0.5}), (2, {"samples": table}), "end"]
    assert called[4] == first and len(first.get("id") or first["name"]) >= len("a-123456")


TRACKED = """
import sys
from checkpoints_io import places
from recipes.training import records
from recipes.training.run import Records

project = {f"{sys.argv[2]}_project": "mine"}
given = Records(False, None, "tiny", ("dpo",), {"beta": 0.1}, samples=True)._replace(**project)
for after, steps in ((-1, (1, 2)), (2, (3,))):
    log = records.Log(places.at(sys.argv[1], "here"), given, after=after)
    for step in steps:
        log.write(step, {"train/loss": step / 4, "eval/held/dpo_accuracy": 1.0})
    log.samples(steps[-1], [{"step": steps[-1], "policy": "yes", "log_ratios": {}}])
    log.close()
"""


@pytest.mark.full
def test_trackio_keeps_them_on_this_machine(tmp_path):
    """The library itself, without network."""
    pytest.importorskip("trackio")
    there = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    there["PYTHONPATH"] = str(ROOT)
    words = [sys.executable, "-c", TRACKED, str(tmp_path / "run"), "trackio"]
    (tmp_path / "run").mkdir()
    subprocess.run(words, env=there, check=True, capture_output=True, timeout=120)
    ask = "import json, trackio; (run,) = trackio.Api().runs('mine'); "
    ask += "from trackio.sqlite_storage import SQLiteStorage as kept; "
    ask += "print(json.dumps([run.name, kept.get_logs('mine', run.name)]))"
    told = subprocess.run(
        [sys.executable, "-c", ask], env=there, check=True, capture_output=True, text=True
    )
    name, rows = json.loads(told.stdout.splitlines()[-1])
    assert name.startswith("tiny-")
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(1, 0.25), (2, 0.5), (3, 0.75)]
    tables = [row["samples"]["_value"] for row in rows if "samples" in row]
    assert tables == [[{"step": 2, "policy": "yes"}], [{"step": 3, "policy": "yes"}]]


@pytest.mark.full
def test_weights_and_biases_keeps_them_until_it_is_asked_to_send_them(tmp_path):
    """The library itself, in its offline mode."""
    pytest.importorskip("wandb")
    there = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", TRACKED, str(tmp_path), "wandb"]
    subprocess.run(words, env=there, check=True, capture_output=True, timeout=240)
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    own = (tmp_path / "wandb_id").read_text()
    assert len(runs) == 2 and all(run.name.endswith(own) for run in runs)  # one run, in two parts
    for run, step in zip(runs, (2, 3), strict=True):
        (told,) = run.glob("*.wandb")
        assert b"eval/held/dpo_accuracy" in told.read_bytes()
        (table,) = run.rglob("*.table.json")
        table = json.loads(table.read_text())
        assert (table["columns"], table["data"]) == (["step", "policy"], [[step, "yes"]])

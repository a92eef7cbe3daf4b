"""What happens around the steps of a run, and when, with steps that train a single number."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io import places
from checkpoints_io.run_state import Keep, RunStore
from recipes.data.packed.batches import Update
from recipes.training import by_time, loop, policy, preemption, records
from recipes.training.policy import Policy, State
from recipes.training.run import Every, Patience, Records, Saving, Watching
from tests.conftest import run_with

ACCURACY = "eval/heldout/dpo_accuracy"
UPDATE = Update(
    source_rows=np.array([0]), micro_batches=[], real_tokens=8, stored_tokens=8, positions=16,
    scored=np.array([[3, 2]]), ratings=np.full((1, 2), np.nan), weights=np.ones(1),
    margins=np.zeros(1), names=("chosen", "rejected"),
)  # fmt: skip
NEVER = Every(
    steps_per_log=99, steps_per_eval=None, steps_per_checkpoint=None, minutes_per_checkpoint=None,
    steps_per_hf_export=None,
)  # fmt: skip


class Watched:
    """A run of four steps: what it did is told in words, in order."""

    def __init__(self, folder, monkeypatch, name="run", **parts):
        folder = folder / name
        folder.mkdir(exist_ok=True)
        self.did: list[str] = []
        self.accuracy = {2: 0.9, 4: 0.5}  # by step
        self.not_finite: set[int] = set()  # steps
        self.stop_after = 99
        saving = parts.pop("saving", Saving(Keep(9), 2, jnp.float32, False, None))
        self.run = run_with(
            directory=places.Disk(folder), records=Records(False, None, "x", (), {}), total_steps=4,
            every=parts.pop("every", NEVER), saving=saving, nonfinite="stop", profile=range(0),
            run_initial_eval=False, watching=Watching(None, None, 0, None), eval_at=frozenset(),
            counts={}, schedule=lambda step: jnp.asarray(1e-3 * step),
            trained=types.SimpleNamespace(like={"w": jax.ShapeDtypeStruct((), jnp.float32)}),
            optimizer_settings=types.SimpleNamespace(ema_decay=None),
        )._replace(**parts)  # fmt: skip
        self.store = RunStore(places.Disk(folder / "checkpoints"), keep=saving.keep, retries=2)
        endless = lambda *_, start: iter(lambda: UPDATE, None)
        monkeypatch.setattr(loop.batches, "iterate", endless)
        monkeypatch.setattr(loop.mixture, "endless", lambda *_: None)
        monkeypatch.setattr(policy, "export_model", lambda own, state: None)
        monkeypatch.setattr(policy, "export", self.export)
        real = policy.save
        monkeypatch.setattr(
            policy, "save",
            lambda state, *rest: (self.did.append(f"save {state.step}"), real(state, *rest)),
        )  # fmt: skip

    def export(self, model, step, run):
        self.did.append(f"export {step}")
        folder = policy.export_folder(step, run).path
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def take(self, state, update):
        step = state.step + 1
        self.did.append(f"step {step}")
        after = State(
            step, {"w": jnp.float32(step)}, {}, {"m": jnp.float32(0)},
            state.skipped + (step in self.not_finite), state.skipped_before,
        )  # fmt: skip
        return loop.Taken(after, {"loss": jnp.float32(step)}, None)

    def evaluate(self, state):
        self.did.append(f"evaluate {state.step}")
        yield {ACCURACY: self.accuracy.get(state.step, 0.1)}

    def page(self, directory):
        self.did.append("page")

    def go(self, start=0):
        recipe = loop.Recipe(
            take=self.take, evaluate=self.evaluate, sample=lambda _: [], page=self.page
        )
        own = Policy(*[None] * len(Policy._fields))
        state = State(start, {"w": jnp.float32(start)}, {}, {"m": jnp.float32(0)})
        stop = lambda: f"step {self.stop_after}" in self.did
        state, held_out = loop.run_steps(recipe, own, state, self.run, self.store, {}, stop)
        self.store.wait()
        return state.step, held_out

    @property
    def recorded(self):
        """The steps of records, by what they are of."""
        lines = self.run.directory.read("metrics.jsonl").decode().splitlines()
        found = [json.loads(line) for line in lines]
        return {
            what: [one["step"] for one in found if any(name.startswith(what) for name in one)]
            for what in ("train/", "eval/")
        }

    @property
    def held(self):
        """Steps with a checkpoint."""
        names = [path.name for path in (self.run.directory.path / "checkpoints").iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture
def watched(tmp_path, monkeypatch):
    return functools.partial(Watched, tmp_path, monkeypatch)


def test_what_is_due_is_done_after_its_step(watched):
    every = Every(
        steps_per_log=3, steps_per_eval=2, steps_per_checkpoint=2, minutes_per_checkpoint=None,
        steps_per_hf_export=3,
    )  # fmt: skip
    run = watched(every=every)
    assert run.go() == (4, {ACCURACY: 0.5})
    assert run.did == [
        "step 1", "step 2", "evaluate 2", "page", "save 2", "step 3", "export 3",
        "step 4", "evaluate 4", "page", "save 4", "export 4", "page",
    ]  # fmt: skip
    assert run.recorded == {"train/": [1, 3, 4], "eval/": [2, 4]}
    assert run.held == [2, 4]


def test_the_last_step_alone_unless_more_is_asked_for(watched):
    run = watched()
    run.go()
    assert run.did == [
        "step 1", "step 2", "step 3", "step 4", "evaluate 4", "page", "save 4", "export 4", "page",
    ]  # fmt: skip
    early = watched("a", eval_at=frozenset({1}))
    early.go()
    assert early.recorded["eval/"] == [1, 4]
    never = watched("b", every=NEVER._replace(steps_per_hf_export=-1), run_initial_eval=True)
    never.go()
    assert "export 4" not in never.did and never.did[0] == "evaluate 0"


def test_an_update_that_is_not_finite_ends_the_run_before_it_is_saved(watched):
    """One step later: nothing waits for a step's own result."""
    run = watched(every=NEVER._replace(steps_per_checkpoint=1))
    run.not_finite = {3}
    with pytest.raises(RuntimeError, match="at step 3 the loss or its gradient was NaN"):
        run.go()
    run.store.wait()
    assert run.held == [1, 2]
    unsaved = watched("b")
    unsaved.not_finite = {2}
    with pytest.raises(RuntimeError, match="at step 2 the loss"):
        unsaved.go()
    assert unsaved.did == ["step 1", "step 2", "step 3"]
    skips = watched("c", nonfinite="skip")
    skips.not_finite = {2}
    assert skips.go()[0] == 4


def test_a_run_that_is_asked_to_stop_saves_and_exports_nothing(watched, capsys):
    run = watched(every=NEVER._replace(steps_per_eval=1, steps_per_hf_export=1))
    run.stop_after = 2
    assert run.go() == (2, {})
    assert run.did == ["step 1", "evaluate 1", "page", "export 1", "step 2", "save 2"]
    assert "stopped after step 2: the same command resumes from there" in capsys.readouterr().out
    again = watched("b", every=NEVER)
    again.stop_after, again.did = 0, ["step 0"]
    with pytest.raises(preemption.StopRequested):
        again.go(start=2)
    assert again.did == ["step 0"]


def test_an_evaluation_that_is_broken_off_is_no_evaluation(watched):
    run = watched(every=NEVER._replace(steps_per_eval=2))

    def evaluate(state):
        yield from Watched.evaluate(run, state)
        run.did.append("asked")
        run.stop_after = 2
        raise preemption.StopRequested

    run.evaluate = evaluate
    assert run.go() == (2, {})
    assert run.did == ["step 1", "step 2", "evaluate 2", "asked", "save 2"]
    assert run.recorded["eval/"] == []
    resumed = watched(every=NEVER._replace(steps_per_eval=2))
    resumed.go(start=2)
    assert resumed.did[:2] == ["evaluate 2", "step 3"]


def test_what_was_due_when_a_run_stopped_is_done_first(watched):
    every = NEVER._replace(steps_per_eval=2, steps_per_hf_export=2)
    first = watched(every=every)
    first.stop_after = 2
    first.go()
    resumed = watched(every=every)
    resumed.go(start=2)
    assert resumed.did[:4] == ["evaluate 2", "export 2", "step 3", "step 4"]
    assert resumed.recorded["eval/"] == [2, 4]
    done = watched(every=every)
    assert done.go(start=4) == (4, {ACCURACY: 0.5})  # which is read, and not measured again
    assert done.did == []


@pytest.mark.parametrize("rings", [True, False])
def test_a_checkpoint_by_the_clock_begins_the_minutes_again(watched, monkeypatch, rings):
    restarted = []
    monkeypatch.setattr(by_time.Alarm, "rings", lambda self: rings and run.did[-1] == "step 2")
    monkeypatch.setattr(by_time.Alarm, "restart", lambda self: restarted.append(True))
    run = watched()
    run.go()
    assert run.held == ([2, 4] if rings else [4])
    assert len(restarted) == 1 + len(run.held)  # at the start, too


def test_the_best_checkpoint_is_what_is_exported(watched):
    highest = lambda facts: facts["held_out"].get(ACCURACY)
    saving = Saving(Keep(1, highest=highest), 2, jnp.float32, False, None)
    every = NEVER._replace(steps_per_eval=2, steps_per_checkpoint=2)
    run = watched(every=every, saving=saving)
    assert run.go() == (2, {ACCURACY: 0.9})
    assert run.did[-3:] == ["save 4", "page", "export 2"]
    assert records.result(run.run.directory) == "hf/step-2"
    again = watched(every=every, saving=saving)
    assert again.go(start=4)[0] == 2
    assert again.did == []
    silent = watched("b", every=every._replace(steps_per_hf_export=-1), saving=saving)
    assert silent.go()[0] == 2
    assert not [what for what in silent.did if "export" in what]


def test_a_checkpoint_of_a_stop_is_the_best_once_it_is_evaluated(watched):
    """Also the last one, and also after another step has been saved."""
    highest = lambda facts: facts["held_out"].get(ACCURACY)
    saving = Saving(Keep(1, highest=highest), 2, jnp.float32, False, None)
    every = NEVER._replace(steps_per_eval=2, steps_per_checkpoint=2)
    for at, accuracy in ((4, {2: 0.5, 4: 0.9}), (2, {2: 0.9, 4: 0.5})):
        first = watched(f"stopped after {at}", every=every, saving=saving)
        first.accuracy, first.stop_after = accuracy, at
        first.go()
        resumed = watched(f"stopped after {at}", every=every, saving=saving)
        resumed.accuracy = accuracy
        assert resumed.go(start=at) == (at, {ACCURACY: 0.9})
        assert resumed.did[-1] == f"export {at}" and at in resumed.held
        again = watched(f"stopped after {at}", every=every, saving=saving)
        assert again.go(start=4)[0] == at


def test_a_last_save_that_was_lost_is_made_again(watched, monkeypatch):
    lost = [True, True, False]
    monkeypatch.setattr(
        RunStore, "lost", lambda self: run.did[-1] in ("export 4", "save 4") and lost.pop(0)
    )
    run = watched()
    run.go()
    assert run.did[-4:] == ["export 4", "save 4", "save 4", "page"] and not lost


def test_a_run_ends_where_its_figure_no_longer_improves(watched):
    patience = Patience("heldout/dpo_accuracy", 2, higher=True)
    run = watched(every=NEVER._replace(steps_per_eval=1), patience=patience, total_steps=9)
    run.accuracy = {1: 0.3, 2: 0.9, 3: 0.8, 4: 0.8}
    assert run.go()[0] == 4
    assert run.did[-4:] == ["page", "save 4", "export 4", "page"]
    done = watched(patience=patience, total_steps=9)
    assert done.go(start=4)[0] == 4 and done.did == []  # as it is recorded


def test_a_run_ends_by_the_evaluation_that_was_due_when_it_stopped(watched):
    patience = Patience("heldout/dpo_accuracy", 2, higher=True)
    how = dict(every=NEVER._replace(steps_per_eval=1), patience=patience, total_steps=9)
    first = watched(**how)
    first.accuracy, first.stop_after = {1: 0.9, 2: 0.8}, 3
    assert first.go()[0] == 3
    resumed = watched(**how)
    assert resumed.go(start=3) == (3, {ACCURACY: 0.1})
    assert resumed.did == ["evaluate 3", "export 3", "page"]


@pytest.mark.parametrize(
    ("steps", "start", "stop_after", "expected"),
    [
        (range(2, 4), 0, 99, ["step 1", "on", "step 2", "step 3", "off", "step 4"]),
        (range(2, 4), 2, 99, ["on", "step 3", "off", "step 4"]),  # of which one was before
        (range(1, 3), 2, 99, ["step 3", "step 4"]),
        (range(3, 9), 0, 99, ["step 1", "step 2", "on", "step 3", "step 4", "off"]),
        (range(1, 4), 0, 2, ["on", "step 1", "step 2", "off"]),
    ],
)
def test_steps_are_traced(watched, monkeypatch, steps, start, stop_after, expected):
    """To the last of them, or to the end of the run."""
    run = watched(profile=steps)
    run.stop_after = stop_after
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: run.did.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: run.did.append("off"))
    run.go(start)
    assert [did for did in run.did if did in ("on", "off") or did.startswith("step")] == expected


def test_a_page_that_fails_ends_no_run(watched, capsys):
    def page(_):
        raise ZeroDivisionError("in the page")

    run = watched()
    run.page = page
    assert run.go()[0] == 4
    told = "the page of the run could not be written: ZeroDivisionError('in the page')"
    assert told in capsys.readouterr().out

"""Asked to stop, a run saves, ends well, and goes on as if it had not stopped; and it is alone."""

import contextlib
import fcntl
import json
import os
import pathlib
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from checkpoints_io import places
from recipes import dpo
from recipes.preference import evaluation
from recipes.training import preemption
from recipes.training.records import Log
from recipes.training.run import Records
from tests.conftest import ROOT, devices


def started(directory, *flags, **environment):
    command = [
        sys.executable, "recipes/dpo.py", "--config=recipes/configs/tiny.py",
        f"--config.directory={directory}", "--config.token_cache=None",
        "--config.tensorboard=False", "--config.compile_cache=None", "--config.steps_per_log=1",
        "--config.sample_tokens=0",
        "--config.run_initial_eval=False", "--config.max_eval_pairs=8", *flags,
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def records(directory):
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(directory):
    """Of each step: what does not hang on the clock."""
    return {
        r["step"]: {
            k: v for k, v in r.items() if not any(word in k for word in ("second", "wait", "time/"))
        }
        for r in records(directory)
        if "train/dpo_loss" in r
    }


def wait_for(step, directory, process):
    while process.poll() is None and step not in figures(directory):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0][-2000:]


FLAGS = ("--config.num_train_steps=12", "--config.steps_per_checkpoint=100")


@pytest.mark.full
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_ends_well(tmp_path, asked):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    process = started(whole, *FLAGS)
    process.stdout.readline()
    process.stdout.close()  # `2>&1 | head -1` has seen enough, and the run goes on
    assert process.wait() == 0
    assert figures(whole).keys() == set(range(1, 13))
    process = started(parted, *FLAGS)
    wait_for(3, parted, process)
    process.send_signal(asked)
    told = process.communicate()[0]
    assert process.returncode == 75, told[-2000:]
    assert "the same command resumes from there" in told
    stopped = max(figures(parted))
    assert 3 <= stopped < 12
    told = started(parted, *FLAGS).communicate()[0]
    assert f"resuming from step {stopped}" in told
    assert figures(parted) == figures(whole)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_it_at_once(first):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), preemption.stop_on_signals() as stop:
        assert not stop()
        signal.raise_signal(first)
        assert stop()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("number", "begin", "end"),
    [
        (signal.SIGINT, "stop requested: ", "; a second Ctrl-C ends the run at once"),
        (signal.SIGTERM, "stop requested by SIGTERM: ", "is finished and saved"),
    ],
)
def test_it_is_said_how_it_was_asked(monkeypatch, number, begin, end):
    said = queue.Queue()
    monkeypatch.setattr(preemption, "say", said.put)
    with preemption.stop_on_signals():
        signal.raise_signal(number)
        told = said.get(timeout=60).strip()
    assert told.startswith(begin) and told.endswith(end)


# The main thread waits for the devices, where it sees no signal.
WAITING = """
import jax
from recipes.training import preemption as stopping

with stopping.stop_on_signals():
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 1, lambda x: x / 2, x))
    print("waiting", flush=True)
    jax.block_until_ready(endless(0.5))
"""


def test_a_second_interrupt_does_not_wait_for_the_devices():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "\n"
    told = process.stdout.readline()  # before the step is over
    assert told.startswith("stop requested: ") and told.endswith(
        "; a second Ctrl-C ends the run at once\n"
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


# It would wait for a thread, as for one that saves.
SAVING = """
import signal, threading, time
from recipes.training import command, settings, preemption as stopping

def train(_):
    with stopping.stop_on_signals():
        threading.Thread(target=time.sleep, args=(600,)).start()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

command.main(train, settings.DPO)
"""


def test_an_interrupted_program_waits_for_no_thread():
    done = subprocess.run(
        [sys.executable, "-c", SAVING, "--config=recipes/configs/tiny.py"], cwd=ROOT,
        capture_output=True, text=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


def test_asking_twice_to_end_is_asking_once():
    """Whoever takes a machine away may say it again."""
    with preemption.stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(preemption.GRACE + 0.3)
        assert stop()


@pytest.mark.full
def test_what_was_due_at_the_step_of_the_stop_still_happens(tiny_config, monkeypatch, capsys):
    config = tiny_config
    config.num_train_steps, config.steps_per_eval, config.steps_per_hf_export = 4, 2, 2
    directory = pathlib.Path(config.directory)
    with monkeypatch.context() as patched:
        behind_step_2 = contextlib.nullcontext(lambda: 2 in figures(directory))
        patched.setattr(preemption, "stop_on_signals", lambda: behind_step_2)
        dpo.train(config)
    assert max(figures(directory)) == 2
    evaluated = lambda: [r["step"] for r in records(directory) if "eval/heldout/dpo_loss" in r]
    assert (evaluated(), [*(directory / "hf").iterdir()]) == ([], [])
    dpo.train(config)
    assert evaluated() == [2, 4]
    assert sorted(path.name for path in (directory / "hf").iterdir()) == ["step-2", "step-4"]
    capsys.readouterr()
    dpo.train(config)  # finished before
    assert evaluated() == [2, 4]
    assert "heldout reward margin: 0 -> " in capsys.readouterr().out  # as it was recorded


@pytest.mark.full
@pytest.mark.parametrize(("at", "left"), [(0, []), (2, [2])])
def test_an_evaluation_is_given_up_when_the_run_is_asked_to_stop(
    tiny_config, monkeypatch, at, left
):
    """Its figures may take minutes, and a machine goes in seconds; the next start has them all."""
    config = tiny_config
    config.num_train_steps, config.steps_per_eval, config.run_initial_eval = 3, 2, True
    config.validation.second = config.validation.heldout
    directory = pathlib.Path(config.directory)
    evaluate, asked = evaluation.evaluate, []

    def interrupted(held_out, *rest):
        asked.append(held_out.name)
        if len(figures(directory)) == at and held_out.name == "second":
            signal.raise_signal(signal.SIGTERM)
        return evaluate(held_out, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", interrupted)
        assert dpo.train(config) is False
    assert asked == ["heldout", "second"] * (1 + at // 2)
    assert [int(path.name) for path in (directory / "checkpoints").iterdir()] == left
    evaluated = lambda: [r["step"] for r in records(directory) if "eval/second/dpo_loss" in r]
    assert evaluated() == [step for step in (0, 2) if step < at]
    assert dpo.train(config) is True
    assert evaluated() == [0, 2, 3]
    assert figures(directory).keys() == {1, 2, 3}


def test_records_outlast_a_kill_while_they_are_cut_to_the_checkpoint(tmp_path, monkeypatch):
    given = Records(tensorboard=False, wandb_project=None, name="a", tags=(), settings={})
    log = Log(places.Disk(tmp_path), given, after=-1)
    log.write(1, {"train/dpo_loss": 0.5})
    log.close()

    rename = pathlib.Path.rename

    def killed(part, path):
        if path.name == "metrics.jsonl":
            raise KeyboardInterrupt
        rename(part, path)

    monkeypatch.setattr(pathlib.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Log(places.Disk(tmp_path), given, after=1)
    assert records(tmp_path) == [{"step": 1, "train/dpo_loss": 0.5}]


def test_two_runs_cannot_share_a_directory(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another run is using"):
            dpo.train(tiny_config)


def both(directory, *flags):
    """Two processes of four devices each, over loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [
        "--config.distributed.enabled", f"--config.distributed.coordinator_address={where}",
        "--config.distributed.num_processes=2", "--config.per_device_parallelism=1",
        "--config.min_pack_fill=0.3", *flags,
    ]  # fmt: skip
    return [
        started(directory, *flags, f"--config.distributed.process_id={i}", **devices(4))
        for i in range(2)
    ]


def ended(processes, status=0):
    told = [process.communicate(timeout=600)[0] for process in processes]
    assert {p.returncode for p in processes} == {status}, "".join(t[-1500:] for t in told)
    return told


@pytest.mark.full
def test_two_processes_stop_behind_the_same_step(tmp_path):
    """One of them is asked; both save, end well, and go on together."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    ended(both(whole, *FLAGS))
    # With saves behind every step, at which Orbax asks jax for the signal too.
    processes = both(parted, *FLAGS, "--config.steps_per_checkpoint=1")
    wait_for(3, parted, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    told = ended(processes, 75)[0]
    assert "the same command resumes from there" in told
    stopped = max(figures(parted))
    assert 3 <= stopped < 12
    shutil.copytree(parted, tmp_path / "alone")
    assert f"resuming from step {stopped}" in ended(both(parted, *FLAGS))[0]
    assert figures(parted) == figures(whole)
    # And one process of as many devices meets the same pairs.
    shape = "--config.per_device_parallelism=1", "--config.min_pack_fill=0.3"
    (told,) = ended([started(tmp_path / "alone", *FLAGS, *shape, **devices(8))])
    assert f"resuming from step {stopped}" in told
    alone, together = (
        [record["train/dpo_loss"] for record in figures(directory).values()]
        for directory in (tmp_path / "alone", whole)
    )
    assert alone == pytest.approx(together, abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_of_two_processes_one_is_killed(tmp_path, victim):
    """jax, which misses its heartbeats, ends the other, and both go on as if nothing had been."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = "--config.num_train_steps=8", "--config.steps_per_checkpoint=3"
    ended(both(whole, *flags))
    processes = both(parted, *flags)
    wait_for(4, parted, processes[0])
    processes[victim].kill()
    other = processes[1 - victim]
    told = other.communicate(timeout=240)[0]
    assert other.returncode not in (0, None), told[-2000:]
    assert "resuming from step 3" in ended(both(parted, *flags))[0]
    assert figures(parted) == figures(whole)


@pytest.mark.full
def test_an_error_of_one_process_ends_both(tmp_path):
    """What only one meets, a folder that is in the way, while the other goes on to its next sum."""
    run, in_the_way = tmp_path / "run", tmp_path / "run" / "hf" / "step-40"
    flags = "--config.num_train_steps=60", "--config.steps_per_checkpoint=40"
    processes = both(run, *flags, "--config.steps_per_hf_export=40")
    while not (run / "metrics.jsonl").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    in_the_way.mkdir(parents=True)  # at the start it would have been refused
    (in_the_way / "notes.txt").write_text("mine")
    told = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert "holds something other than a model" in told[0], told[0][-2000:]
    assert (run / "checkpoints" / "40").is_dir()  # the save under way was finished


@pytest.mark.full
@pytest.mark.parametrize("between", [1, 2, 4])
def test_another_number_of_devices_goes_on_with_the_same_numbers(tmp_path, between):
    """From eight to some and back, a checkpoint each time: losses within 1e-6."""
    flags = (
        "--config.num_train_steps=6", "--config.steps_per_checkpoint=2",
        "--config.per_device_parallelism=1", "--config.min_pack_fill=0.3",
    )  # fmt: skip

    def run(directory, count):
        process = started(directory, *flags, "--config.keep_checkpoints=3", **devices(count))
        told = process.communicate(timeout=600)[0]
        assert process.returncode == 0, told[-3000:]
        return told

    run(tmp_path / "eight", 8)
    there = tmp_path / "there and back"
    for count, step in ((between, 2), (8, 4)):
        before = there if there.exists() else tmp_path / "eight"
        shutil.copytree(before, tmp_path / f"from {step}")
        for later in range(step + 2, 8, 2):
            shutil.rmtree(tmp_path / f"from {step}" / "checkpoints" / str(later))
        there = tmp_path / f"from {step}"
        assert f"resuming from step {step}" in run(there, count)
    one, other = figures(tmp_path / "eight"), figures(there)
    apart = [abs(one[at]["train/dpo_loss"] - other[at]["train/dpo_loss"]) for at in range(1, 7)]
    print(between, apart)
    assert max(apart) <= 1e-6


def test_jax_still_has_the_private_name_that_orbax_is_kept_from(monkeypatch):
    """Where a version of jax moves it this fails: `preemption._taken_from_jax` has to follow."""
    from jax._src import distributed

    state = distributed.global_state
    assert hasattr(state, "preemption_sync_manager")
    monkeypatch.setattr(state, "preemption_sync_manager", mine := object())
    manager, give_back = preemption._taken_from_jax()
    assert (manager, state.preemption_sync_manager) == (mine, None)
    give_back()
    assert state.preemption_sync_manager is mine


def test_private_names_of_jax_stand_in_one_function():
    for package in ("zoo", "recipes", "checkpoints_io"):
        for path in (ROOT / package).rglob("*.py"):
            lines = [line for line in path.read_text().splitlines() if "jax._src" in line]
            assert len(lines) == (path.name == "preemption.py"), path

"""Asked to stop, a run saves, ends well, and goes on as if it had not stopped; and it is alone."""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from recipes import dpo, stopping
from tests.conftest import ROOT


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
        r["step"]: {k: v for k, v in r.items() if "second" not in k and "wait" not in k}
        for r in records(directory)
        if "train/dpo_loss" in r
    }


def wait_for(step, directory, process):
    while process.poll() is None and step not in figures(directory):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0][-2000:]


FLAGS = ("--config.num_train_steps=12", "--config.steps_per_checkpoint=100")


@pytest.mark.parametrize(
    "asked", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_a_run_that_is_asked_to_stop_saves_and_ends_well(tmp_path, asked):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    told = started(whole, *FLAGS).communicate()[0]
    assert figures(whole).keys() == set(range(1, 13)), told[-2000:]
    process = started(parted, *FLAGS)
    wait_for(3, parted, process)
    process.send_signal(asked)
    told = process.communicate()[0]
    assert process.returncode == 0, told[-2000:]
    assert "the same command goes on from there" in told
    stopped = max(figures(parted))
    assert 3 <= stopped < 12
    told = started(parted, *FLAGS).communicate()[0]
    assert f"going on from step {stopped}" in told
    assert figures(parted) == figures(whole)


def test_a_second_interrupt_ends_it_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopping.asked() as stop:
        assert not stop(1)
        signal.raise_signal(signal.SIGINT)
        assert stop(2)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_was_due_at_the_step_of_the_stop_still_happens(tiny_config, monkeypatch):
    config = tiny_config
    config.num_train_steps, config.steps_per_eval, config.steps_per_hf_export = 4, 2, 2
    with monkeypatch.context() as patched:
        at_2 = contextlib.nullcontext(lambda step: step == 2)
        patched.setattr(stopping, "asked", lambda: at_2)
        dpo.train(config)
    directory = pathlib.Path(config.directory)
    evaluated = lambda: [r["step"] for r in records(directory) if "eval/heldout/dpo_loss" in r]
    assert (evaluated(), [*(directory / "hf").iterdir()]) == ([], [])
    dpo.train(config)
    assert evaluated() == [2, 4]
    assert sorted(path.name for path in (directory / "hf").iterdir()) == ["step-2", "step-4"]
    dpo.train(config)  # finished before
    assert evaluated() == [2, 4]


def test_two_runs_cannot_share_a_directory(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another run is going on in"):
            dpo.train(tiny_config)


@pytest.mark.full
def test_two_processes_stop_behind_the_same_step(tmp_path):
    """One of them is asked; both save, end well, and go on together."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"

    def both(directory):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = [
            "--config.distributed.enabled", f"--config.distributed.coordinator_address={where}",
            "--config.distributed.num_processes=2", "--config.per_device_parallelism=1",
            "--config.min_pack_fill=0.3", *FLAGS,
        ]  # fmt: skip
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        return [
            started(directory, *flags, f"--config.distributed.process_id={i}", **devices)
            for i in range(2)
        ]

    def ended(processes):
        told = [process.communicate(timeout=600)[0] for process in processes]
        assert [p.returncode for p in processes] == [0, 0], "".join(t[-1500:] for t in told)
        return told

    ended(both(whole))
    processes = both(parted)
    wait_for(3, parted, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    told = ended(processes)[0]
    assert "the same command goes on from there" in told
    assert 3 <= max(figures(parted)) < 12
    assert f"going on from step {max(figures(parted))}" in ended(both(parted))[0]
    assert figures(parted) == figures(whole)

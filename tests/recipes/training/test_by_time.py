"""Checkpoints by the clock: when they are due, and that a run resumes from them."""

import pathlib
import time

import pytest

from checkpoints_io import processes
from recipes import dpo
from recipes.training import by_time
from tests.conftest import few_pairs, stopped_after


@pytest.fixture
def clock(monkeypatch):
    """A list whose one number is the time, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_alarm_rings_until_a_checkpoint_is_written(clock):
    alarm = by_time.Alarm(2.0)
    assert not alarm.rings()
    clock[0] += 119
    assert not alarm.rings()
    clock[0] += 1
    assert alarm.rings()
    assert alarm.rings()
    alarm.restart()
    assert not alarm.rings()
    clock[0] += 120
    assert alarm.rings()


def test_without_minutes_it_never_rings(clock):
    alarm = by_time.Alarm(None)
    clock[0] += 1e9
    assert not alarm.rings()


def test_several_processes_hear_it_one_step_after_any_of_them_is_late(clock, monkeypatch):
    monkeypatch.setattr(by_time.jax, "process_count", lambda: 2)
    alarm = by_time.Alarm(2.0)
    assert not alarm.rings()
    clock[0] += 120
    assert not alarm.rings()  # what was asked a step ago says no
    assert alarm.rings()
    alarm.restart()
    assert not alarm.rings()  # nothing that was asked before the checkpoint counts


def test_any_process_may_say_it():
    assert bool(processes.any_says(True))
    assert not bool(processes.any_says(False))


@pytest.mark.full
def test_a_run_goes_on_from_a_checkpoint_that_only_the_clock_asked_for(
    tiny_config, tmp_path, capsys
):
    config = tiny_config
    config.train_data = few_pairs(tmp_path, 8)
    config.num_train_steps, config.steps_per_eval = 3, None
    config.steps_per_checkpoint, config.minutes_per_checkpoint = None, 1e-6
    with stopped_after(2):
        dpo.train(config)
    there = pathlib.Path(config.directory, "checkpoints").iterdir()
    assert "2" in {path.name for path in there}
    capsys.readouterr()
    dpo.train(config)
    assert "resuming from step 2" in capsys.readouterr().out

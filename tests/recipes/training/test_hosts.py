"""Runs of several processes: killed, hung, and gone on with by another number of them."""

import json
import pathlib
import shutil
import signal
import socket
import time

import pytest

from tests.conftest import devices
from tests.recipes.training.test_preemption import ended, figures, started, wait_for

SHORT = (
    "--config.per_device_parallelism=1", "--config.min_pack_fill=0.3", "--config.num_train_steps=8",
)  # fmt: skip


def together(directory: pathlib.Path, count: int, of_devices: int, *flags: str) -> list:
    """So many processes with so many devices each, over loopback; or one, by itself."""
    if count == 1:
        return [started(directory, *SHORT, *flags, **devices(of_devices))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [
        "--config.distributed.enabled", f"--config.distributed.coordinator_address={where}",
        f"--config.distributed.num_processes={count}", *SHORT, *flags,
    ]  # fmt: skip
    return [
        started(directory, *flags, f"--config.distributed.process_id={i}", **devices(of_devices))
        for i in range(count)
    ]


@pytest.mark.full
def test_a_hard_kill_loses_minutes(tmp_path):
    """Two processes whose clocks alone ask for checkpoints write them after the same steps."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = "--config.steps_per_checkpoint=None", "--config.minutes_per_checkpoint=0.01"
    ended(together(whole, 2, 2))
    processes = together(parted, 2, 2, *flags)
    wait_for(6, parted, processes[0])
    for process in processes:
        process.kill()
        process.communicate()
    assert max(figures(parted)) < 8  # there was something left to do
    told = ended(together(parted, 2, 2, *flags))[0]
    resumed = int(told.partition("resuming from step ")[2].split()[0])
    assert resumed > 0
    assert figures(parted) == figures(whole)


@pytest.mark.full
def test_another_number_of_hosts_goes_on_with_the_same_pairs(tmp_path):
    """2 hosts of 4 devices, then 1, then 3 of 2: `data=-1` follows what is there."""
    mesh = "--config.mesh.data=-1", "--config.mesh.fsdp=2", "--config.steps_per_checkpoint=2"
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    told = ended(together(whole, 2, 4, *mesh, "--config.keep_checkpoints=8"))[0]
    assert "data 4, fsdp 2" in told
    for step, count, of_devices, shown in ((2, 1, 4, "data 2"), (4, 3, 2, "data 3")):
        shutil.rmtree(moved, ignore_errors=True)
        shutil.copytree(whole if step == 2 else tmp_path / "from 2", moved)
        for later in range(step + 2, 10, 2):
            shutil.rmtree(moved / "checkpoints" / str(later))
        told = ended(together(moved, count, of_devices, *mesh, "--config.keep_checkpoints=8"))[0]
        assert f"resuming from step {step}" in told
        assert f"{shown}, fsdp 2" in told
        shutil.copytree(moved, tmp_path / f"from {step}")
        ours, theirs = figures(moved), figures(whole)
        apart = {at: abs(ours[at]["train/dpo_loss"] - theirs[at]["train/dpo_loss"]) for at in ours}
        print(json.dumps({"from": step, "hosts": count, "apart": apart}))
        assert ours.keys() == theirs.keys()
        for name in ("train/length_chosen", "train/length_rejected"):  # of the same pairs
            assert [r[name] for r in ours.values()] == [r[name] for r in theirs.values()]
        assert apart[step + 1] <= 1e-6


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_ends_the_other_within_the_bound(tmp_path, victim):
    """Before jax misses it (100 seconds); started again both give the same numbers."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    saves = "--config.steps_per_checkpoint=2"
    ended(together(whole, 2, 2, saves))
    processes = together(parted, 2, 2, saves, "--config.hang_minutes=1")
    wait_for(4, parted, processes[0])
    processes[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    told = processes[1 - victim].communicate(timeout=240)[0]
    print(f"process {victim} stood still: {time.monotonic() - stopped:.1f} s to the other's end")
    assert processes[1 - victim].returncode == 1, told[-3000:]
    assert "no progress for 1 minutes (--config.hang_minutes)" in told
    assert "recipes/training/loop.py" in told  # the stack of the thread that waited
    processes[victim].kill()
    processes[victim].communicate()
    assert "resuming from step" in ended(together(parted, 2, 2, saves))[0]
    assert figures(parted) == figures(whole)

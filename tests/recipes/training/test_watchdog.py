"""A run that hangs ends itself, and says where it hung."""

import os
import subprocess
import sys
import threading

import pytest

from checkpoints_io.errors import BadInput
from recipes.training import run_parts, watchdog
from tests.conftest import ROOT, given_by


def ended(program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


WAITING = """
import jax
from recipes.training import watchdog

with watchdog.over(0.02, lambda: False) as stop:
    assert not stop()
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 1, lambda x: x / 2, x))
    jax.block_until_ready(endless(0.5))
"""


def test_one_that_waits_for_the_devices_says_so_and_shows_every_thread():
    done = ended(WAITING)
    assert done.returncode == 1
    told, _, stacks = done.stderr.partition("\n")
    assert told.startswith("error: a step, an exchange between processes, a save or an export")
    assert "no progress for 0.02 minutes (--config.hang_minutes)" in told
    assert 'File "<string>", line ' in stacks
    assert "in watch" in stacks


LOCKED = """
import ctypes
from recipes.training import watchdog

watchdog.GRACE = 0.5
with watchdog.over(0.02, lambda: False) as stop:
    ctypes.PyDLL(None).sleep(60)  # which keeps the interpreter's lock
"""


def test_one_whose_threads_cannot_run_ends_too():
    done = ended(LOCKED)
    assert done.returncode == 1
    assert "Timeout (0:00:01.7" in done.stderr, done.stderr
    assert 'File "<string>", line 7 in <module>' in done.stderr


ALIVE = """
import time
from recipes.training import watchdog

with watchdog.over(0.01, lambda: False) as stop:
    for _ in range(20):
        time.sleep(0.1)
        assert not stop()
time.sleep(1)
print("alive")
"""


def test_one_that_moves_does_not_end_and_nothing_watches_behind_the_block():
    done = ended(ALIVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_without_minutes_nothing_watches():
    stop, before = (lambda: True), threading.active_count()
    with watchdog.over(None, stop) as watched:
        assert watched is stop
        assert threading.active_count() == before


SAVING = """
from recipes.training import watchdog

watchdog.check_save(59.9, 1.0)
watchdog.check_save(1e9, None)
watchdog.check_save(60.1, 1.0)
print("not reached")
"""


def test_a_save_that_hangs_in_the_background_ends_a_run_that_moves():
    done = ended(SAVING)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: a save hangs in the background: no progress for 1 ")
    assert "line 6 in <module>" in done.stderr


def test_a_cpu_is_refused_in_place_of_an_accelerator(tiny_config):
    tiny_config.require_accelerator = True
    with pytest.raises(BadInput, match="jax only finds CPUs here"):
        run_parts.computing(given_by(tiny_config))

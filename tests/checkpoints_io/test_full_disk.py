"""A disk that is full: a clear stop, nothing lost that was there, and on it goes with more room."""

import contextlib
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io import places
from checkpoints_io.run_state import Keep, RunStore
from recipes import dpo
from recipes.data import source_pairs
from recipes.data.ids.encode_rows import Source
from recipes.training import preemption
from tests.conftest import TINY
from tests.recipes.data.test_source_pairs import HOW
from tests.recipes.training.test_preemption import figures
import zoo

MiB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """Makes small disks: tmpfs, mounted where only a process of its own sees it."""
    mounts = []

    def make(size: int) -> pathlib.Path:
        script = f"mount -t tmpfs -o size={size} none {tmp_path} && echo mounted && exec sleep 600"
        mount = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        mounts.append(mount)
        if mount.stdout.readline() != "mounted\n":
            pytest.skip("no disk may be mounted here")
        return pathlib.Path(f"/proc/{mount.pid}/root{tmp_path}")

    yield make
    for mount in mounts:
        mount.kill()
        mount.wait()


@contextlib.contextmanager
def filled(disk: pathlib.Path, but: int = 0):
    """Within it the disk has `but` bytes left."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        left = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(left.f_bavail * left.f_bsize - but, 1))
    yield
    ballast.unlink()


def test_a_save_that_runs_out_of_disk_is_made_good(disk, monkeypatch):
    root = disk(8 * MiB)
    noise = lambda seed: {"w": jax.random.normal(jax.random.key(seed), (1 << 18,))}
    trees = {"policy": noise(0)}
    store = RunStore(places.Disk(root), keep=Keep(2), retries=1)
    store.save(1, trees, {})
    store.wait()
    # Orbax meets the full disk in the midst of its writing.
    monkeypatch.setattr("checkpoints_io.run_state._without_room", lambda *_: None)
    with filled(root, but=MiB // 2):
        store.save(2, {"policy": noise(2)}, {})
        store.wait()
        assert store.lost() and store.steps() == [1]
        assert not list(root.glob("*tmp*"))
        store.save(3, {"policy": noise(3)}, {})
        with pytest.raises(OSError, match=r"step 3 could not be written: the disk is full.*: 1"):
            store.wait()
    store.save(4, {"policy": noise(4)}, {})
    store.wait()
    assert not store.lost()
    store.close()
    again = RunStore(places.Disk(root), keep=Keep(2))
    assert again.steps() == [4, 1]
    found = again.newest(lambda _: None, trees)
    np.testing.assert_array_equal(found.trees["policy"]["w"], noise(4)["w"])


def test_an_export_that_does_not_fit_leaves_the_one_before(disk):
    root = disk(4 * MiB)
    model = zoo.load(TINY / "model")
    zoo.save(model, root / "export", dtype=jnp.bfloat16)
    before = {p.name: p.read_bytes() for p in (root / "export").iterdir()}
    with filled(root, but=MiB), pytest.raises(OSError, match="No space left"):
        zoo.save(model, root / "export", dtype=jnp.bfloat16)
    assert {p.name: p.read_bytes() for p in (root / "export").iterdir()} == before
    assert [p.name for p in root.iterdir()] == ["export"]
    zoo.save(model, root / "export", dtype=jnp.bfloat16)


def test_tokens_that_cannot_be_kept_stop_with_a_sentence(disk):
    root = disk(MiB)
    source = Source(str(TINY / "train.jsonl"), "preference_chat")
    with filled(root, but=20_000), pytest.raises(OSError):
        source_pairs.read(source, HOW, places.Disk(root))
    found = source_pairs.read(source, HOW, places.Disk(root))
    again = source_pairs.read(source, HOW, places.Disk(root))
    assert len(found.ids) == len(again.ids) > 0
    np.testing.assert_array_equal(found.ids[-1].chosen, again.ids[-1].chosen)


@pytest.mark.full
def test_a_run_whose_disk_fills_stops_and_goes_on_with_more_room(disk, tiny_config, monkeypatch):
    config = tiny_config
    config.num_train_steps, config.steps_per_checkpoint, config.save_retries = 6, 2, 1
    whole = config.copy_and_resolve_references()
    whole.directory = f"{config.directory}-whole"
    dpo.train(whole)
    root = disk(60 * MiB)
    config.directory = str(root / "run")
    with contextlib.ExitStack() as stack:

        def full_from_step_3():
            if 3 in figures(root / "run") and not (root / "ballast").exists():
                stack.enter_context(filled(root, but=MiB))
            return False

        with monkeypatch.context() as patched:
            asked = lambda: contextlib.nullcontext(full_from_step_3)
            patched.setattr(preemption, "stop_on_signals", asked)
            # The save of step 4 fails, the next is tried behind step 5, and then it stops.
            with pytest.raises(OSError, match="of step 5 could not be written: it takes"):
                dpo.train(config)
    dpo.train(config)
    assert figures(pathlib.Path(config.directory)) == figures(pathlib.Path(whole.directory))

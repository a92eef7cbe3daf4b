"""A checkpoint comes back as it was, and a torn one is passed over by name."""

import contextlib
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoints_io import places
from checkpoints_io.run_state import Keep, RunStore


@pytest.fixture
def trees():
    policy = {"a": jnp.arange(12.0).reshape(3, 4), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    return {"policy": policy, "optimizer": optax.adamw(1e-3).init(policy)}


def times(trees, factor):
    return jax.tree.map(lambda x: x * factor, trees)


def test_what_is_saved_comes_back(tmp_path, trees):
    store = RunStore(places.Disk(tmp_path), keep=Keep(2))
    assert store.newest(lambda _: None, trees) is None
    for step in (1, 2, 3):
        store.save(step, times(trees, step), {"position": step * 8})
    store.close()
    store = RunStore(places.Disk(tmp_path), keep=Keep(2))
    assert store.steps() == [3, 2]
    seen = []
    restored = store.newest(seen.append, trees)
    assert restored.step == 3
    assert restored.facts["position"] == seen[0]["position"] == 24
    np.testing.assert_array_equal(restored.trees["policy"]["a"], 3 * trees["policy"]["a"])
    assert type(restored.trees["optimizer"]) is type(trees["optimizer"])
    only = store.newest(lambda _: None, {"policy": trees["policy"]})
    assert only.trees.keys() == {"policy"}
    store.close()


def test_one_step_of_several(tmp_path, trees):
    with RunStore(places.Disk(tmp_path), keep=Keep(3)) as store:
        for step in (1, 2, 3):
            store.save(step, times(trees, step), {"position": step * 8})
    like = {"policy": trees["policy"]}
    harmed = tmp_path / "1" / "policy"
    shutil.rmtree(harmed)
    with RunStore(places.Disk(tmp_path), keep=None) as store:
        seen = []
        found = store.at(2, seen.append, like)
        assert (found.step, found.facts["position"], seen[0]["position"]) == (2, 16, 16)
        np.testing.assert_array_equal(found.trees["policy"]["a"], 2 * trees["policy"]["a"])
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4: there are 1, 2, 3$"):
            store.at(4, seen.append, like)
        with pytest.raises(OSError, match=r"checkpoint 1 in .* cannot be read: use another"):
            store.at(1, seen.append, like)


def test_a_refusal_is_not_passed_over(tmp_path, trees):
    store = RunStore(places.Disk(tmp_path), keep=Keep(2))
    store.save(1, trees, {})
    store.wait()

    def refuse(_):
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        store.newest(refuse, trees)


def files_of(trees, root):
    store = RunStore(places.Disk(root), keep=Keep(3))
    for step in (1, 2):
        store.save(step, times(trees, step), {"position": step})
    store.close()
    return sorted(str(path.relative_to(root)) for path in (root / "2").rglob("*") if path.is_file())


def flipped(at):
    def flip(content):
        place = int(at * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]

    return flip


HARMS = {
    "deleted": None,
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
} | {f"flipped at {at}": flipped(at) for at in (0, 0.25, 0.5, 0.75, 1)}


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_harmed_file_never_comes_back_as_other_weights(tmp_path, trees, all_of_them):
    """Every file of the newest checkpoint: it is read as it was, or passed over with a sentence."""
    trees["policy"]["a"] = jnp.arange(12000.0).reshape(3, 4000)
    files = files_of(trees, tmp_path / "sound")
    assert len(files) > 20
    fell_back = 0
    for i, name in enumerate(files):
        chosen = HARMS if all_of_them else [list(HARMS)[i % len(HARMS)]]
        for harm in chosen:
            root = tmp_path / "harmed"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(tmp_path / "sound", root)
            if HARMS[harm] is None:
                (root / name).unlink()
            else:
                (root / name).write_bytes(HARMS[harm]((root / name).read_bytes()))
            store = RunStore(places.Disk(root), keep=Keep(3))
            found = store.newest(lambda _: None, trees)
            assert found.facts["position"] == found.step
            expected = jax.tree.leaves(times(trees, found.step))
            for here, there in zip(jax.tree.leaves(found.trees), expected, strict=True):
                np.testing.assert_array_equal(here, there, err_msg=f"{name} {harm}")
            assert (root / "unreadable-2").is_dir() == (found.step == 1), (name, harm)
            store.save(3, trees, {})  # and saving goes on
            store.close()
            assert RunStore(places.Disk(root), keep=None).steps()[0] == 3
            fell_back += found.step == 1
    assert fell_back > len(files) / 4


def test_weights_that_are_not_those_of_the_facts_are_seen(tmp_path, trees, caplog):
    """Files that are sound, of another checkpoint: only the fingerprint tells."""
    files_of(trees, tmp_path)
    shutil.rmtree(tmp_path / "2" / "policy")
    shutil.copytree(tmp_path / "1" / "policy", tmp_path / "2" / "policy")
    store = RunStore(places.Disk(tmp_path), keep=Keep(3))
    assert store.newest(lambda _: None, trees).step == 1
    assert "the bits of its policy are not those that were written" in caplog.text


def test_what_is_kept(tmp_path, trees):
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.9, 5: None, 6: 0.3, 7: 0.8}
    keep = Keep(1, every=3, highest=lambda facts: facts.get("score"))
    store = RunStore(places.Disk(tmp_path), keep=keep)
    for step, score in scores.items():
        if step == 5:  # scores are known behind a restart too
            store.close()
            store = RunStore(places.Disk(tmp_path), keep=keep)
        store.save(step, trees, {"score": score})
    store.close()
    assert RunStore(places.Disk(tmp_path), keep=None).steps() == [7, 6, 3, 2]  # of equals the first


def test_what_a_killed_save_did_not_remove_goes_with_the_next_start(tmp_path, trees):
    """But not what stands behind one that cannot be read."""
    with RunStore(places.Disk(tmp_path), keep=Keep(4, every=3)) as store:
        for step in range(1, 7):
            store.save(step, trees, {})
    with RunStore(places.Disk(tmp_path), keep=Keep(2, every=3)) as store:
        assert store.steps() == [6, 5, 4, 3]
        assert store.newest(lambda _: None).step == 6  # looking alone removes nothing
        assert store.steps() == [6, 5, 4, 3]
        assert store.newest(lambda _: None, trees).step == 6
        assert store.steps() == [6, 5, 3]
    assert {path.name for path in tmp_path.iterdir() if path.name.isdecimal()} == {"3", "5", "6"}
    for torn in ("6", "5"):
        next((tmp_path / torn).rglob("manifest.ocdbt")).unlink()
    with RunStore(places.Disk(tmp_path), keep=Keep(1)) as store:
        assert store.newest(lambda _: None, trees).step == 3


def test_one_that_only_looks_changes_nothing(tmp_path, trees):
    files_of(trees, tmp_path)
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # another process is writing it
    for path in (tmp_path / "2" / "policy").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with contextlib.closing(RunStore(places.Disk(tmp_path), keep=None)) as store:
        assert store.newest(lambda _: None, trees).step == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_torn_checkpoint_is_passed_over_and_replaced(tmp_path, trees):
    store = RunStore(places.Disk(tmp_path), keep=Keep(3))
    for step in (1, 2):
        store.save(step, times(trees, step), {})
    store.close()
    for path in (tmp_path / "2" / "policy").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    store = RunStore(places.Disk(tmp_path), keep=Keep(3))
    restored = store.newest(lambda _: None, trees)
    assert restored.step == 1
    assert (tmp_path / "unreadable-2").is_dir()  # set aside, not deleted
    store.save(2, times(trees, 2), {})
    store.close()
    store = RunStore(places.Disk(tmp_path), keep=Keep(3))
    assert store.newest(lambda _: None, trees).step == 2
    shutil.rmtree(tmp_path / "2" / "policy")
    assert store.newest(lambda _: None, trees).step == 1
    assert {p.name for p in tmp_path.glob("unread*")} == {"unreadable-2", "unreadable-2.1"}


def test_a_store_that_an_error_leaves_asks_nobody(tmp_path, trees, monkeypatch):
    """The other processes may be at something else; the save under way is finished all the same."""
    with (
        pytest.raises(RuntimeError, match="mine"),
        RunStore(places.Disk(tmp_path), keep=Keep(2)) as store,
    ):
        store.save(1, trees, {})
        monkeypatch.setattr("checkpoints_io.run_state.all_agree", mock.Mock(side_effect=ValueError))
        raise RuntimeError("mine")
    assert (tmp_path / "1").is_dir()


def test_what_says_nothing_of_the_checkpoint_is_passed_on(tmp_path, trees, monkeypatch):
    store = RunStore(places.Disk(tmp_path), keep=Keep(3))
    for step in (1, 2):
        store.save(step, trees, {})
    store.wait()

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="RESOURCE"):
        patched.setattr(store, "_read", full)
        store.newest(lambda _: None, trees)
    assert store.steps() == [2, 1]
    monkeypatch.setattr("checkpoints_io.sealed.FORMAT", 3)
    with pytest.raises(ValueError, match="has format 2, but this program reads 3"):
        store.newest(lambda _: None, trees)
    assert store.steps() == [2, 1]


def test_facts_alone(tmp_path, trees):
    store = RunStore(places.Disk(tmp_path), keep=Keep(3))
    assert store.newest(lambda _: None) is None
    store.save(4, trees, {"a": 1})
    store.wait()
    facts = store.newest(lambda _: None).facts
    assert (facts["a"], facts["step"], facts["format"]) == (1, 4, 2)


def test_nothing_left_to_read_is_an_error(tmp_path, trees):
    store = RunStore(places.Disk(tmp_path), keep=Keep(1))
    store.save(1, trees, {})
    store.close()
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(b"")
    with pytest.raises(OSError, match="none of the checkpoints"):
        RunStore(places.Disk(tmp_path), keep=Keep(1)).newest(lambda _: None, trees)


def test_a_disk_without_room_is_a_sentence_and_harms_nothing(tmp_path, trees, monkeypatch):
    store = RunStore(places.Disk(tmp_path), keep=Keep(2))
    store.save(1, trees, {})
    store.wait()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: mock.Mock(free=100))
        with pytest.raises(
            OSError, match=r"has 0 MiB free. Once that is fixed, .* existing checkpoint: 1"
        ):
            store.save(2, trees, {})
    assert store.steps() == [1]
    store.save(2, trees, {})
    store.close()
    assert RunStore(places.Disk(tmp_path), keep=Keep(2)).steps() == [2, 1]

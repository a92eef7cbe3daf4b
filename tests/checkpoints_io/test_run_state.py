"""A checkpoint comes back as it was, and a torn one is passed over by name."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoints_io.run_state import RunStore


@pytest.fixture
def trees():
    policy = {"a": jnp.arange(12.0).reshape(3, 4), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    return {"policy": policy, "optimizer": optax.adamw(1e-3).init(policy)}


def times(trees, factor):
    import jax

    return jax.tree.map(lambda x: x * factor, trees)


def test_what_is_saved_comes_back(tmp_path, trees):
    store = RunStore(tmp_path, keep=2)
    assert store.newest(lambda _: None, trees) is None
    for step in (1, 2, 3):
        store.save(step, times(trees, step), {"position": step * 8})
    store.close()
    store = RunStore(tmp_path, keep=2)
    assert store.steps() == [3, 2]
    seen = []
    restored = store.newest(seen.append, trees)
    assert restored.step == 3
    assert restored.facts["position"] == seen[0]["position"] == 24
    np.testing.assert_array_equal(restored.trees["policy"]["a"], 3 * trees["policy"]["a"])
    assert type(restored.trees["optimizer"]) is type(trees["optimizer"])
    only = store.restore(2, {"policy": trees["policy"]})
    assert only.trees.keys() == {"policy"}
    store.close()


def test_a_refusal_is_not_passed_over(tmp_path, trees):
    store = RunStore(tmp_path, keep=2)
    store.save(1, trees, {})
    store.wait()

    def refuse(_):
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        store.newest(refuse, trees)


def test_a_torn_checkpoint_is_passed_over_and_replaced(tmp_path, trees):
    store = RunStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, times(trees, step), {})
    store.close()
    for path in (tmp_path / "2" / "policy").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    store = RunStore(tmp_path, keep=3)
    restored = store.newest(lambda _: None, trees)
    assert restored.step == 1
    assert (tmp_path / "unreadable-2").is_dir()  # set aside, not deleted
    store.save(2, times(trees, 2), {})
    store.close()
    assert RunStore(tmp_path, keep=3).newest(lambda _: None, trees).step == 2


def test_what_says_nothing_of_the_checkpoint_is_passed_on(tmp_path, trees, monkeypatch):
    store = RunStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, trees, {})
    store.wait()

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="RESOURCE"):
        patched.setattr(store, "restore", full)
        store.newest(lambda _: None, trees)
    assert store.steps() == [2, 1]
    monkeypatch.setattr("checkpoints_io.run_state.FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1, and this program reads 2"):
        store.newest(lambda _: None, trees)
    assert store.steps() == [2, 1]


def test_facts_alone(tmp_path, trees):
    store = RunStore(tmp_path, keep=3)
    assert store.newest(lambda _: None) is None
    store.save(4, trees, {"a": 1})
    store.wait()
    assert store.newest(lambda _: None).facts == {"a": 1, "step": 4, "format": 1}


def test_nothing_left_to_read_is_an_error(tmp_path, trees):
    store = RunStore(tmp_path, keep=1)
    store.save(1, trees, {})
    store.close()
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(b"")
    with pytest.raises(OSError, match="none of the checkpoints"):
        RunStore(tmp_path, keep=1).newest(lambda _: None, trees)


def test_a_disk_without_room_is_a_sentence_and_harms_nothing(tmp_path, trees, monkeypatch):
    store = RunStore(tmp_path, keep=2)
    store.save(1, trees, {})
    store.wait()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: mock.Mock(free=100))
        with pytest.raises(OSError, match=r"has 0 MiB free: make room, .* that is there, 1"):
            store.save(2, trees, {})
    assert store.steps() == [1]
    store.save(2, trees, {})
    store.close()
    assert RunStore(tmp_path, keep=2).steps() == [2, 1]

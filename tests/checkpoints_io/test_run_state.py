"""A checkpoint comes back as it was, and a torn one is passed over by name."""

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
    assert store.restore_newest(trees, lambda _: None) is None
    for step in (1, 2, 3):
        store.save(step, times(trees, step), {"position": step * 8})
    store.close()
    store = RunStore(tmp_path, keep=2)
    assert store.steps() == [3, 2]
    seen = []
    restored = store.restore_newest(trees, seen.append)
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
        store.restore_newest(trees, refuse)


def test_a_torn_checkpoint_is_passed_over_and_replaced(tmp_path, trees):
    store = RunStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, times(trees, step), {})
    store.close()
    for path in (tmp_path / "2" / "policy").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    store = RunStore(tmp_path, keep=3)
    restored = store.restore_newest(trees, lambda _: None)
    assert restored.step == 1
    store.save(2, times(trees, 2), {})
    store.close()
    assert RunStore(tmp_path, keep=3).restore_newest(trees, lambda _: None).step == 2


def test_nothing_left_to_read_is_an_error(tmp_path, trees):
    store = RunStore(tmp_path, keep=1)
    store.save(1, trees, {})
    store.close()
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(b"")
    with pytest.raises(OSError, match="none of the checkpoints"):
        RunStore(tmp_path, keep=1).restore_newest(trees, lambda _: None)

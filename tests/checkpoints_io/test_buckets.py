"""Checkpoints in a bucket: whole, and torn. `-m full` has servers that speak gs and s3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io import here, places
from checkpoints_io.run_state import Keep, RunStore

TREES = {"policy": {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}}


def times(factor):
    return jax.tree.map(lambda x: x * factor, TREES)


def on_another_machine():
    """Nothing of a bucket is here yet."""
    for held in (here._copies, here._folders):
        for folder in held.values():
            folder.cleanup()
        held.clear()


def there(place):
    """What has something in it: a bucket in memory lists empty folders too."""
    return [name for name in place.names() if place._below(name)]


def opened(place):
    on_another_machine()
    return RunStore(place, keep=Keep(2, every=3), retries=1)


def newest(store):
    found = store.newest(lambda _: None, TREES)
    if found is not None:
        np.testing.assert_array_equal(found.trees["policy"]["a"], found.step * TREES["policy"]["a"])
        assert found.facts["position"] == found.step
    return found and found.step


def test_what_is_saved_in_a_bucket_comes_back(bucket):
    checkpoints_come_back(places.at("memory://runs/x/checkpoints"))


def checkpoints_come_back(place):
    with opened(place) as store:
        assert newest(store) is None
        for step in (1, 2, 3, 4, 5):
            store.save(step, times(step), {"position": step})
    assert there(place) == ["3", "4", "5"]
    with opened(place) as store:
        assert store.steps() == [5, 4, 3]
        assert newest(store) == 5
        store.save(6, times(6), {"position": 6})
    assert there(place) == ["3", "5", "6"]
    place.remove("6/commit_success.txt")  # killed while it was written
    with RunStore(place, keep=None) as store:  # who only reads leaves it
        assert store.facts(5)["position"] == 5
    assert place.exists("6")
    with opened(place) as store:
        assert newest(store) == 5
        assert there(place) == ["3", "5"]
        store.save(6, times(6), {"position": 6})
    with opened(place) as store:
        assert newest(store) == 6


@pytest.mark.parametrize("part", ["facts", "policy"])
def test_a_torn_checkpoint_in_a_bucket_is_passed_over(bucket, part, caplog):
    place = places.at("memory://runs/x/checkpoints")
    with opened(place) as store:
        for step in (1, 2):
            store.save(step, times(step), {"position": step})
    harmed = [name for name in bucket if f"/2/{part}/" in name and "/d/" in name]
    for name in harmed:
        place.write_whole(name.partition("/checkpoints/")[2], b"torn")
    with opened(place) as store:
        assert newest(store) == 1
        assert "checkpoint 2 cannot be read and is passed over" in caplog.text
        assert there(place) == ["1", "2", "unreadable-2"]
        assert all(name in bucket for name in harmed)  # nothing of it is lost
        store.save(2, times(2), {"position": 2})
    with opened(place) as store:
        assert newest(store) == 2


def test_a_save_that_does_not_go_up_is_tried_again(bucket, monkeypatch, caplog):
    place = places.at("memory://runs/x/checkpoints")
    with opened(place) as store:
        store.save(1, times(1), {"position": 1})
        store.wait()
        with monkeypatch.context() as patched:
            refused = lambda *_: (_ for _ in ()).throw(OSError("503 Service Unavailable"))
            patched.setattr(type(place), "_put", refused)
            store.save(2, times(2), {"position": 2})
            store.wait()
        assert store.lost()
        assert "step 2 could not be written: 503 Service Unavailable" in caplog.text
        store.save(3, times(3), {"position": 3})
        store.wait()
        assert not store.lost()
    with opened(place) as store:
        assert newest(store) == 3


def test_several_processes_are_told_where_they_can_write(bucket, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="x/checkpoints: several processes write a checkpoint tog"):
        places.at("memory://runs/x/checkpoints").for_orbax()

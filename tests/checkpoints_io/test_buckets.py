"""Checkpoints in a bucket: whole, and torn. `-m full` has servers that speak gs and s3."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_io import here, lease, places
from checkpoints_io.run_state import Keep, RunStore
from tests.checkpoints_io import buckets, test_bucket_models, test_places

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


def test_any_step_in_a_bucket_comes_back(bucket):
    """The best one, and one by its number, on a machine that has none of them yet."""
    place = places.at("memory://runs/x/checkpoints")
    keep = Keep(3, highest=lambda facts: facts.get("score"))
    on_another_machine()
    with RunStore(place, keep=keep) as store:
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.7)):
            store.save(step, times(step), {"score": score})
    for ask in (lambda store: store.best(TREES), lambda store: store.at(2, lambda _: None, TREES)):
        on_another_machine()
        with RunStore(place, keep=keep) as store:
            found = ask(store)
        np.testing.assert_array_equal(found.trees["policy"]["a"], 2 * TREES["policy"]["a"])


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


# On servers.

VERBS = [
    test_places.test_files, test_places.test_what_is_added_is_there_at_once,
    test_places.test_a_folder_is_there_when_it_is_whole,
    test_places.test_no_folder_takes_the_place_of_something_else,
    test_places.test_what_cannot_be_read_is_set_aside, test_places.test_one_at_a_time,
    test_places.test_what_knows_this_machine_only_writes_here,
    test_places.test_records_and_settings, test_places.test_the_id_of_a_run_stays,
    test_places.test_answers_of_a_reference_are_kept, test_places.test_an_export,
]  # fmt: skip


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request):
    """The kind of a bucket on a server that this process uses."""
    with buckets.served(request.param) as environment, pytest.MonkeyPatch.context() as patched:
        buckets.configured(environment, patched)
        fsspec.get_filesystem_class(request.param).clear_instance_cache()
        yield request.param


@pytest.mark.full
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_the_verbs_on_a_server(server, verb, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED", 1.0)
    monkeypatch.setattr(lease, "RUNS_OUT", 5.0)  # s3 tells times in seconds
    verb(places.at(f"{server}://runs/{verb.__name__}"))


@pytest.mark.full
def test_tokens_are_kept_on_a_server(server, monkeypatch):
    test_places.test_tokens_are_kept(places.at(f"{server}://runs/tokens"), monkeypatch)


@pytest.mark.full
def test_checkpoints_come_back_from_a_server(server):
    checkpoints_come_back(places.at(f"{server}://runs/whole/checkpoints"))


@pytest.mark.full
def test_a_model_comes_from_a_server(server, tmp_path, monkeypatch):
    test_bucket_models.a_model_comes_from(f"{server}://runs/model", tmp_path, monkeypatch)


@pytest.mark.full
def test_a_bucket_that_is_not_there_is_named(server):
    place = places.at(f"{server}://nowhere/x")
    with pytest.raises(OSError, match=f"{server}://nowhere/x cannot be used: "):
        place.write_whole("a", b"")
    with pytest.raises(OSError, match=f"{server}://nowhere/x cannot be used: "), \
            place.alone(otherwise=lambda: None):  # fmt: skip
        pass


@pytest.mark.full
def test_every_object_of_the_newest_checkpoint_deleted_or_cut(server, capsys):
    """It falls back with a sentence, or the object's content stands elsewhere too."""
    place = places.at(f"{server}://runs/harmed/checkpoints")
    with RunStore(place, keep=Keep(3)) as store:
        for step in (1, 2):
            store.save(step, times(step), {"position": step})
    whole = {name: place._fs.cat_file(name) for name in place._below()}
    passed = 0
    harmed = [name for name in whole if f"{place._path()}/2/" in name]
    for name in harmed:
        for harm in (None, whole[name][: len(whole[name]) // 2]):
            if harm is None:
                place._fs.rm_file(name)
            else:
                place._fs.pipe_file(name, harm)
            with opened(place) as store:
                passed += newest(store) == 1  # which compares every bit
            place.remove("")
            for one, content in whole.items():
                place._fs.pipe_file(one, content)
    with capsys.disabled():
        print(f"\n{server}: {2 * len(harmed)} harms of {len(harmed)} objects, {passed} fell back")
    assert passed >= len(harmed) // 2

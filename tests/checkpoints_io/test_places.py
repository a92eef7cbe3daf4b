"""The verbs of a place: of a folder on a disk, and of a bucket, which is one in memory here.

What uses verbs alone does the same on both: records, settings, caches, exports, a run's beginning.
"""

import contextlib
import inspect
import json
import math
import pathlib
import pickle
import threading
import time

import fsspec
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from checkpoints_io import lease, places
from checkpoints_io.bucket import Bucket
from checkpoints_io.errors import BadInput
from recipes.data import source_pairs
from recipes.data.ids import counts, parallel, shards, token_cache
from recipes.data.ids.encode_rows import Source
from recipes.data.ids.shards import Shard
from recipes.preference import reference_cache
from recipes.training import checks, policy, prepare, records, settings
from recipes.training.run import Records
from tests.conftest import TINY
from tests.recipes.data.test_source_pairs import HOW
import zoo


@pytest.fixture(params=["disk", "bucket"])
def room(request, bucket, tmp_path):
    """A place that may have neighbours."""
    address = tmp_path / "room" if request.param == "disk" else "memory://runs/room"
    place = places.at(str(address))
    place.make()
    return place


def refuse():
    raise OSError("somebody is there")


def test_both_kinds_have_all_verbs(room):
    assert isinstance(room, places.Place)
    assert str(room) == room.address == places.at(room.address).address
    assert pickle.loads(pickle.dumps(places.Disk(pathlib.Path("/a")))).address == "/a"


@pytest.mark.parametrize("kind", [places.Disk, Bucket])
def test_a_verb_is_called_alike(kind):
    verbs = [name for name in vars(places.Place) if not name.startswith("_") and name != "address"]
    assert len(verbs) == 20
    for name in verbs:
        wanted, own = (inspect.signature(getattr(one, name)) for one in (places.Place, kind))
        assert [*wanted.parameters] == [*own.parameters], name


def test_files(room):
    assert room.names() == []
    assert room.read("a") is None and room.mapped("a") is None
    room.write_whole("a", b"one")
    room.write_whole("a", memoryview(b"two"))
    inner = room.within("rooms/inner")
    assert inner.names() == [] and not room.exists("rooms")
    inner.make()
    inner.write_whole("b", b"three")
    assert room.names() == ["a", "rooms"]
    assert room.within("rooms").names() == ["inner"]
    assert room.read("a") == b"two"
    assert bytes(room.mapped("a")) == b"two"
    assert room.read("rooms") is None and room.mapped("rooms") is None
    assert room.exists("a") and room.exists("rooms") and room.exists("rooms/inner/b")
    assert not room.exists("b")
    assert room.taken() == 8
    assert inner.taken() == 5
    assert 8 < room.room() <= math.inf
    for name in ("a", "rooms", "none"):
        room.remove(name)
    assert room.names() == [] and room.taken() == 0


def test_what_is_added_is_there_at_once(room):
    room.write_whole("records", b"of before\n")
    with room.appending("records", b"0\n") as add:
        assert room.read("records") == b"0\n"
        add(b"1\n")
        assert room.read("records") == b"0\n1\n"
        add(b"2\n")
        assert room.read("records") == b"0\n1\n2\n"
    assert room.read("records") == b"0\n1\n2\n"


def test_a_folder_is_there_when_it_is_whole(room):
    model = room.within("hf/step-2")
    for content in ("first", "second"):
        with model.whole_folder() as fresh:
            (fresh / "config.json").write_text(content)
            (fresh / f"{content}.bin").write_text("")
            before = model.names()
        assert before == ([] if content == "first" else ["config.json", "first.bin"])
        assert model.names() == ["config.json", f"{content}.bin"]
    with pytest.raises(RuntimeError, match="mine"), model.whole_folder() as fresh:
        (fresh / "config.json").write_text("third")
        raise RuntimeError("mine")
    assert model.read("config.json") == b"second"
    assert room.names() == ["hf"]


def test_no_folder_takes_the_place_of_something_else(room):
    room.within("theirs").make()
    room.within("theirs").write_whole("thesis", b"")
    with pytest.raises(FileExistsError, match="theirs holds something other than a model"):
        room.refuse_odd(models=["none", "theirs"])
    with pytest.raises(FileExistsError, match="theirs holds"), room.within("theirs").whole_folder():
        pass
    room.refuse_odd(files=["none"], folders=["theirs"], models=["none"], trees=["theirs", ""])


def test_what_cannot_be_read_is_set_aside(room):
    for aside in ("unreadable-2", "unreadable-2.1", "unreadable-2.2"):
        room.within("2/policy").make()
        room.write_whole("2/policy/weights", aside.encode())
        room.write_whole("2/commit_success.txt", b"")
        assert aside not in room.names()
        room.set_aside("2")
        assert not room.exists("2/commit_success.txt")
        where = aside if isinstance(room, places.Disk) else "2"  # a bucket moves nothing
        assert room.read(f"{where}/policy/weights") == aside.encode()


def test_one_at_a_time(room):
    with room.alone(otherwise=refuse):
        with pytest.raises(OSError, match="somebody is there"), room.alone(otherwise=refuse):
            pass
        room.within("other").make()
        with room.within("other").alone(otherwise=refuse):
            pass
    with room.alone(otherwise=refuse):
        pass


def test_the_lease_of_a_process_that_died_runs_out(bucket, caplog):
    place = places.at("memory://runs/room")
    place.write_whole("lock/0123", b"a machine that is gone")
    with place.alone(otherwise=refuse):  # it renews nothing
        (own,) = place.within("lock").names()
        assert own != "0123"
        time.sleep(0.7)  # this one does
        with pytest.raises(OSError, match="somebody is there"), place.alone(otherwise=refuse):
            pass
        assert place.within("lock").names() == [own]
    assert place.within("lock").names() == []
    assert "another process may be there" in caplog.text


def test_who_has_lost_its_lease_ends(bucket, monkeypatch):
    """It was paused for so long that another one took its place."""
    ended = threading.Event()
    monkeypatch.setattr(lease, "_end", lambda _: (ended.set(), 1 / 0))
    place = places.at("memory://runs/room")
    with place.alone(otherwise=refuse):
        (own,) = place.within("lock").names()
        assert not ended.wait(0.3)
        place.remove(f"lock/{own}")
        assert ended.wait(10)
        assert place.within("lock").names() == []


def test_who_renews_its_lease_too_late_ends(bucket, monkeypatch):
    """Its write hung for longer than a lease lasts, and made its object again beside another's."""
    ended, write = threading.Event(), lease._write
    monkeypatch.setattr(lease, "_end", lambda _: (ended.set(), 1 / 0))
    place, other = places.at("memory://runs/room"), "/runs/room/lock/other"
    with place.alone(otherwise=refuse):
        (own,) = place.within("lock").names()

        def hanging(fs, name):
            monkeypatch.setattr(lease, "_write", write)
            time.sleep(0.7)
            write(fs, other)
            write(fs, name)

        monkeypatch.setattr(lease, "_write", hanging)
        assert ended.wait(10)
        assert place.within("lock").names() == ["other"] and own != "other"
        place.remove("lock/other")


def test_what_takes_longer_than_a_lease_does_not_lose_it(bucket):
    """A large trace that goes up."""
    fs, begun = fsspec.filesystem("memory"), threading.Event()

    def slow():
        begun.set()
        time.sleep(1.2)

    how = dict(otherwise=refuse, meanwhile=slow)
    with lease.held(fs, "/runs/room/lock", **how):
        assert begun.wait(10)
        time.sleep(0.7)
        alone = lease.held(fs, "/runs/room/lock", **how)
        with pytest.raises(OSError, match="somebody is there"), alone:
            pass


def test_of_two_that_come_at_once_one_or_none_is_alone(bucket):
    place, inside, most = places.at("memory://runs/room"), [], []

    def come():
        with contextlib.suppress(OSError), place.alone(otherwise=refuse):
            inside.append(0)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


def test_an_export_whose_last_object_is_missing_is_written_again(bucket, monkeypatch):
    exports = places.at("memory://runs/room/hf")
    model, mine = exports.within("step-2"), "config.json"

    def export():
        with model.whole_folder() as fresh:
            (fresh / mine).write_text("")
            (fresh / "model.safetensors").write_text("weights")

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_put", lambda *_: model.write_whole("a.safetensors", b"") or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export()
    assert exports.names() == [".step-2.part", "step-2"]
    exports.refuse_odd(models=["step-2"])  # not somebody's work
    export()
    assert exports.names() == ["step-2"]
    assert model.names() == [mine, "model.safetensors"]
    assert [*bucket][-1].endswith(mine)  # readers look for it first
    below, looked = Bucket._below, []

    def cleared(self, name=""):  # a start of the run takes it for a killed process's
        looked.append(name)
        if looked.count("") == 1:
            fsspec.filesystem("memory").rm_file(model._path("model.safetensors"))
        return below(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_below", cleared)
        export()
    assert looked.count("") == 2 and model.names() == [mine, "model.safetensors"]
    model.remove(mine)
    exports.write_whole(".step-2.part", b"")
    exports.clear()
    assert not bucket


def test_a_bucket_keeps_what_is_set_aside_and_no_other_torn_checkpoint(bucket):
    room = places.at("memory://runs/room/checkpoints")
    for step in ("2", "3", "4"):
        room.write_whole(f"{step}/policy/weights", b"")
    for step in ("2", "3"):
        room.write_whole(f"{step}/commit_success.txt", b"")
    room.set_aside("3")
    room.clear()  # not a place of checkpoints, but perhaps of runs: 4 is somebody's
    assert room.names() == ["2", "3", "4", "unreadable-3"]
    room.clear(checkpoints=True)
    assert room.names() == ["2", "3", "unreadable-3"]
    assert room.exists("3/policy/weights")


def test_what_a_library_says_of_a_bucket_is_a_sentence(bucket, monkeypatch):
    place = places.at("memory://runs/room")

    def refused(*_, **__):
        raise RuntimeError("Anonymous caller does not have storage.objects.list access\nand more")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", refused)
    with pytest.raises(OSError, match=r"^memory://runs/room cannot be used: Anonymous .* access$"):
        place.names()


def test_what_knows_this_machine_only_writes_here(room):
    profile = room.within("profile")
    with room.alone(otherwise=refuse):
        folder = pathlib.Path(profile.local())
        folder.mkdir(exist_ok=True)
        (folder / "trace").write_text("slow")
    assert profile.read("trace") == b"slow"


def test_what_killed_writers_left_goes(tmp_path):
    (tmp_path / ".done.json.0123abcd.part").write_text("half")
    places.Disk(tmp_path).clear()
    assert places.Disk(tmp_path).names() == []


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert places.at("runs/x").address == f"{tmp_path}/runs/x"
    assert places.at("~/runs").address == "/home/me/runs"
    assert places.at("/a/b").within("c/d").address == "/a/b/c/d"
    assert places.beside(places.at("/a/b"), "c").address == "/a/c"
    assert places.at("memory://b/x/").address == "memory://b/x"
    assert places.at("memory://b/x").within("c/d").address == "memory://b/x/c/d"
    assert places.beside(places.at("memory://b/x"), "c").address == "memory://b/c"
    with pytest.raises(ValueError, match=r"^--config.token_cache=file:///b/x must be a path on"):
        places.at("file:///b/x", "--config.token_cache")
    with pytest.raises(
        ValueError, match=r"^memory://b/ must name a folder in a bucket: memory://B"
    ):
        places.at("memory://b/")
    with pytest.raises(ValueError, match=r"^g3://b/x: g3:// is not a known kind of bucket"):
        places.at("g3://b/x")


def test_a_bucket_whose_library_is_not_there_says_what_to_install(monkeypatch):
    def missing(_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"^--f=gs://b/x: pip install 'nnx-zoo\[cloud\]' \(Please"):
        places.at("gs://b/x", "--f")


def test_a_link_is_no_file_of_ours(tmp_path):
    """Removed, it leaves what it leads to; test_whole.py has more of them."""
    place = places.Disk(tmp_path / "run")
    place.make()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis").write_text("")
    (tmp_path / "run" / "1").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=r"1 is a link to .*theirs"):
        place.refuse_odd(folders=["1"])
    with pytest.raises(OSError, match=r"1 is a link to .*theirs: put the file itself there"):
        place.refuse_odd(trees=[""])
    place.remove("1")
    assert place.names() == []
    assert (tmp_path / "theirs" / "thesis").exists()


# What uses verbs alone.


def asked(**given):
    return Records(tensorboard=False, wandb_project=None, name="a", tags=(), settings=given)


def test_records_and_settings(room):
    log = records.Log(room, asked(), after=-1)
    for step in (1, 2, 3):
        log.write(step, {"train/dpo_loss": step / 4})
    log.write(2, {"eval/heldout/dpo_loss": 0.125})
    assert room.read("metrics.jsonl").count(b"\n") == 4  # before it is closed
    log.close()
    assert records.of_held_out(room, 2) == {"eval/heldout/dpo_loss": 0.125}
    log = records.Log(room, asked(beta=0.5), after=2)
    log.write(3, {"train/dpo_loss": 0.5})
    log.close()
    assert room.read("metrics.jsonl") == (
        b'{"step": 1, "train/dpo_loss": 0.25}\n'
        b'{"step": 2, "train/dpo_loss": 0.5}\n'
        b'{"step": 2, "eval/heldout/dpo_loss": 0.125}\n'
        b'{"step": 3, "train/dpo_loss": 0.5}\n'
    )
    assert json.loads(room.read("settings.json"))["beta"] == 0.5
    assert room.names() == ["metrics.jsonl", "settings.json"]


def test_the_id_of_a_run_stays(room):
    own = records._own_id(room)
    assert len(own) == 16
    assert records._own_id(room) == own == room.read("wandb_id").decode()


SOURCE = Source(str(TINY / "heldout.jsonl"), "preference_chat")


def test_tokens_are_kept(room, monkeypatch):
    monkeypatch.setattr(parallel, "SHARD", 16)  # several files
    # From this process: no other one sees what is in memory.
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0})
    found = source_pairs.read(SOURCE, HOW, room)
    (folder,) = map(room.within, room.names())
    files = folder.names()
    shards_of = {f"{first}.safetensors" for first in ("000000000", "000000016")}
    assert {*shards_of, "done.json", "identity.json"} <= {*files}
    # A file that is no longer what it was is made again.
    content, ids = folder.read(files[0]), found.ids[0].prompt.tobytes()
    folder.write_whole(files[0], content.replace(ids, ids[::-1]))
    again = source_pairs.read(SOURCE, HOW, room)
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "_tokenised", lambda *_: pytest.fail("it is kept"))
        kept = source_pairs.read(SOURCE, HOW, room)
    for one, other in ((found, again), (found, kept)):
        assert len(one.ids) == len(other.ids) > 16
        for mine, theirs in zip(one.ids, other.ids, strict=True):
            np.testing.assert_array_equal(mine.prompt, theirs.prompt)
            np.testing.assert_array_equal(mine.chosen, theirs.chosen)
            np.testing.assert_array_equal(mine.rejected_scored, theirs.rejected_scored)


@pytest.mark.parametrize("content", [b"[1]", b"{", b'{"a.safetensors": "0"}'])
def test_tokens_that_are_not_there_are_none(room, content):
    room.write_whole("done.json", content)
    assert token_cache.read_all(room) is None


def test_tokens_that_are_said_to_be_elsewhere_are_none(room):
    """Though they are whole, and of the digest that is given."""
    nothing = Shard([], np.zeros(0, np.uint64), counts.none())
    token_cache.write(room, "000000000.safetensors", shards.to_bytes(nothing))
    token_cache.finish(room, [0])
    assert token_cache.read_all(room)
    content, done = room.read("000000000.safetensors"), room.read("done.json")
    cache = room.within("cache")
    cache.make()
    cache.write_whole("done.json", done.replace(b"000000000", b"../000000000"))
    assert token_cache.read_all(cache) is None
    assert room.read("000000000.safetensors") == content


def test_answers_of_a_reference_are_kept(room):
    how = dict(fingerprint="a", compute=jnp.float32, attention="dense")
    cache = reference_cache.opened(room, **how)
    assert cache.known == {}
    reference_cache._write(cache.folder, [b"k" * 16], np.array([[1.0, 2.0]], np.float32))
    known = reference_cache.opened(room, **how).known
    assert {key: value.tolist() for key, value in known.items()} == {b"k" * 16: [1.0, 2.0]}
    (name,) = [name for name in cache.folder.names() if name.endswith(".safetensors")]
    content = cache.folder.read(name)
    cache.folder.write_whole(name, content[:-1] + bytes([content[-1] ^ 1]))
    assert reference_cache.opened(room, **how).known == {}


def test_an_export(room):
    model = zoo.load(TINY / "model")
    folder = room.within("model")
    for _ in range(2):
        zoo.save(model, folder.address, dtype=jnp.bfloat16)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*folder.names()}
        assert folder.read("config.json") == (TINY / "model" / "config.json").read_bytes()
    assert room.names() == ["model"]


def test_a_run_begins(room, tiny_config):
    """Until its first checkpoint a run needs nothing but verbs."""
    config = tiny_config
    config.directory = room.within("run").address
    config.token_cache = room.within("tokens").address
    config.train_data, config.max_eval_pairs, config.num_train_steps = SOURCE.path, None, 4
    with config.ignore_type():
        config.validation = ml_collections.ConfigDict({})
    given = checks.checked(config, settings.table_of(settings.DPO))
    with prepare.prepared(given) as run:
        assert run.directory.address == config.directory
        assert policy.export_folder(4, run).address == f"{config.directory}/hf/step-4"
        assert not policy.exported(4, run)
        zoo.save(zoo.load(TINY / "model"), policy.export_folder(4, run).address)
        assert policy.exported(4, run)
        with pytest.raises(OSError, match=f"another run is using {room}/run"), \
                prepare.prepared(given):  # fmt: skip
            pass
    run.directory.within("hf/step-2").make()
    run.directory.write_whole("hf/step-2/thesis", b"")
    with (
        pytest.raises(FileExistsError, match="hf/step-2 holds something other than a model"),
        prepare.prepared(given),
    ):
        pass
    run.directory.remove("hf/step-2")
    with prepare.prepared(given):
        pass


@pytest.mark.parametrize("name", ["a[1]", "b]", "c*", "d?"])
def test_where_orbax_would_lose_checkpoints_none_are_written(tmp_path, name):
    """It looks for its own files by a pattern that begins with the whole path."""
    with pytest.raises(BadInput, match="choose a directory without"):
        places.Disk(tmp_path / name / "run").for_orbax()
    assert places.Disk(tmp_path / "e {f} 'g' #h").for_orbax() == f"{tmp_path}/e {{f}} 'g' #h"

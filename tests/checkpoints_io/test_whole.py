"""Files that are written whole: through no link, with nothing left of writers that were killed."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from checkpoints_io import lock, places, whole
from recipes import dpo
from recipes.data import source_pairs
from recipes.data.ids import token_cache
from recipes.data.ids.encode_rows import Source
from recipes.preference import reference_cache
from recipes.training import records
from tests.conftest import ROOT, TINY
from tests.recipes.data.test_source_pairs import HOW
import zoo


def refuse():
    raise AssertionError("it is held by nobody")


def test_a_file_written_whole_keeps_its_mode(tmp_path):
    path = tmp_path / "records"
    path.write_text("old")
    path.chmod(0o600)
    whole.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_is_written_through_a_link(tmp_path, is_there):
    target, link = tmp_path / "theirs", tmp_path / "mine"
    if is_there:
        target.write_text("a thesis")
    link.symlink_to("theirs")
    told = f"{link} is a link to theirs"
    with pytest.raises(OSError, match=told):
        whole.write(link, b"new")
    with pytest.raises(OSError, match=told), lock.held(link, otherwise=refuse):
        pass
    assert target.exists() == is_there and (not is_there or target.read_text() == "a thesis")


def test_a_lock_leaves_what_is_in_its_file(tmp_path):
    """It may be another name of a file of yours."""
    (tmp_path / "theirs").write_text("a thesis")
    os.link(tmp_path / "theirs", tmp_path / "lock")
    with lock.held(tmp_path / "lock", otherwise=refuse):
        pass
    assert (tmp_path / "theirs").read_text() == "a thesis"


@pytest.mark.parametrize(
    "name", ["lock", *records.FILES, "tensorboard", "profile", "checkpoints/1", "checkpoints/1/a/b"]
)
def test_a_run_directory_of_a_stranger(tiny_config, tmp_path, name):
    """A link in it is refused before anything is read; the directory itself may be one."""
    directory = tmp_path / "elsewhere"
    (directory / "checkpoints").mkdir(parents=True)
    (tmp_path / "run").symlink_to(directory)
    (tmp_path / "theirs").write_text("a thesis")
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=f"{name} is a link to {tmp_path}/theirs"):
        dpo.train(tiny_config)
    assert (tmp_path / "theirs").read_text() == "a thesis"


@pytest.mark.parametrize("name", ["checkpoints", "hf"])
def test_rooms_of_a_run_are_in_its_directory(tiny_config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=f"{name} is a link to {tmp_path}/theirs"):
        dpo.train(tiny_config)
    assert not any((tmp_path / "theirs").iterdir())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.jsonl", "is in the way of a file"),
        ("tensorboard", "is in the way of a folder"),
        ("hf/step-60", "is in the way of a model folder"),
        ("checkpoints/2", "is neither a file nor a folder"),
        ("checkpoints/2/facts/d", "is neither a file nor a folder"),
    ],
)
def test_what_is_no_file_is_not_waited_for(tiny_config, tmp_path, name, told):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(OSError, match=f"{name} {told}"):
        dpo.train(tiny_config)


def test_where_no_export_can_go_the_run_does_not_start(tiny_config, tmp_path):
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "step-60").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"hf/step-60 is in the way of a model folder"):
        dpo.train(tiny_config)
    (tmp_path / "run" / "hf" / "step-60").unlink()
    (tmp_path / "run" / "hf" / "step-60").mkdir()
    (tmp_path / "run" / "hf" / "step-60" / "thesis").write_text("")
    with pytest.raises(OSError, match=r"hf/step-60 holds something other than a model"):
        dpo.train(tiny_config)


def test_a_link_to_a_model_stays_one(tmp_path):
    """And what it leads to is the new one."""
    (tmp_path / "disk").mkdir()
    model = zoo.fresh(TINY / "model", seed=1)
    zoo.save(model, tmp_path / "disk" / "model")
    (tmp_path / "link").symlink_to("disk/model")
    zoo.save(zoo.fresh(TINY / "model", seed=2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    found = zoo.load(tmp_path / "disk" / "model").embedding[...]
    assert (found != zoo.load(TINY / "model").embedding[...]).any()
    assert (found == zoo.load(tmp_path / "link").embedding[...]).all()
    assert (found != model.embedding[...].astype("bfloat16").astype("float32")).any()
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["model"]


def test_an_export_follows_no_link_to_its_scratch(tmp_path):
    (tmp_path / "theirs" / "new").mkdir(parents=True)
    (tmp_path / ".model.part").symlink_to("theirs")
    with pytest.raises(OSError, match=r"\.model\.part is a link to theirs"):
        zoo.save(zoo.load(TINY / "model"), tmp_path / "model")
    assert (tmp_path / "theirs" / "new").is_dir()


@pytest.mark.parametrize("name", ["model", ".model.part"])
def test_an_export_waits_for_no_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"{name} is in the way of a .*folder"), \
            whole.folder(tmp_path / "model"):  # fmt: skip
        pass


def test_caches_wait_for_no_pipe(tmp_path):
    whole.clear(tmp_path / "a-link-to-nowhere")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / ".film.12345678.part").write_text("of another program")
    (tmp_path / "link").symlink_to("theirs")
    whole.clear(tmp_path / "link")
    assert any((tmp_path / "theirs").iterdir())
    os.mkfifo(tmp_path / "done.json")
    os.mkfifo(tmp_path / "000000000.safetensors")
    assert token_cache.read_all(places.Disk(tmp_path)) is None
    assert token_cache.read(places.Disk(tmp_path), "000000000.safetensors") is None


SOURCE = Source(str(TINY / "heldout.jsonl"), "preference_chat")


@pytest.mark.parametrize("name", ["lock", "identity.json", "done.json", "000000000.safetensors"])
def test_a_cache_of_a_stranger(tmp_path, name):
    source_pairs.read(SOURCE, HOW, places.Disk(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    (tmp_path / "theirs").write_text("a thesis")
    for path in (folder / name, folder / "done.json"):
        path.unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "theirs")
    if name == "identity.json":  # which is there, as far as it is looked at
        source_pairs.read(SOURCE, HOW, places.Disk(tmp_path / "cache"))
    else:
        with pytest.raises(OSError, match=f"{name} is a link to"):
            source_pairs.read(SOURCE, HOW, places.Disk(tmp_path / "cache"))
    assert (tmp_path / "theirs").read_text() == "a thesis"


# A writer that is killed in the midst of it, or lives on.
WRITER = """
import os, pathlib, signal, sys
from checkpoints_io import whole
def stopped(path):
    print(path.name, flush=True)
    signal.pause()
whole._to_disk = stopped
whole.write(pathlib.Path(sys.argv[1]), b"half")
"""


def test_what_killed_writers_left_is_cleared_and_what_living_ones_write_is_not(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / name)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for name in ("killed", "living")
    ]  # fmt: skip
    killed, living = (writer.stdout.readline().strip() for writer in writers)
    writers[0].kill()
    writers[0].wait()
    theirs = [".bashrc.part", "film.12345678.part", ".film.1234567.part"]
    for name in theirs:
        (tmp_path / name).write_text("of another program")
    assert {killed, living} < {path.name for path in tmp_path.iterdir()}
    whole.clear(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    writers[1].kill()
    writers[1].wait()
    assert left == sorted([living, *theirs])


def test_a_file_whose_part_was_cleared_is_written_again(tmp_path, monkeypatch):
    """By a machine that the locks of the disk do not reach."""
    rename, times = pathlib.Path.rename, []

    def cleared(part, path):
        times.append(part)
        if len(times) == 1:
            part.unlink()
        return rename(part, path)

    monkeypatch.setattr(pathlib.Path, "rename", cleared)
    whole.write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert len(times) == 2
    with pytest.raises(FileNotFoundError):
        whole.write(tmp_path / "nowhere" / "file", b"content")


def test_a_folder_that_a_living_one_writes_stays(tmp_path):
    with whole.folder(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("new")
        whole.clear(tmp_path)
    assert (tmp_path / "model" / "config.json").read_text() == "new"


LEFT = ".done.json.0123abcd.part"


def test_runs_and_caches_begin_by_clearing(tiny_config, tmp_path):
    """Of a run its exports too, of which the one that was there is put back."""
    tokens, answers, run = (tmp_path / name for name in ("tokens", "answers", "run"))
    source_pairs.read(SOURCE, HOW, places.Disk(tokens))
    opened = lambda name: reference_cache.opened(
        places.Disk(answers), fingerprint=name, compute="float32", attention="blocks"
    )
    opened("other")
    (run / "hf").mkdir(parents=True)
    rooms = [*tokens.iterdir(), *answers.iterdir(), run]
    for room in rooms:
        (room / LEFT).write_text("half")
    for name in ("old", "new"):
        shutil.copytree(TINY / "model", run / "hf" / ".step-5.part" / name)
    source_pairs.read(SOURCE, HOW._replace(max_length=99), places.Disk(tokens))
    opened("mine")
    tiny_config.train_data = "no/such/file"
    with pytest.raises(FileNotFoundError):
        dpo.train(tiny_config)
    assert not any((room / LEFT).exists() for room in rooms)
    assert [path.name for path in (run / "hf").iterdir()] == ["step-5"]
    assert token_cache.read_all(places.Disk(rooms[0])) is not None

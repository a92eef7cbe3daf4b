"""A model folder is looked up once: config.json first, and the rest of the same revision."""

import json
import pathlib

import jax
import pytest

from checkpoints_io import hf_folder
from tests.conftest import TINY
import zoo

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, whose `main` is COMMIT; what was asked of it."""
    folder = tmp_path / "models--a--b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns))
        for path in (TINY / "model").iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                (folder / path.name).write_bytes(path.read_bytes())
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return folder, asked


@pytest.mark.parametrize(
    ("name", "revision", "first"), [("a/b", None, None), ("a/b@main", None, "main"),
                                    ("a/b", "v1", "v1")]
)  # fmt: skip
def test_weights_are_of_the_revision_of_config_json(hub, name, revision, first):
    """Between the two `main` may have moved."""
    folder, asked = hub
    model = zoo.load(name, revision=revision)
    assert asked == [
        ("a/b", first, hf_folder.CONFIG_FILES), ("a/b", COMMIT, hf_folder.FILES)
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert model.source == hf_folder.Folder(folder, config, COMMIT)
    zoo.load(model.source)  # and is not fetched again
    zoo.check(model.source)
    assert len(asked) == 2


def test_what_the_zoo_cannot_read_is_refused_before_its_weights_are_fetched(hub, monkeypatch):
    _, asked = hub
    refuse = lambda path: {"model_type": "bert"}
    monkeypatch.setattr(hf_folder, "read_config", refuse)
    for refused in (zoo.load, zoo.check, zoo.fresh):
        asked.clear()
        with pytest.raises(ValueError, match="model_type 'bert'"):
            refused("a/b")
        assert hf_folder.FILES not in [files for _, _, files in asked]


def test_a_model_made_anew_needs_no_weights_of_the_hub(hub):
    folder, _ = hub
    model = zoo.fresh("a/b")
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
    assert zoo.load(model.source).source.rest is None
    assert (folder / "model.safetensors").exists()


def test_a_folder_of_this_machine_is_looked_at_once(monkeypatch, tmp_path):
    looked = []
    find, read = hf_folder.find, hf_folder.read_config
    monkeypatch.setattr(hf_folder, "find", lambda *how: looked.append("find") or find(*how))
    monkeypatch.setattr(hf_folder, "read_config", lambda path: looked.append("read") or read(path))
    folder = hf_folder.look_up(TINY / "model")
    zoo.check(folder)
    zoo.save(zoo.load(folder), tmp_path / "out")
    assert looked == ["find", "read"]
    assert folder.revision is None


def test_a_folder_of_this_machine_has_no_revision():
    with pytest.raises(ValueError, match="no revision='main': leave it out"):
        zoo.load(TINY / "model", revision="main")


def test_a_folder_is_a_path_and_an_argument_of_jit():
    folder = hf_folder.look_up(str(TINY / "model"))
    again = hf_folder.look_up(TINY / "model")
    assert pathlib.Path(folder) == TINY / "model" == pathlib.Path(str(folder))
    assert folder == again
    assert hash(folder) == hash(again)
    model = zoo.load(folder)
    jax.jit(lambda model: model.norm.scale * 2)(model)


def test_a_config_that_changes_under_a_model_is_not_what_it_is_saved_with(tmp_path):
    """The file is copied byte for byte where it still says what was read."""
    source = tmp_path / "source"
    zoo.save(zoo.load(TINY / "model"), source)
    before = (source / "config.json").read_bytes()
    model = zoo.load(source)
    zoo.save(model, tmp_path / "one")
    (source / "config.json").write_text("{}")
    zoo.save(model, tmp_path / "other")
    assert (tmp_path / "one" / "config.json").read_bytes() == before
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == json.loads(before)


def test_two_revisions_of_one_model_are_refused(hub):
    _, asked = hub
    told = r"a/b@main names a revision, and so does revision='v1': give one"
    with pytest.raises(ValueError, match=told):
        zoo.load("a/b@main", revision="v1")
    assert asked == []


@pytest.mark.parametrize("name", ["words", "some/words/of mine"])
def test_a_tokenizer_folder_that_is_missing_is_refused_before_anything_is_written(tmp_path, name):
    model = zoo.load(TINY / "model")
    with pytest.raises(FileNotFoundError, match=f"there is no model folder '{tmp_path}/{name}'"):
        zoo.save(model, tmp_path / "out", tokenizer=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_adapters_is_told_from_one_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"config\.json\. It holds adapters: zoo\.load\(BASE"
    ):
        hf_folder.read_config(tmp_path)

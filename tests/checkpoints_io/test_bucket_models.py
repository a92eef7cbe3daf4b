"""Models in a bucket: fetched once, and what has changed again."""

import json

import fsspec
import numpy as np
import pytest

from checkpoints_io import bucket, hf_folder, places
from checkpoints_io.errors import NotFound
from tests.conftest import TINY
import zoo

TOKENS = [[1, 5, 9, 7]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "buckets"


@pytest.fixture
def fetched(monkeypatch):
    """The names of the objects that were fetched since it was last emptied."""
    names, fetch = [], bucket.Bucket.fetch

    def told(self, name, path):
        names.append(name)
        fetch(self, name, path)

    monkeypatch.setattr(bucket.Bucket, "fetch", told)
    return names


def put_up(url):
    with places.at(url).whole_folder() as folder:
        for path in (TINY / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


def a_model_comes_from(url, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    put_up(url)
    np.testing.assert_array_equal(zoo.load(url)(TOKENS), zoo.load(TINY / "model")(TOKENS))
    place = places.at(url)
    config = json.loads(place.read("config.json"))
    place.write_whole("config.json", json.dumps(config | {"initializer_range": 0.5}).encode())
    assert hf_folder.look_up(url).config["initializer_range"] == 0.5


def test_it_is_the_model_of_the_folder(bucket, tmp_path, monkeypatch):
    a_model_comes_from("memory://runs/x/hf/step-60", tmp_path, monkeypatch)


def test_what_is_here_is_not_fetched_again(bucket, fetched, cache):
    url = "memory://models/tiny"
    put_up(url)
    places.at(url).write_whole("consolidated.safetensors", b"the same, for other programs")
    for name in ("onnx/config.json", "additional_chat_templates/tool_use.jinja"):
        folder, _, file = name.partition("/")
        places.at(f"{url}/{folder}").write_whole(file, b"TOOLS")
    assert hf_folder.look_up(url).path.parent == cache
    assert fetched == ["config.json"]  # refused by it, weights are not fetched
    zoo.load(url)
    assert len(fetched) == len(set(fetched))
    assert "model.safetensors" in fetched and "consolidated.safetensors" not in fetched
    assert [name for name in fetched if "/" in name] == ["additional_chat_templates/tool_use.jinja"]
    there = zoo.load_tokenizer(url).own.chat_templates
    assert there == {"tool_use": "TOOLS"}
    fetched.clear()
    zoo.load(url)
    words = zoo.load_tokenizer(url)
    assert words.decode(words.encode("Paris")) == "Paris"
    assert fetched == []
    places.at(url).write_whole("config.json", places.at(url).read("config.json"))
    zoo.load(url)
    assert fetched == ["config.json"]


def test_what_is_no_longer_there_goes(bucket, cache):
    url = "memory://models/tiny"
    put_up(url)
    folder = zoo.load(url).source.path
    assert (folder / "chat_template.jinja").is_file()
    places.at(url).remove("chat_template.jinja")
    zoo.load(url)
    assert not (folder / "chat_template.jinja").exists()


def test_a_fetch_that_was_cut_is_done_again(bucket, fetched, monkeypatch):
    url, memory = "memory://models/tiny", fsspec.get_filesystem_class("memory")
    put_up(url)
    get = memory.get_file

    def half(self, path, to, **more):
        get(self, path, to, **more)
        if path.endswith(".safetensors"):
            raise ConnectionResetError("connection reset")

    with monkeypatch.context() as cut:
        cut.setattr(memory, "get_file", half)
        with pytest.raises(OSError, match=r"memory://models/tiny cannot be used: connection reset"):
            zoo.load(url)
    np.testing.assert_array_equal(zoo.load(url)(TOKENS), zoo.load(TINY / "model")(TOKENS))


def test_what_is_not_there_is_named(bucket):
    with pytest.raises(NotFound, match="there is no model in memory://models/none"):
        zoo.load("memory://models/none")
    with pytest.raises(ValueError, match=r"is a folder, which has no revision='v1'"):
        hf_folder.look_up("memory://models/none", "v1")
    with pytest.raises(ValueError, match="must name a folder in a bucket: gs://BUCKET/FOLDER"):
        zoo.load("gs://models")
    with pytest.raises(ValueError, match="must be a path on this machine"):
        zoo.load("file:///etc/models")

"""Folders to the hub, by its real client, against a stand-in of its API."""

import pytest

from checkpoints_io import hf_hub
from tests.checkpoints_io import hub as stand_in


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with stand_in.serving() as (hub, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    files = {
        "model.safetensors": b"weights" * 100, "tokenizer.json": b"words" * 100,
        "config.json": b"{}", "README.md": b"---\ntags:\n- dpo\n---\n# One\n",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_becomes_a_private_repository(hub, folder):
    hf_hub.ready("me/mine", private=True)
    hf_hub.ready("me/mine", private=True)  # a resumed run asks again
    hf_hub.push(str(folder), "me/mine", "step 5")
    repo = hub.repos["me/mine"]
    assert repo["private"]
    assert repo["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert repo["commits"] == ["step 5"]


def test_what_was_sent_before_the_line_was_cut_is_not_sent_again(hub, folder):
    hf_hub.ready("me/mine", private=False)
    hub.breaks_after = 1
    with pytest.raises(OSError, match="could not be sent to me/mine"):
        hf_hub.push(str(folder), "me/mine", "step 5")
    assert hub.repos["me/mine"]["files"] == {}
    hub.breaks_after = None
    hf_hub.push(str(folder), "me/mine", "step 5")
    assert len(hub.sent) == len(set(hub.sent)) == 2
    assert hub.repos["me/mine"]["files"].keys() == {path.name for path in folder.iterdir()}


def test_of_an_earlier_export_nothing_is_left_that_would_be_read(hub, folder, tmp_path):
    """Adapters beside merged weights would be put on them; one file is read before several."""
    hf_hub.ready("me/mine", private=True)
    others = {"notes/config.json", "model_of_mine.safetensors"}
    hub.repos["me/mine"]["files"] |= dict.fromkeys(others, b"mine")
    hf_hub.push(str(folder), "me/mine", "adapters")
    for names in (
        ("adapter_config.json", "adapter_model.safetensors", "trained_on.json", "README.md"),
        ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("config.json", "model.safetensors"),
    ):
        other = tmp_path / names[1]
        other.mkdir()
        for name in names:
            (other / name).write_bytes(name.encode())
        hf_hub.push(str(other), "me/mine", "another")
        kept = others | {"tokenizer.json", "README.md"}
        assert hub.repos["me/mine"]["files"].keys() == kept | {*names}


def test_who_may_not_write_is_told_before_the_run(hub, monkeypatch):
    hf_hub.ready("me/open", private=False)
    with pytest.raises(ValueError, match="me/open is public, but should be private"):
        hf_hub.ready("me/open", private=True)
    hub.refuses = True
    with pytest.raises(PermissionError, match="does not let you write to you/theirs: log in"):
        hf_hub.ready("you/theirs", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(PermissionError, match="HF_TOKEN") as refused:
        hf_hub.ready("me/mine", private=True)
    assert "hf_another" not in str(refused.value)
    with pytest.raises(ValueError, match="look like 'owner/name'"):
        hf_hub.ready("mine", private=True)


def test_a_hub_that_is_not_there(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    with pytest.raises(OSError, match="the hub could not be reached to create me/mine"):
        hf_hub.ready("me/mine", private=True)

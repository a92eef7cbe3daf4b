"""Weights from strangers' files: read once, read right, or refused in a sentence."""

import json
import pathlib
import shutil
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import hf_export, hf_folder, whole
from tests.conftest import large_weights, small_config
import zoo
from zoo import llama
from zoo.parts import sharding


@pytest.fixture
def folder(tmp_path):
    model = large_weights(llama.Model(small_config(), nnx.Rngs(0)))
    zoo.save(model, tmp_path / "model", dtype=jnp.float32)
    return tmp_path / "model"


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.pop(Q), f"lack {Q}"),
        (lambda t: t.update({"model.extra": t[Q]}), "hold model.extra"),
        (lambda t: t.update({Q: t[Q][:16]}), r"q_proj.weight is \(16, 32\) where .* \(32, 32\)"),
        (lambda t: t.update({Q: t[Q].astype(np.float64)}), "stored as F64"),
        (lambda t: t.update({Q: t[Q].astype(np.int8)}), "stored as I8"),
    ],
)
def test_what_does_not_fit_is_named(folder, edit, told):
    change(folder, edit)
    with pytest.raises(ValueError, match=told):
        zoo.load(folder)


def test_left_over_rotary_tables_are_passed_over(folder):
    lead = "model.layers.0.self_attn.rotary_emb"
    tables = {f"{lead}.{name}": np.ones(4, np.float32) for name in ("inv_freq", "cos_cached")}
    change(folder, lambda t: t.update(tables))
    zoo.load(folder)


def test_files_that_are_broken(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-5], b"version https://git-lfs.github.com/spec/v1\n", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            zoo.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        zoo.load(folder)


def test_an_index_may_not_lead_elsewhere(folder):
    outside = folder.parent / "secret.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    index = folder / "model.safetensors.index.json"
    for name in ("../secret.safetensors", str(outside)):
        index.write_text(json.dumps({"weight_map": {Q: name}}))
        with pytest.raises(ValueError, match=r"more than \.safetensors files beside it"):
            zoo.load(folder)
    index.write_text(json.dumps({"weight_map": {Q: "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lacks \['gone.safetensors'\], which .*index"):
        zoo.load(folder)
    for content in ("[]", "[" * 100_000, "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json (has no|should|is not)"):
            zoo.load(folder)


def test_of_two_sets_of_weights_that_of_transformers_is_read(folder, caplog):
    """Folders of the hub hold the index of files that are gone, or narrow and wide weights."""
    model = zoo.load(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    for others in ({}, {name: np.zeros_like(value) for name, value in tensors.items()}):
        safetensors.numpy.save_file(others, folder / "other.safetensors")
        np.testing.assert_array_equal(zoo.load(folder).embedding[...], model.embedding[...])
    assert caplog.text.count("holds model.safetensors and model.safetensors.index.json") == 1


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_dtype_is_read(folder, tmp_path, stored):
    model = zoo.load(folder)
    zoo.save(model, tmp_path / "narrow", dtype=stored)
    found = zoo.load(tmp_path / "narrow")
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, found)), strict=True):
        assert theirs.dtype == jnp.float32
        np.testing.assert_array_equal(theirs, ours.astype(stored).astype(jnp.float32))
    assert zoo.load(folder, dtype=stored).norm.scale[...].dtype == stored


def test_shards_and_index(folder, tmp_path, monkeypatch):
    model = zoo.load(folder)
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 10_000)
    zoo.save(model, tmp_path / "many", dtype=jnp.float32)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    stored = {name: f.name for f in files for name in safetensors.numpy.load_file(f)}
    assert index["weight_map"] == stored
    total = sum(a.nbytes for f in files for a in safetensors.numpy.load_file(f).values())
    assert index["metadata"]["total_size"] == total
    again = zoo.load(tmp_path / "many")
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_export_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("here before")
    (target / "config.json").write_text("{}")
    with pytest.raises(RuntimeError), whole.folder(target) as fresh:
        (fresh / "half").write_text("")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "old").exists()
    with whole.folder(target) as fresh:
        (fresh / "new").write_text("")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_writer_killed_between_its_renames_has_lost_nothing(tmp_path):
    """The old folder stands aside then, and is put back before anything else."""
    old = tmp_path / ".model.part" / "old"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    (tmp_path / ".model.part" / "new").mkdir()
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), whole.folder(target):
        raise RuntimeError
    assert (target / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_writer_interrupted_between_its_renames_puts_the_old_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = pathlib.Path.rename

    def interrupted(path, to):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole.folder(target) as fresh:
        (fresh / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_one_folder(tmp_path):
    with (
        whole.folder(tmp_path / "model"),
        pytest.raises(OSError, match="is being written by another process"),
        whole.folder(tmp_path / "model"),
    ):
        pass


def test_somebodys_work_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("here before")
    model = llama.Model(small_config(), nnx.Rngs(0))
    with pytest.raises(FileExistsError, match="something other than a model"):
        zoo.save(model, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_head_that_config_json_ties_must_be_the_embedding(tmp_path):
    """Transformers would use it; a fine-tuned head would be lost without a word."""
    model = large_weights(llama.Model(small_config(tie_word_embeddings=True), nnx.Rngs(0)))
    zoo.save(model, tmp_path, dtype=jnp.float32)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    write = lambda head: safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, path)
    write(embedding.copy())
    np.testing.assert_array_equal(zoo.load(tmp_path).embedding, embedding)
    other = embedding.copy()
    other[-1, -1] += 1e-3
    for head in (other, embedding[:-1].copy()):
        write(head)
        with pytest.raises(ValueError, match=r"ties lm_head.weight to .*: false in it"):
            zoo.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "stop_ids", "merged"),
    [(2, (2, 7), [2, 7]), (2, (7,), [2, 7]), ([2, 5], (7, 5), [2, 5, 7]), ([2, 5], (), [2, 5])],
)
def test_stop_ids_join_those_of_the_source(folder, tmp_path, source, stop_ids, merged):
    """None of the source's is lost, and none stands twice."""
    model = zoo.load(folder)
    told = {"eos_token_id": source, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(told))
    zoo.save(model, tmp_path / "out", stop_ids=stop_ids, chat_template="{{ messages }}")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": merged, "top_p": 0.9}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_stop_ids_join_that_of_config_json_where_there_is_no_other(folder, tmp_path):
    told = hf_folder.read_config(folder) | {"eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(told))
    model = zoo.load(folder)
    zoo.save(model, tmp_path / "out", stop_ids=(7,))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [3, 7]}


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "a/b/c", "/nowhere/model", "../seen/from", "models/", "my a/b"]
)
def test_no_such_folder(name):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        zoo.load(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        zoo.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        zoo.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        zoo.load(tmp_path)


def test_the_hub_out_of_reach(monkeypatch):
    from huggingface_hub import errors

    def raising(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    raising(errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(FileNotFoundError, match="hub could not be reached"):
        zoo.load("owner/model")
    response = types.SimpleNamespace(headers={}, request=None)  # what the errors look at
    raising(errors.GatedRepoError("gated", response=response))
    with pytest.raises(PermissionError, match="hf auth login"):
        zoo.load("owner/model")
    raising(errors.RepositoryNotFoundError("gone", response=response))
    with pytest.raises(FileNotFoundError, match="no such repository"):
        zoo.load("owner/model@main")


def test_a_mesh_of_the_wrong_size():
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.mesh_of(1, 3, 1)


def test_more_layers_than_tensors_are_not_listed(folder):
    """Ten thousand layers of ten thousand experts would be named one by one."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10_000}))
    with pytest.raises(ValueError, match=r"config.json needs 10000 tensors .* but there are \d+"):
        zoo.check(folder)

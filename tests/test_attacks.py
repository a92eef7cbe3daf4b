"""Attacks that worked on others: each reads nothing, runs nothing, and is answered by a sentence.

The names are those of the reports; docs/reliability.md says what else is tested.
"""

import ast
import contextlib
import json
import pickle
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from checkpoints_io import hf_folder, places
from checkpoints_io.run_state import Keep, RunStore
from recipes import dpo
from recipes.preference import reference_cache
from tests.checkpoints_io.test_strangers import OWN, Watched, folders
from tests.conftest import ROOT, TINY
import zoo
from zoo.text import chat_tokenizer, tokenizer


@pytest.fixture
def model(tmp_path):
    """A small model in two files with an index; beside it one that it may not touch."""
    folders(tmp_path)
    return tmp_path / "two"


def refused(folder, told):
    watched = Watched(folder)
    with contextlib.suppress(ValueError, OSError):  # once before, for what is imported once
        zoo.load(TINY / "model")
    sentence, _, _ = watched.attempt()
    assert told in sentence, sentence
    assert not watched.elsewhere


@pytest.mark.parametrize("name", ["../secret.safetensors", "/{}/secret.safetensors",
                                  "a/../../secret.safetensors", "..", "", "config.json",
                                  "secret.safetensors\0.safetensors"])  # fmt: skip
def test_an_index_that_leads_out(model, name):
    """transformers#46097, #46272 to #47996, diffusers#14175: weight_map, relative and absolute."""
    index = model / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["model.norm.weight"] = name.format(model.parent)
    index.write_text(json.dumps(told))
    refused(model, "names more than .safetensors files beside it")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json",
                                  "chat_template.jinja", "tokenizer.json"])  # fmt: skip
def test_links_that_lead_out(model, name):
    """transformers#46281: a file of the folder is a link to one of yours."""
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(model.parent / "secret.safetensors")
    refused(model, f"{name} is a link that leads out of its folder")


def test_links_of_the_hubs_cache_are_what_the_hub_sent(tmp_path, monkeypatch):
    """They lead to blobs of the same repository, whose names are their hashes."""
    import hashlib

    folder = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = folder.parent.parent / "blobs"
    for place in (folder, blobs):
        place.mkdir(parents=True)
    for path in (TINY / "model").iterdir():
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0%b" % (len(content), content))
        large = path.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256(content) if large else git).hexdigest()
        blob.write_bytes(content)
        (folder / path.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert hf_folder.revision_of(hf_folder.find("a/b")) == "c0ffee"
    (folder / "pytorch_model.bin").symlink_to(blobs / ("0" * 64))  # not there, and never asked for
    zoo.load("a/b")
    for name in ("model.safetensors", "config.json"):
        blob = (folder / name).resolve()
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + b" ")
        with pytest.raises(ValueError, match="is not what the hub sent: delete it"):
            zoo.load("a/b")
        blob.write_bytes(content)
    zoo.load("a/b")


def header(told, body=b"\0" * 64):
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + body


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 8, b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}",
        (100 << 20).to_bytes(8, "little") + b"{}",
        header({"a": ONE}, b"\0" * 8), header({"a": ONE}, b"\0" * 999),
        header({"a": ONE | {"shape": [1 << 40]}}), header({"a": ONE | {"shape": [1 << 63] * 2}}),
        header({"a": ONE | {"shape": [-4]}}), header({"a": ONE | {"data_offsets": [16, 0]}}),
        header({"a": ONE | {"data_offsets": [0, 1 << 60]}}), header({"a": ONE | {"dtype": "F99"}}),
        header({"a": ONE, "b": ONE}, b"\0" * 16),  # which overlap
        header({"a": ONE, "b": ONE | {"data_offsets": [32, 48]}}, b"\0" * 48),  # with a hole
        header(b"[" * 100_000), header(b'{"a":' * 100_000), header(b"\xff\xfe{}"), header({"a": 1}),
    ],
)  # fmt: skip
def test_headers_that_lie(model, content):
    """safetensors#668, ollama#16190, fastllm#713, vmlx-swift#217: bombs, offsets, short shards."""
    (model / "model-00002-of-00002.safetensors").write_bytes(content)
    refused(model, "is not a complete safetensors file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("of", ["[],", '{"a":[]},', "1,"])
def test_json_of_nothing_but_brackets(model, name, of):
    """Parsed it would take up to 23 times its size."""
    text = '{"weight_map": [' + of * (12_000_000 // len(of)) + "1]}"
    (model / name).write_text(text)
    watched = Watched(model)
    told, seconds, most = watched.attempt()
    assert "holds more than 500000 values" in told
    assert seconds < 5 and most < 2 * len(text) + OWN


def test_a_pointer_in_place_of_a_file_is_named(model):
    """ComfyUI#13669: git-lfs was not there when the folder was cloned."""
    path = model / "model-00001-of-00002.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(model, "git-lfs pointer")


PLANTED = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


@pytest.mark.parametrize(
    "key",
    ["_attn_implementation_internal", "model_file", "_target_", "trust_remote_code", "kernels"],
)  # fmt: skip
def test_a_config_that_names_code_is_refused_by_name(model, key):
    """CVE-2026-4372, CVE-2026-5241, mlx-lm#1385, vllm#38319, hydra's _target_ (Unit 42)."""
    marker = model.parent / "marker"
    (model / "payload.py").write_text(PLANTED.format(str(marker)))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: "payload.py"}))
    refused(model, f"does not implement {{'{key}': 'payload.py'}}")
    assert not marker.exists()


def test_code_beside_a_model_is_never_run(tmp_path):
    """`auto_map` stands in honest files too, and means nothing here; nor do pickles beside it."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(TINY / "model", folder)
    for name in ("modeling_x", "tokenization_x", "configuration_x", "__init__", "conftest"):
        (folder / f"{name}.py").write_text(PLANTED.format(str(marker)))
    for name in ("pytorch_model.bin", "rng_state.pth", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((folder / name).read_text())
        told["auto_map"] = {"AutoModel": "modeling_x.X", "AutoTokenizer": ["tokenization_x.X"]}
        (folder / name).write_text(json.dumps(told))
    tokenizer.load(folder)
    zoo.save(zoo.load(folder), tmp_path / "saved", tokenizer=folder)
    for path in (tmp_path / "saved").iterdir():  # nor does what we write lead others to it
        assert b"modeling_x" not in path.read_bytes() and path.suffix != ".py"
    assert not marker.exists()
    assert not {"modeling_x", "tokenization_x"} & sys.modules.keys()


class Bomb:
    """What a pickle can be."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}", "{% import '../secret' as s %}", "{% extends '/etc/x' %}",
        "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
    ],
)  # fmt: skip
def test_a_template_that_reaches_out(tmp_path, text):
    """CVE-2026-5760, CVE-2024-34359, transformers#46191."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(text)
    words = chat_tokenizer.load_tokenizer(tmp_path / "model")
    with pytest.raises(ValueError) as raised:
        words.chat_text([{"role": "user", "content": "a"}])
    assert "template" in str(raised.value) and "root:" not in str(raised.value)


def test_a_resume_reads_no_pickle_and_runs_no_code(tiny_config, tmp_path):
    """CVE-2026-1839, CVE-2025-23298: what a run left is data, whoever has written into it."""
    config, marker = tiny_config, tmp_path / "marker"
    config.num_train_steps, config.steps_per_checkpoint = 2, 1
    config.reference_mode, config.reference_cache = "cached", str(tmp_path / "reference")
    dpo.train(config)
    run = tmp_path / "run"
    bomb = pickle.dumps(Bomb(marker))
    for room in (run, run / "checkpoints", run / "checkpoints" / "1", run / "checkpoints" / "2"):
        for name in ("config.py", "settings.py", "__init__.py", "sitecustomize.py"):
            (room / name).write_text(PLANTED.format(str(marker)))
        for name in ("rng_state.pth", "state.pkl", "iterator.pickle"):
            (room / name).write_bytes(bomb)
    for path in (tmp_path / "reference").rglob("*.safetensors"):
        path.write_bytes(bomb)
        np.save(path.with_suffix(".npy"), np.array([Bomb(marker)], object), allow_pickle=True)
    (run / "checkpoints" / "2" / "policy" / "_METADATA").write_bytes(bomb)
    dpo.train(config)  # passes it over
    assert (run / "checkpoints" / "unreadable-2").is_dir()
    assert not marker.exists()


# The files that start a program, and how the call begins: Python on a line of ours, or on a program
# of `pipelines.steps.PROGRAMS`; and what the user has typed as --judge.
STARTS = {
    "zoo/text/confined.py": "[sys.executable, '-P', '-c', BEGIN, ",
    "recipes/pipeline.py": "[sys.executable, '-m', program, *words]",
    "recipes/own_pairs/judges.py": "command",
}


def only_this_is_started(node, begins):
    """The node without the one import, and the one use, of `subprocess` that there may be."""
    if isinstance(node, ast.Import) and ast.unparse(node) == "import subprocess":
        return ast.Pass()
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        assert node.value.id != "subprocess" or node.attr in ("Popen", "PIPE")
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "subprocess.Popen":
        assert ast.unparse(node.args[0]).startswith(begins)
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BEGIN":
        assert ast.unparse(node.value) == "'from zoo.text import worker; worker.serve()'"
    return node


def test_nothing_of_ours_can_run_what_it_reads():
    """No pickle, no eval, no torch, no names that are code: `--config` and `--judge` alone are."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch",
                 "transformers", "subprocess", "hydra"}  # fmt: skip
    for package in ("zoo", "checkpoints_io", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            if path.parent == TINY:
                continue  # the scripts that made the embedded files
            for node in ast.walk(ast.parse(path.read_text())):
                if begins := STARTS.get(path.relative_to(ROOT).as_posix()):
                    node = only_this_is_started(node, begins)
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names}
                    if isinstance(node, ast.ImportFrom):
                        names = {str(node.module)}
                    assert not forbidden & {name.split(".")[0] for name in names}, path
                if isinstance(node, ast.Call):
                    called = node.func.id if isinstance(node.func, ast.Name) else None
                    assert called not in ("eval", "exec", "compile", "__import__"), path
                    named = {keyword.arg for keyword in node.keywords}
                    assert not named & {"allow_pickle", "trust_remote_code"}, path


def test_metadata_is_not_looked_at(tmp_path):
    """Unit 42: `_target_` in the metadata of NeMo, Uni2TS and FlexTok files."""
    folder = tmp_path / "model"
    shutil.copytree(TINY / "model", folder)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    before = zoo.load(folder)(jnp.ones((1, 4), jnp.int32))
    metadata = {"format": "pt", "_target_": "os.system", "_args_": "touch marker", "x": "y" * 9999}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata=metadata)
    np.testing.assert_array_equal(zoo.load(folder)(jnp.ones((1, 4), jnp.int32)), before)


def test_a_checkpoint_of_another_is_not_taken_for_ours(tmp_path):
    """Facts that somebody has edited are refused, with all that hangs on them."""
    trees = {"policy": {"w": jnp.arange(4.0)}}
    with contextlib.closing(RunStore(places.Disk(tmp_path), keep=Keep(2))) as store:
        for step in (1, 2):
            store.save(step, trees, {"position": step})
    shutil.rmtree(tmp_path / "2" / "facts")
    shutil.copytree(tmp_path / "1" / "facts", tmp_path / "2" / "facts")
    with contextlib.closing(RunStore(places.Disk(tmp_path), keep=Keep(2))) as store:
        assert store.newest(lambda _: None, trees).step == 1
        assert (tmp_path / "unreadable-2").is_dir()


def test_what_is_kept_of_a_reference_is_read_bit_for_bit_or_not_at_all(tmp_path):
    how = dict(fingerprint="a", compute=jnp.float32, attention="dense")
    answers = places.Disk(tmp_path)
    cache = reference_cache.opened(answers, **how)
    reference_cache._write(cache.folder, [b"k" * 16], np.array([[1.0, 2.0]], np.float32))
    (path,) = tmp_path.rglob("*.safetensors")
    assert len(reference_cache.opened(answers, **how).known) == 1
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not reference_cache.opened(answers, **how).known

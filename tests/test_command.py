"""What goes wrong at the terminal ends in one sentence and a status, never in a traceback."""

import errno
import json
import os
import subprocess
import sys

import ml_dtypes  # noqa: F401  numpy learns bfloat16
import pytest
import safetensors.numpy

from recipes import command
from recipes.configs import tiny
from tests.conftest import ROOT, TINY


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "recipes/dpo.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


TINY_CONFIG = "--config=recipes/configs/tiny.py"


def refused(result, *told, status=1):
    assert result.returncode == status, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for part in told:
        assert part in sentence


def test_a_model_that_does_not_fit_its_config(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (TINY / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    flags = [TINY_CONFIG, f"--config.directory={tmp_path}/run"]
    flags += [f"--config.initialize_from_hf={folder}"]
    for change, told in {
        "model_type": ("bert", "the zoo has"),
        "hidden_act": ("gelu", "hidden_act"),
        "intermediate_size": (360, "misshapen"),
    }.items():
        value, sentence = told
        (folder / "config.json").write_text(json.dumps(config | {change: value}))
        refused(run(*flags), sentence)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:1000].copy()
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    refused(run(*flags), "another model's tokenizer")


def look(*arguments, **how):
    command = [sys.executable, "-m", "recipes.data", TINY_CONFIG, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **how)


def test_the_data_is_looked_at_before_training(tmp_path):
    """Columns of other names, by a flag; a model that has a tokenizer alone; a pipe that closes."""
    row = {"q": "a", "better": "b", "worse": "c\x1b[2J", "id": 7}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 20 + "{torn")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TINY / "model" / name).read_bytes())
    flags = [
        f"--config.train_data={tmp_path}/a.jsonl",
        f"--config.validation.heldout={tmp_path}/a.jsonl",
        "--config.data.columns={'prompt': 'q', 'chosen': 'better', 'rejected': 'worse'}",
        "--config.data.max_malformed_fraction=0.1", f"--config.tokenizer={folder}",
        f"--config.token_cache={tmp_path}/tokens", f"--page={tmp_path}/data.html",
    ]  # fmt: skip
    done = look(*flags)
    assert done.returncode == 0, done.stderr
    for told in (
        "layout prompt_chosen_rejected, recognised from the columns; not read: id",
        "20 of 21 rows used",
        f"1 malformed: not valid JSON (first: {tmp_path}/a.jsonl:21)",
        "⟦b<|eot_id|>⟧",
        "c␛[2J",
    ):
        assert told in done.stdout
    assert "<table" in (tmp_path / "data.html").read_text()
    refused(look(*flags, "--config.data.layout=hh"), "rows of", "hold no pair")


def test_the_data_of_a_run_without_a_directory_into_a_pipe_that_closes(tmp_path):
    closed = subprocess.run(
        f"{sys.executable} -m recipes.data --config=recipes/configs/llama8b.py "
        f"--config.tokenizer={TINY}/model --config.train_data={TINY}/train.jsonl "
        f"--page={tmp_path}/data.html | head -1",
        cwd=ROOT, shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert closed.stdout.startswith("train: ")
    assert closed.stderr == ""


def test_settings_can_be_unset(tmp_path):
    """llama8b by epochs: as far as the directory, which is a file."""
    (tmp_path / "file").write_text("")
    result = run(
        "--config=recipes/configs/llama8b.py", "--config.num_train_steps=None",
        "--config.num_epochs=1", "--config.cooldown=None", f"--config.directory={tmp_path}/file",
    )  # fmt: skip
    refused(result, "cannot be used")


def test_out_of_memory_names_what_to_turn_down(tmp_path, monkeypatch, capsys):
    from recipes import command
    from recipes.configs import tiny

    def train(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    with pytest.raises(SystemExit) as status:
        command._run(train, tiny.get_config())
    assert status.value.code == 1
    assert "per_device_parallelism" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    """A ValueError out of a line of ours that is no `raise` is a bug, not a sentence."""
    from recipes import command, optimizer
    from recipes.configs import tiny

    with pytest.raises(ValueError, match="cannot convert float NaN"):
        command._run(lambda _: optimizer.steps_of(float("nan"), 10), tiny.get_config())


def test_a_full_disk_is_told_as_one(capsys):
    """Whoever met it: a record, a rename, or Orbax, which calls memory and disks by one name."""
    config = tiny.get_config()
    config.compile_cache = None
    for error, told in (
        (OSError(errno.ENOSPC, "No space left on device", "a/metrics.jsonl"), "a/metrics.jsonl"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ):

        def train(_, error=error):
            raise error

        with pytest.raises(SystemExit) as stopped:
            command._run(train, config)
        assert stopped.value.code == 1
        assert f"the disk is full ({told}" in capsys.readouterr().err.replace("[Errno 28] ", "")


def test_a_reader_who_has_seen_enough_ends_no_run():
    """`| head` closes what a run prints to; it goes on without."""
    program = "import sys; from recipes.prepare import say; [say('x' * 99) for _ in range(5000)]; "
    program += "print('went on', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "went on\n"
    assert process.wait() == 0

"""What goes wrong at the terminal ends in one sentence and a status, never in a traceback."""

import errno
import json
import os
import re
import subprocess
import sys

import ml_dtypes  # noqa: F401  numpy learns bfloat16
import pytest
import safetensors.numpy

from checkpoints_io import errors
from recipes import dpo
from recipes.configs import tiny
from recipes.training import checks, command, optimizer, settings
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


def test_a_model_that_does_not_fit_its_config(tmp_path, tiny_config):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (TINY / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    tiny_config.initialize_from_hf = str(folder)
    for change, told in {
        "model_type": ("bert", "the zoo has"),
        "hidden_act": ("gelu", "hidden_act"),
        "intermediate_size": (360, "misshapen"),
    }.items():
        value, sentence = told
        (folder / "config.json").write_text(json.dumps(config | {change: value}))
        with pytest.raises(errors.BadInput, match=sentence):
            dpo.train(tiny_config)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:1000].copy()
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    flags = TINY_CONFIG, f"--config.directory={tmp_path}/run"
    told = run(*flags, f"--config.initialize_from_hf={folder}")
    refused(told, "the tokenizer of another model")


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


def test_the_data_of_single_answers_is_looked_at_too(tmp_path):
    """By the same command; what is wrong is refused by the settings and layouts of that recipe."""
    page = tmp_path / "data.html"
    config = "--config=recipes/configs/tiny_sft.py"
    flags = [config, "--config.token_cache=None", f"--page={page}"]
    command = [sys.executable, "-m", "recipes.data", *flags]
    how = dict(cwd=ROOT, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr
    for told in ("read as conversation\n", "419 of 419 rows used", "    answer    ⟦"):
        assert told in done.stdout
    assert " answers from " in page.read_text()
    for flag, told in (
        ("--config.data.layout=hh", "is not one of conversation"),
        ("--config.bta=1", "has no setting 'bta'"),
        ("--config.beta=1", "the config has no loss"),
    ):
        refused(subprocess.run([*command, flag], **how), told, status=2)


def test_the_data_of_a_run_without_a_directory_into_a_pipe_that_closes(tmp_path):
    closed = subprocess.run(
        f"{sys.executable} -m recipes.data --config=recipes/configs/llama8b.py "
        f"--config.tokenizer={TINY}/model --config.train_data={TINY}/train.jsonl "
        f"--page={tmp_path}/data.html | head -1",
        cwd=ROOT, shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert closed.stdout.startswith("train: ")
    assert closed.stderr == ""


def test_a_program_that_writes_nothing_needs_no_directory(tmp_path):
    """Neither in the config nor by a flag; one that writes does."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from recipes.configs import tiny\n\n\ndef get_config():\n"
        "    config = tiny.get_config()\n    del config.directory\n    return config\n"
    )
    for flags in ([f"--config={file}"], [TINY_CONFIG, "--config.directory=None"]):
        given = command._read(settings.DPO, ["", *flags], writes=False)
        checks.checked(given.config, settings.ALL)  # as the program does again
    with pytest.raises(SystemExit):
        command._read(settings.DPO, ["", f"--config={file}"], writes=True)


@pytest.mark.parametrize(
    ("flags", "held_out", "split"),
    [
        (["--config.train_data=my.jsonl"], {}, 0.1),
        (["--config.train_data=/data/of mine"], {}, 0.1),
        (["--config.train_data=my.jsonl", "--config.validation_texts.wiki=a.txt"], {}, 0.1),
        (["--config.train_data=recipes/tiny/other.jsonl"],
         {"heldout": "recipes/tiny/heldout.jsonl"}, None),
        (["--config.train_data=my.jsonl", "--config.validation.mine=a.jsonl"],
         {"mine": "a.jsonl"}, None),
        (["--config.train_data=my.jsonl",
          "--config.validation.heldout=recipes/tiny/heldout.jsonl"],
         {"heldout": "recipes/tiny/heldout.jsonl"}, None),
        (["--config.train_data=my.jsonl", "--config.validation_split_fraction=0.2"], {}, 0.2),
        (["--config.train_data=my.jsonl", "--config.validation_split_fraction=None"], {}, None),
        (["--config.train_data={'a': 'my.jsonl', 'b': {'path': 'b/c.jsonl'}}"], {}, 0.1),
        (["--config.train_data={'a': 'my.jsonl', 'b': {'path': 'recipes/tiny/train.jsonl'}}"],
         {"heldout": "recipes/tiny/heldout.jsonl"}, None),
        (["--config.train_data=my.jsonl", "--config.validation_split_fraction=0.2",
          "--config.validation=None"], None, 0.2),
        (["--config.beta=1"], {"heldout": "recipes/tiny/heldout.jsonl"}, None),
    ],
)  # fmt: skip
def test_held_out_data_stays_with_the_data_it_is_of(flags, held_out, split):
    """One flag is enough for data of one's own: it is evaluated on some of it, and that is said."""
    given = command._read(settings.DPO, ["", TINY_CONFIG, *flags], writes=True)
    values = checks.checked(given.config, settings.ALL)
    assert (values["validation"], values["validation_split_fraction"]) == (held_out, split)
    assert bool(given.note) == (held_out in ({}, {"mine": "a.jsonl"}))
    if given.note:
        assert "(heldout) belongs to other data and is left out" in given.note
        assert (f"; {split or 0:.0%} of the prompts are held out" in given.note) == bool(split)
    elsewhere = command._read(
        settings.DPO,
        ["", "--config=recipes/configs/llama8b.py", "--config.directory=a", *flags], writes=True,
    )  # fmt: skip
    assert not elsewhere.note


def test_settings_can_be_unset(tmp_path):
    """llama8b by epochs: as far as the directory, which is a file."""
    (tmp_path / "file").write_text("")
    result = run(
        "--config=recipes/configs/llama8b.py", "--config.num_train_steps=None",
        "--config.num_epochs=1", "--config.cooldown=None", f"--config.directory={tmp_path}/file",
    )  # fmt: skip
    refused(result, "cannot be used")


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (None, 0), (False, 75)])
def test_the_exit_status_says_whether_there_is_more_to_do(finished, status):
    config = tiny.get_config()
    config.compile_cache = None
    assert command._with_config(lambda _: finished, config, settings.ALL) == status


LOADING = """
import signal
from recipes.training import command, settings
command.answer(settings.DPO)
signal.raise_signal(signal.SIGTERM)  # while the other imports load
"""


def test_a_run_that_is_asked_to_stop_before_it_begins_has_more_to_do():
    asked = [sys.executable, "-c", LOADING, TINY_CONFIG]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")


@pytest.mark.parametrize("groups", [settings.DPO, settings.SFT], ids=["dpo", "sft"])
def test_out_of_memory_names_what_to_turn_down(groups, capsys):
    def train(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    with pytest.raises(SystemExit) as status:
        command._with_config(train, tiny.get_config(), settings.table_of(groups))
    assert status.value.code == 1
    told = capsys.readouterr().err
    assert "per_device_parallelism" in told and "--config.remat=full" in told
    assert ("reference_mode" in told) == (groups is settings.DPO)


def test_a_config_that_names_no_compile_cache_has_the_one_of_the_table(monkeypatch):
    import jax

    config, given = tiny.get_config(), {}
    del config.compile_cache
    monkeypatch.setattr(jax.config, "update", given.__setitem__)
    command._with_config(lambda _: None, config, settings.ALL)
    assert given["jax_compilation_cache_dir"].endswith("/.cache/nnx-zoo/compiled")
    assert given["jax_persistent_cache_min_compile_time_secs"] == 0
    config.compile_cache = None
    given.clear()
    command._with_config(lambda _: None, config, settings.ALL)
    assert given == {}


@pytest.mark.parametrize("flag", ["", "--help"], ids=["run", "help"])
def test_a_config_file_is_executed_once(tmp_path, flag):
    """As far as the directory, which is a file."""
    (tmp_path / "file").write_text("")
    config = tmp_path / "mine.py"
    config.write_text(
        f"from recipes.configs import tiny\n\nwith open({str(tmp_path / 'runs')!r}, 'a') as file:\n"
        "    file.write('executed\\n')\n\n\ndef get_config():\n    return tiny.get_config()\n"
    )
    flags = [f"--config={config}", f"--config.directory={tmp_path}/file", flag]
    result = run(*filter(None, flags))
    if flag:
        assert result.returncode == 0
    else:
        refused(result, "cannot be used")
    assert (tmp_path / "runs").read_text() == "executed\n"


# Runs a program as `__main__`, and prints what it imported to do so.
IMPORTS = """
import json, runpy, sys

program, sys.argv = sys.argv[1], sys.argv[1:]
try:
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
except SystemExit as stopped:
    status = stopped.code
print(json.dumps([status, sorted({name.split(".")[0] for name in sys.modules})]))
"""
SLOW = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "datasets", "transformers", "torch",
        "pyarrow", "jaxtyping", "zoo"}  # fmt: skip


def imports_of(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, program, *arguments], cwd=ROOT, capture_output=True,
        text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    status, modules = json.loads(done.stdout.splitlines()[-1])
    return status, set(modules), done.stdout, done.stderr


@pytest.mark.parametrize("program", ["recipes/dpo.py", "recipes/forecast.py", "recipes.data"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([TINY_CONFIG, "--config.betta=2"], "did you mean beta?"),
        ([TINY_CONFIG, "--config.beta=0"], "beta must be above 0"),
        ([TINY_CONFIG, "--config.remat=most"], "remat='most' is not one of full"),
        ([TINY_CONFIG, "--learning_rate=1"], "write --config.learning_rate=1"),
        (["--config.beta=1"], "give a config"),
    ],
    ids=["name", "value", "choice", "flag", "none"],
)
def test_a_wrong_flag_is_answered_before_anything_slow_is_imported(program, words, told):
    status, modules, _, sentence = imports_of(program, *words)
    assert (status, sentence.count("error: ")) == (2, 1)
    assert told in sentence
    assert not modules & SLOW


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([TINY_CONFIG, "--config.betta=2"], "did you mean beta?"),
        ([TINY_CONFIG, "--config.learning_rate=1"], "has no effect: scoring trains nothing"),
        ([TINY_CONFIG, "--config.adapter={'rank': 8}"], "--config.adapter.rank has no effect"),
        ([TINY_CONFIG], "policy and reference are both recipes/tiny/model, so every reward"),
        ([TINY_CONFIG, "--config.reference_is_hf=false"], "newest checkpoint of another run"),
        ([TINY_CONFIG, "--config.reference_model_path=recipes/tiny/model"], "every reward"),
        ([TINY_CONFIG, "--config.reference_model_path=x", "--config.frozen=nf4"],
         "--config.frozen=nf4 only applies to weights under adapters"),
        ([TINY_CONFIG, "--config.validation.train=a.jsonl"], "could not be told apart"),
        (["--config=recipes/configs/tiny_sft.py"], "the config has no beta"),
        ([], "give a config, for example --config=recipes/configs/tiny.py"),
    ],
    ids=["name", "training", "group", "same", "run", "path", "frozen", "alike", "sft", "none"],
)  # fmt: skip
def test_of_scores_too(words, told):
    status, modules, _, sentence = imports_of("recipes/score.py", *words)
    assert (status, sentence.count("error: ")) == (2, 1)
    assert told in sentence
    assert not modules & SLOW


PROGRAMS = [
    ("recipes/dpo.py", settings.DPO), ("recipes/forecast.py", settings.DPO),
    ("recipes.data", settings.DPO), ("recipes.data", settings.SFT),
    ("recipes/sft.py", settings.SFT), ("recipes/score.py", settings.SCORE),
]  # fmt: skip


@pytest.mark.parametrize(("program", "groups"), PROGRAMS)
def test_help_too_and_it_has_the_values_of_the_config(program, groups):
    """With the settings in the order of the table, under the titles of their groups."""
    config = "--config=recipes/configs/tiny_sft.py" if groups is settings.SFT else TINY_CONFIG
    flags = [config, "--config.data.max_malformed_fraction=0.25", "--help"]
    status, modules, told, _ = imports_of(program, *flags)
    assert status == 0
    assert not modules & SLOW
    named = re.findall(r"^  --config\.(\S+?)=(.*)$", told, re.MULTILINE)
    assert [name for name, _ in named] == list(settings.table_of(groups))
    values = dict(named)
    assert (values["data.max_malformed_fraction"], values["train_seq_len"]) == ("0.25", "256")
    assert values["directory"] == f"runs/{config.split('/')[-1].removesuffix('.py')}"
    assert values["validation"] == "{'heldout': 'recipes/tiny/heldout.jsonl'}"
    at = [told.index(f"\n{title}\n") for title in groups]
    assert at == sorted(at)
    data, packing = told.index("\nData\n"), told.index("\nPacking\n")
    assert data < told.index("--config.data.max_malformed_fraction=") < packing


def test_without_a_config_one_of_this_recipe_is_named(capsys):
    for groups, told in ((settings.DPO, "configs/tiny.py"), (settings.SFT, "configs/tiny_sft.py")):
        with pytest.raises(SystemExit):
            command._read(groups, [""], writes=True)
        assert f"for example --config=recipes/{told}\n" in capsys.readouterr().err


def test_help_without_a_config_has_the_defaults():
    _, _, told, _ = imports_of("recipes/dpo.py", "-h")
    assert "\n  --config.beta=\n" in told  # which is required
    assert "\n  --config.lr_schedule=linear\n" in told
    assert "\n  --config.cooldown=None\n" in told


def test_a_bug_keeps_its_traceback(monkeypatch):
    """A ValueError of Python's own is a bug, not a sentence."""
    with pytest.raises(ValueError, match="cannot convert float NaN"):
        command._with_config(
            lambda _: optimizer.as_steps(float("nan"), 10), tiny.get_config(), settings.ALL
        )


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
            command._with_config(train, config, settings.ALL)
        assert stopped.value.code == 1
        assert f"the disk is full ({told}" in capsys.readouterr().err.replace("[Errno 28] ", "")


def test_a_reader_who_has_seen_enough_ends_no_run():
    """`| head` closes what a run prints to; it goes on without."""
    program = (
        "import sys; from recipes.training.run import say; [say('x' * 99) for _ in range(5000)]; "
    )
    program += "print('went on', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "went on\n"
    assert process.wait() == 0

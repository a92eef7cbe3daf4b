"""Pipelines: what a step's result depends on, what is skipped, and a stop in the middle."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from checkpoints_io import places
from recipes import pipeline
from recipes.pipelines import steps
from recipes.training.command import MORE_TO_DO
from tests.conftest import ROOT, TINY

SFT = "recipes.sft --config=recipes/configs/tiny_sft.py"
DPO = "recipes.dpo --config=recipes/configs/tiny.py --config.initialize_from_hf={sft}"
OWN = "recipes.sample_pairs --model={dpo} --prompts=recipes/tiny/train.jsonl --judge=a:b"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def of(directory, **lines):
    found = {}
    for name, line in lines.items():
        found[name] = steps.of_line(name, line, found, str(directory))
    return found


def addresses(**lines):
    return {name: step.directory.address for name, step in of("runs", **lines).items()}


def test_a_step_is_kept_by_what_its_result_depends_on():
    before = addresses(sft=SFT, dpo=DPO, own=OWN)
    assert os.path.basename(before["sft"]).startswith("sft-")
    same = addresses(sft=f"{SFT} --config.name=other --config.steps_per_log=1", dpo=DPO, own=OWN)
    assert same == before  # no figure depends on those
    defaults = addresses(sft=f"{SFT} --config.weight_decay=0.0", dpo=DPO, own=OWN)
    assert defaults == before  # what it was already
    other = addresses(sft=f"{SFT} --config.learning_rate=1e-3", dpo=DPO, own=OWN)
    assert all(other[name] != before[name] for name in before)
    later = addresses(sft=SFT, dpo=f"{DPO} --config.beta=0.2", own=OWN)
    assert later["sft"] == before["sft"]
    assert all(later[name] != before[name] for name in ("dpo", "own"))
    last = addresses(sft=SFT, dpo=DPO, own=f"{OWN} --answers=3")
    assert {name: last[name] == before[name] for name in last} == {
        "sft": True, "dpo": True, "own": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "flag",
    ["hf_save_dtype=float32", "hf_text_only=true", "keep_best=heldout/loss",
     "stop_when=heldout/loss", "adapter.export=merged"],
)  # fmt: skip
def test_a_step_is_kept_by_what_its_export_depends_on(flag):
    lora = f"{SFT} --config.adapter.rank=4"
    before, after = (addresses(sft=line) for line in (lora, f"{lora} --config.{flag}"))
    assert before != after
    often = addresses(sft=f"{lora} --config.{flag} --config.steps_per_eval=7")
    assert (often != after) == ("loss" in flag)  # where a figure chooses what is exported


def test_adapters_are_named_as_adapters():
    lora = f"{SFT} --config.adapter.rank=4"
    merged = of("runs", sft=f"{lora} --config.adapter.export=merged", dpo=DPO)
    beside = DPO.replace("initialize_from_hf", "adapter.path")
    assert [*merged, *of("runs", sft=lora, dpo=beside)] == ["sft", "dpo"] * 2


@pytest.mark.parametrize(("status", "told"), [(-15, False), (MORE_TO_DO, False), (0, False)])
def test_a_pipeline_that_is_asked_to_stop_has_more_to_do(tmp_path, monkeypatch, status, told):
    """Whatever the program under way makes of it, and also between two of them."""

    def status_of(program, words, asked):
        started.append(program)
        os.kill(os.getpid(), signal.SIGTERM)
        return status

    started = []
    monkeypatch.setattr(pipeline, "_status_of", status_of)
    known = of(tmp_path, sft=SFT, page="recipes.report {sft.run}")
    assert pipeline.run(known, []) is told
    assert started == ["recipes.sft"]
    assert known["sft"].directory.exists("done.txt") == (status == 0)


def test_data_is_known_by_its_contents(tmp_path):
    rows = (TINY / "train.jsonl").read_text().splitlines()[:20]
    file = tmp_path / "pairs.jsonl"
    lines = dict(
        sft=f"{SFT} --config.train_data={file}",
        own=f"recipes.sample_pairs --model=a --prompts={file} --judge=a:b",
    )
    file.write_text("\n".join(rows))
    before = addresses(**lines)
    os.utime(file, (1, 1))
    assert addresses(**lines) == before
    file.write_text("\n".join(rows[1:]))
    after = addresses(**lines)
    assert all(after[name] != before[name] for name in lines)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (dict(a="python train.py"), "step a begins with 'python': give one of recipes.data, "),
        (dict(a=""), "step a begins with ''"),
        (dict(dpo=DPO), "the step dpo names {sft}, which is not an earlier step"),
        (dict(sft=SFT, a="recipes.measure --model={sft}", b="recipes.measure --model={a}"),
         r"recipes.measure produces nothing that a program reads; {a.run} is its directory"),
        (dict(sft=f"{SFT} --config.lr=1"), "did you mean learning_rate"),
        (dict(sft=f"{SFT} --config.steps_per_hf_export=-1", dpo=DPO),
         "step dpo names {sft}, which exports nothing: leave out"),
        (dict(sft=f"{SFT} --config.adapter.rank=4", dpo=DPO),
         "{sft} as --config.initialize_from_hf, but that step exports adapters: set"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_run_is_refused_before_the_first_step(lines, told):
    with pytest.raises(ValueError, match=told):
        of("runs", **lines)


def test_a_file_without_steps_is_refused(tmp_path):
    file = tmp_path / "steps.py"
    file.write_text("def get_steps():\n    return ['a']\n")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_steps():\n    return 1 / 0\n")
    for path, told in (
        (file, "no get_steps"),
        (tmp_path / "b.py", "there is no file"),
        (broken, "broken.py, line 2: ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=told):
            steps.read(str(path), "runs")
    assert [*steps.read("recipes/pipelines/tiny.py", "runs")] == [
        "data", "sft", "dpo", "own", "again", "page",
    ]  # fmt: skip


def test_what_is_done_is_skipped(tmp_path, monkeypatch, capsys):
    """Each step is given what those before it have made."""
    known = of(tmp_path, sft=SFT, dpo=DPO, own=OWN, page="recipes.report {sft.run} {dpo.run}")
    started, statuses = [], {"recipes.dpo": [MORE_TO_DO, 1, 0]}

    def status_of(program, words, asked):
        started.append((program, words))
        status = statuses.get(program, [0]).pop(0) if program in statuses else 0
        if not status and program in pipeline.TAGGED:
            name = {"recipes.sft": "sft", "recipes.dpo": "dpo"}[program]
            known[name].directory.write_whole("result.json", b'{"model": "hf/step-40"}')
        return status

    monkeypatch.setattr(pipeline, "_status_of", status_of)
    assert not pipeline.run(known, ["mine"])
    with pytest.raises(RuntimeError, match="the step dpo ended with status 1"):
        pipeline.run(known, ["mine"])
    assert pipeline.run(known, ["mine"])
    sft, dpo = (known[name].directory.address for name in ("sft", "dpo"))
    words = ["--config=recipes/configs/tiny.py", f"--config.initialize_from_hf={sft}/hf/step-40"]
    words += [f"--config.directory={dpo}", "--config.tags=mine,dpo"]
    assert [program for program, _ in started] == [
        "recipes.sft", *["recipes.dpo"] * 3, "recipes.sample_pairs", "recipes.report",
    ]  # fmt: skip
    assert all(started[i] == ("recipes.dpo", words) for i in (1, 2, 3))
    assert started[4][1][0] == f"--model={dpo}/hf/step-40"
    assert started[5][1] == [sft, dpo, f"--page={known['page'].directory}/report.html"]
    capsys.readouterr()
    assert pipeline.run(known, [])
    told = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in told] == [f"{name}: already done" for name in known]
    assert len(started) == 6


def test_a_run_without_an_export_has_made_nothing(tmp_path):
    with pytest.raises(ValueError, match="has no export for the next step to read"):
        steps.last_export(places.at(str(tmp_path)))


SHORT = """
def get_steps():
    return {
        "sft": "recipes.sft --config=recipes/configs/tiny_sft.py --config.num_train_steps=4",
        "dpo": "recipes.dpo --config=recipes/configs/tiny.py --config.initialize_from_hf={sft} "
        "--config.num_train_steps=12 --config.sample_tokens=0",
        "scores": "recipes.score --config=recipes/configs/tiny.py "
        "--config.initialize_from_hf={dpo} --config.reference_model_path={sft}",
    }
"""


@pytest.mark.full
def test_a_stop_in_the_middle_changes_nothing(tmp_path):
    (tmp_path / "steps.py").write_text(SHORT)

    def started(directory):
        words = [f"--config={tmp_path}/steps.py", f"--directory={tmp_path}/{directory}"]
        program = [sys.executable, "recipes/pipeline.py", *words]
        return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def only(directory, pattern):
        (found,) = (tmp_path / directory).glob(pattern)
        return found

    whole = started("whole")
    whole.communicate()
    assert whole.returncode == 0
    stopped = started("stopped")
    while not any(records(path) for path in (tmp_path / "stopped").glob("dpo-*/metrics.jsonl")):
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate()
    assert stopped.returncode == MORE_TO_DO
    again = started("stopped")
    told, _ = again.communicate()
    assert again.returncode == 0
    assert "sft: already done, skipped" in told
    for pattern in ("scores-*/scores.jsonl", "dpo-*/hf/step-12/model.safetensors"):
        assert only("whole", pattern).read_bytes() == only("stopped", pattern).read_bytes()


def records(path: pathlib.Path) -> list[dict]:
    lines = path.read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["step"] >= 2]

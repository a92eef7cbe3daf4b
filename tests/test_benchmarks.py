"""The comparison's own program runs, on work too small to say anything."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    code = (
        "import pathlib, sys, work; folder = pathlib.Path(sys.argv[1]); "
        "work.write_model(folder / 'tiny', 'tiny', 500); "
        "work.write_pairs(folder / 'pairs.jsonl', 32, vocabulary=500)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT / "benchmarks", check=True)
    return folder


def ours(folder, *flags):
    told = subprocess.run(
        [sys.executable, "ours.py", f"--folder={folder}", "--size=tiny", "--steps=2", *flags],
        cwd=ROOT / "benchmarks", capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.full
def test_every_way_to_the_same_losses(work):
    plain = ours(work)
    assert plain["losses"][0] == pytest.approx(0.693147, abs=1e-5)
    for flags in (["--cached"], ["--separate"]):
        assert ours(work, *flags)["losses"] == pytest.approx(plain["losses"], abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [
        ["--shape=tiny"],
        ["--shape=tiny-experts", "--rank=4", "--frozen=nf4", "--resident"],
        ["--shape=tiny-recurrence", "--rank=4", "--frozen=int8"],
    ],
)
def test_an_accelerator_is_measured_by_its_shapes(flags):
    told = subprocess.run(
        [sys.executable, "accelerator.py", "--updates=3", "--each=8", *flags],
        cwd=ROOT / "benchmarks", capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["losses"][0] == pytest.approx(0.693147, abs=1e-4)
    assert found["tokens_per_second"] > 0


@pytest.mark.full
def test_tokenisation_is_compared(tmp_path):
    rows = [{"prompt": "a?", "chosen": f"b {i}", "rejected": "c"} for i in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    told = subprocess.run(
        [sys.executable, "tokenisation.py", f"--tokenizer={ROOT}/recipes/tiny/model",
         f"--rows={tmp_path}/rows.json", "--rounds=1", "--update=4"],
        cwd=ROOT / "benchmarks", capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.count("rows.json") == 2


@pytest.mark.full
def test_tasks_are_asked_of_both(tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    told = subprocess.run(
        [sys.executable, "harness.py", f"--model={ROOT}/recipes/tiny/model", "--questions=4",
         f"--pairs={ROOT}/recipes/tiny/heldout.jsonl"],
        cwd=ROOT / "benchmarks", capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    found = [json.loads(line) for line in told.stdout.splitlines()]
    asked = [(one.pop("task"), one.pop("side"), one.pop("CPU s") > 0) for one in found]
    names = ["choice", "cloze", "text", "rolling", "chat"]
    assert asked == [(name, side, True) for name in names for side in ("ours", "hf")]
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# Parts of others, programs of peers, and what needs an accelerator, a server or data of its own.
APART = {
    "accelerator", "everything", "harness_tasks", "measure", "ours", "pairs_as_ids", "peer_trl",
    "peer_tunix", "published", "ranked", "real_pairs", "vllm_serves", "where", "work",
}  # fmt: skip


@pytest.mark.full
def test_one_command_measures_and_tells_what_it_skips(tmp_path):
    told = subprocess.run(
        [sys.executable, ROOT / "benchmarks/everything.py", f"--folder={tmp_path}",
         "--only=machine,sampling"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert "sampling: skipped, for there is no --model" in told.stdout
    assert "python benchmarks/peak.py" in (tmp_path / "all.md").read_text()
    told = subprocess.run(
        [sys.executable, ROOT / "benchmarks/everything.py", f"--folder={tmp_path}",
         "--only=sampling", f"--model={tmp_path}/no where"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 1
    assert "no where" in told.stdout and "ended with an error: sampling" in told.stderr
    assert not (tmp_path / "sampling.txt").exists()


def test_one_command_measures_everything():
    code = "import everything as e; [print(run.command.split('.')[0]) for run in e.RUNS.values()]"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True
    )
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert {*told.stdout.split()} == programs - APART

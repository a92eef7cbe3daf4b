"""Long forms, run with `-m full`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import ROOT, TINY

pytestmark = pytest.mark.full


def test_the_embedded_files_are_made_by_their_scripts(tmp_path):
    """The pairs byte for byte; the weights as closely as another machine's arithmetic allows."""
    before = {name: (TINY / f"{name}.jsonl").read_bytes() for name in ("train", "heldout")}
    subprocess.run([sys.executable, "recipes/tiny/make_pairs.py"], cwd=ROOT, check=True)
    for name, content in before.items():
        assert (TINY / f"{name}.jsonl").read_bytes() == content
    folder = tmp_path / "model"
    command = [sys.executable, "recipes/tiny/make_model.py", f"--folder={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    for path in (TINY / "model").iterdir():
        if path.suffix != ".safetensors":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    made, kept = (
        safetensors.numpy.load_file(f / "model.safetensors") for f in (folder, TINY / "model")
    )
    assert made.keys() == kept.keys()
    for name in made:
        apart = np.abs(made[name].astype(np.float32) - kept[name].astype(np.float32)).mean()
        assert apart < 0.02, name


def test_real_pairs_are_learnt(shared):
    """Three seeds on a real, trained model: held-out loss and accuracy at the last step."""
    data = shared / "data"
    told = subprocess.run(
        [
            sys.executable,
            "benchmarks/real_pairs.py",
            f"--pairs={data}/preference/llms-from-scratch/instruction-data-with-preference.json",
            f"--model={data}/weights/stories260K/hf",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    means = dict(
        (line.split()[0], float(line.split()[2])) for line in told.splitlines() if " mean " in line
    )
    print(json.dumps(means))
    assert means["dpo_loss"] <= 0.43
    assert means["dpo_accuracy"] >= 0.82

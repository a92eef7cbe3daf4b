"""A wheel holds all that an installed project needs, and runs the recipe far from a clone."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from recipes import tiny
from recipes.training import command, overrides, settings
from tests.conftest import ROOT
from tests.test_structure import PACKAGES

# Asks the backend, without building: it would write beside the sources.
ASKED = """
import json, setuptools
built = setuptools.Distribution({"script_name": "setup.py"})
built.parse_config_files(["pyproject.toml"])
command = built.get_command_obj("build_py")
command.build_lib = "."
command.ensure_finalized()
print(json.dumps(command.get_outputs(include_bytecode=False)))
"""


def in_wheel(root):
    asked = [sys.executable, "-W", "ignore", "-c", ASKED]
    told = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True)
    return {name.removeprefix("./") for name in json.loads(told.stdout)}


def test_a_wheel_holds_every_file_of_the_packages():
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("this setuptools cannot read pyproject.toml")
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    kept = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and path.suffix != ".pyc"
    }
    assert in_wheel(ROOT) == kept
    assert {
        "recipes/configs/tiny.py", "recipes/pages/run_page.html.jinja",
        "recipes/tiny/train.jsonl", "recipes/tiny/model/model.safetensors",
    } <= kept  # fmt: skip


def test_the_small_run_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert tiny.path("model") == "recipes/tiny/model"
    monkeypatch.chdir(tmp_path)
    assert tiny.path("model") == str(ROOT / "recipes/tiny/model")
    flag = "--config=recipes/configs/tiny_sft.py"
    config, _ = overrides.read(["sft.py", flag], settings.table_of(settings.SFT))
    assert config.validation.heldout == str(ROOT / "recipes/tiny/heldout.jsonl")


@pytest.mark.parametrize(
    ("words", "groups", "writes", "taken"),
    [
        ([], settings.DPO, True, ["--config=recipes/configs/tiny.py"]),
        ([], settings.SFT, True, ["--config=recipes/configs/tiny_sft.py"]),
        (["--config.beta=1"], settings.DPO, True, ["--config.beta=1"]),  # a config is asked for
        ([], settings.DPO, False, []),  # trains nothing
        ([], settings.SCORE, True, []),
        ([], None, False, []),
    ],
)
def test_a_bare_command_that_trains_runs_what_is_shipped(
    words, groups, writes, taken, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
    command._take_the_shipped(groups, writes)
    assert sys.argv[1:] == taken
    assert ("no --config given" in capsys.readouterr().out) == (words != taken)


@pytest.mark.full
def test_a_wheel_runs_the_recipe_by_itself(tmp_path):
    sources, installed, away = (tmp_path / name for name in ("sources", "installed", "away"))
    sources.mkdir()
    away.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", sources],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    target = f"--target={installed}"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", target, wheel], check=True)
    shutil.rmtree(sources)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = [sys.executable, "-c", "import recipes; print(recipes.__file__)"]
    told = subprocess.run(where, cwd=away, env=environment, capture_output=True, text=True)
    assert told.stdout.startswith(str(installed))
    run = [sys.executable, "-m", "recipes.dpo"]
    ran = subprocess.run(run, cwd=away, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "this is the small run of --config=recipes/configs/tiny.py" in ran.stdout
    assert "-m recipes.dpo --config=recipes/configs/tiny.py" in ran.stdout  # the line to go on
    assert (away / "runs/tiny/report.html").is_file()
    assert (away / "runs/tiny/hf/step-60/model.safetensors").is_file()

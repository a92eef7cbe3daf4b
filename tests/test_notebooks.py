"""The notebooks run from top to bottom, and what the docs show in Python runs as it stands."""

import pathlib
import re
import runpy

import pytest

from tests.conftest import ROOT
from tests.long_forms import full_but

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize(
    "path",
    full_but(NOTEBOOKS, *(path for path in NOTEBOOKS if path.stem == "look_at_a_model")),
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path: pathlib.Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    if "import torch" in path.read_text():
        pytest.importorskip("torch")
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: drawn.append(True))
    runpy.run_path(str(path))
    told = capsys.readouterr().out
    assert len(told.splitlines()) > 5
    assert bool(drawn) == ("plt.show" in path.read_text())


@pytest.mark.full
@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.stem
)
def test_a_notebook_runs_as_in_jupyter(path: pathlib.Path, monkeypatch):
    """Cell by cell, in the folder of the notebook, which has no `__file__`."""
    pytest.importorskip("matplotlib").use("Agg")
    if "import torch" in path.read_text():
        pytest.importorskip("torch")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    monkeypatch.chdir(path.parent)
    run_cells(path.read_text())


def test_a_notebook_finds_its_model_in_jupyter(monkeypatch):
    """Its first cell of code, up to the first weight."""
    for path in (ROOT / "notebooks").glob("*.py"):
        monkeypatch.chdir(path.parent)
        code = path.read_text().split("\n# %%\n")[1]
        finding = re.search(r"^ROOT = .*\nFOLDER = .*$", code, re.MULTILINE)
        space = run_cells(f"import pathlib\nimport zoo\n{finding[0]}")
        assert (space["FOLDER"] / "config.json").is_file()


def run_cells(text):
    space = {"__name__": "__main__"}
    for cell in re.split(r"^# %%.*$", text, flags=re.MULTILINE):
        exec(compile(cell, "cell", "exec"), space)
    return space


SNIPPETS = [
    pytest.param(code, id=f"{path.stem}-{i}", marks=[pytest.mark.full] * (path.stem == "models"))
    for path in sorted((ROOT / "docs").glob("*.md"))
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S))
]


@pytest.mark.full
@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_of_the_docs_runs_as_it_stands(code, tmp_path, monkeypatch):
    """From a folder that is as the repository, and may be written to."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def test_generate_is_there_after_import_zoo():
    """And imports nothing more."""
    import zoo

    assert callable(zoo.generate.generate)

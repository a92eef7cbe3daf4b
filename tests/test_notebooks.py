"""The notebooks run from top to bottom."""

import pathlib
import runpy

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.stem
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

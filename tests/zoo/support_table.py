"""Measures every architecture as the tests do, and writes the table of docs/models.md.

  python -m tests.zoo.support_table [FAMILY …]

Needs torch. Real sizes are those of the config.json files in the folder of shared facts.
"""

import json
import pathlib
import re
import sys
import tempfile

import numpy as np

from recipes.data.packed.packing import Shape
from tests.conftest import ROOT, SHARED
from tests.recipes import test_families
from tests.zoo import test_architectures, test_fields, twins
import zoo

DOC = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: tests/zoo/support_table.py -->", "<!-- end of table -->"
HEAD = (
    "| family | `model_type` | real sizes read | shapes | logits | gradient | greedy | packed "
    "| window |\n|---|---|---|---|---|---|---|---|---|\n"
)


def name_of(family: str) -> str:
    """What the architecture's file begins with, up to its paper or a colon."""
    return re.split(r" \(|: ", str(zoo.ARCHITECTURES[family].__doc__))[0]


def row(family: str) -> str:
    shapes = list(twins.TWINS[family])
    logits = [test_architectures.logits_error(family, shape) for shape in shapes]
    assert all(error <= bound for error, bound in logits), family
    gradients = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as scratch:
            gradients.append(
                test_architectures.gradient_error(family, shape, pathlib.Path(scratch))
            )
        test_architectures.test_greedy_text_is_that_of_transformers(family, shape)
    model = twins.untrained(family, twins.RICHEST[family])
    alone = test_families.scores_alone(model)
    packed = max(
        np.abs(found[key] - alone[key]).max()
        for shape in (Shape(1, 256, 8, 2, 1), Shape(4, test_families.LONGEST, 8, 2, 4))
        for found in [test_families.scores(model, shape)]
        for key in alone
    )
    kinds = [name for name, module in zoo.ARCHITECTURES.items()
             if module is zoo.ARCHITECTURES[family]]  # fmt: skip
    has_window = hasattr(model.config, "sliding_window")
    some = has_window and hasattr(model.config, "layer_types")
    window = "by layer" if some else "every layer" if has_window else "–"
    cells = [
        name_of(family), ", ".join(f"`{kind}`" for kind in kinds), sizes(kinds), str(len(shapes)),
        f"{max(error for error, _ in logits):.0e}", f"{max(gradients):.0e}", "equal",
        f"{packed:.0e}", window,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def sizes(kinds: list[str]) -> str:
    found = set()
    for name, count in test_fields.CONFIGS.items():
        kind = json.loads((SHARED / "data" / "configs" / name).read_text())["model_type"]
        if kind in kinds and isinstance(count, int):
            found.add(count)
    told = [f"{n / 1e9:.1f}B" if n >= 9.995e8 else f"{n / 1e6:.0f}M" for n in sorted(found)]
    return ", ".join(dict.fromkeys(told)) or "–"


def main() -> None:
    measured = {family: row(family) for family in sys.argv[1:] or twins.TWINS}
    before, rest = DOC.read_text().split(BEGIN)
    old, after = rest.split(END)
    lines = [line.split(" | ") for line in old.splitlines() if "`" in line][1:]
    kept = {kind.strip("`"): line for line in lines for kind in line[1].split(", ")}
    again = lambda family: " | ".join([f"| {name_of(family)}", *kept[family][1:]]) + "\n"
    rows = [measured.get(family) or again(family) for family in twins.TWINS]
    DOC.write_text(f"{before}{BEGIN}\n{HEAD}{''.join(rows)}{END}{after}")


if __name__ == "__main__":
    main()

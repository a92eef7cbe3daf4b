"""Measures every architecture as the tests do, and writes the table of docs/models.md.

  python -m tests.zoo.support_table [FAMILY …]

Needs torch, and a minute a family, or a few on slow machines. Real sizes are those of the
config.json files in the folder of shared facts.
"""

import json
import pathlib
import re
import sys
import tempfile

from tests.conftest import ROOT, SHARED
from tests.recipes import test_families
from tests.zoo import test_architectures, test_fields, twins
import zoo
from zoo.parts import text_half

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
    packed = test_families.apart_by(model, *test_families.SHAPES)
    kinds = kinds_of(family)
    has_window = hasattr(model.config, "sliding_window")
    some = has_window and hasattr(model.config, "layer_types")
    window = "by layer" if some else "every layer" if has_window else "–"
    cells = [
        name_of(family), said(family), sizes(kinds), str(len(shapes)),
        f"{max(error for error, _ in logits):.0e}", f"{max(gradients):.0e}", "equal",
        f"{packed:.0e}", window,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def kinds_of(family: str) -> list[str]:
    """What a config.json calls it, and those of which it is the text half."""
    own = zoo.ARCHITECTURES[family]
    kinds = [name for name, module in zoo.ARCHITECTURES.items() if module is own]
    return kinds + [whole for whole, text in text_half.KINDS.items() if text in kinds]


def said(family: str) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds_of(family))


def sizes(kinds: list[str]) -> str:
    found = set()
    for name, count in test_fields.CONFIGS.items():
        kind = json.loads((SHARED / "data" / "configs" / name).read_text())["model_type"]
        if kind in kinds and isinstance(count, int):
            found.add(count)
    told = [f"{n / 1e9:.1f}B" if n >= 9.995e8 else f"{n / 1e6:.0f}M" for n in sorted(found)]
    return ", ".join(dict.fromkeys(told)) or "–"


def main() -> None:
    measured = {}
    for family in sys.argv[1:] or twins.TWINS:
        print(f"measuring {family}: {', '.join(twins.TWINS[family])}", flush=True)
        measured[family] = row(family)
    before, rest = DOC.read_text().split(BEGIN)
    old, after = rest.split(END)
    lines = [line.split(" | ") for line in old.splitlines() if "`" in line][1:]
    kept = {kind.strip("`"): line for line in lines for kind in line[1].split(", ")}
    first = lambda family: [f"| {name_of(family)}", said(family), sizes(kinds_of(family))]
    again = lambda family: " | ".join([*first(family), *kept[family][3:]]) + "\n"
    rows = [measured.get(family) or again(family) for family in twins.TWINS]
    DOC.write_text(f"{before}{BEGIN}\n{HEAD}{''.join(rows)}{END}{after}")


if __name__ == "__main__":
    main()

"""The tables of docs/coming_from.md, from those that `recipes.translate` goes by.

  python -m recipes.peers.listing

rewrites them.
"""

from collections.abc import Mapping
import pathlib

from recipes.peers import SOURCES
from recipes.peers.hf_trainer import ROWS
from recipes.peers.rows import Row

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "coming_from.md"
HEADING = "## From "


def markdown() -> str:
    """All tables; what transformers' Trainer has is in the first, once for all who have it."""
    tables = [_table("transformers' Trainer: TRL, LLaMA-Factory and some of axolotl", ROWS)]
    for source in SOURCES:
        own = {name: row for name, row in source.rows.items() if ROWS.get(name) is not row}
        tables.append(_table(f"{source.name}: `{source.command}`", own))
    return "\n".join(tables)


def _table(title: str, rows: Mapping[str, Row]) -> str:
    several: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():  # those of which the same is said stand together
        here = ", ".join(f"`{ours}`" for ours in row.ours.split(", "))
        here = here if row.ours else "*not needed*" if row.idle else "*none*"
        several.setdefault((here, row.says), []).append(f"`{name}`")
    told = lambda says: says.replace("|", "\\|").replace("*", "\\*")
    lines = [f"| {', '.join(names)} | {here} | {told(says)} |"
             for (here, says), names in several.items()]  # fmt: skip
    return "\n".join([f"{HEADING}{title}\n", "| there | here | |", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    before = DOCS.read_text("utf-8").partition(HEADING)[0].rstrip()
    DOCS.write_text(f"{before}\n\n{markdown()}", "utf-8")

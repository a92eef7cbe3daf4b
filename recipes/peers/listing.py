"""Generates the tables of docs/coming_from.md from those that `recipes.translate` uses.

  python -m recipes.peers.listing

rewrites them.
"""

from collections.abc import Mapping
import pathlib

from recipes.peers import SOURCES
from recipes.peers.hf_trainer import DEFAULTS, ROWS
from recipes.peers.rows import Row, Values
from recipes.training.listing import spelt
from recipes.training.settings import ALL, MUST

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "coming_from.md"
HEADING = "## From "


def markdown() -> str:
    """All tables; the settings of transformers' Trainer are in the first, once for all tools."""
    title = "transformers' Trainer: TRL, LLaMA-Factory and some of axolotl"
    tables = [_table(title, ROWS, DEFAULTS)]
    for source in SOURCES:
        own = {name: row for name, row in source.rows.items()
               if row is not ROWS.get(name)
               or _unset(name, row, source.defaults) != _unset(name, row, DEFAULTS)}  # fmt: skip
        tables.append(_table(f"{source.name}: `{source.command}`", own, source.defaults))
    return "\n".join(tables)


def _table(title: str, rows: Mapping[str, Row], defaults: Values) -> str:
    several: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():  # settings with the same text share a line
        here = ", ".join(f"`{ours}`" for ours in row.ours.split(", "))
        here = here if row.ours else "*not needed*" if row.idle else "*none*"
        says = "; ".join(filter(None, (row.says, _unset(name, row, defaults))))
        several.setdefault((here, says), []).append(f"`{name}`")
    told = lambda says: says.replace("|", "\\|").replace("*", "\\*")
    lines = [f"| {', '.join(names)} | {here} | {told(says)} |"
             for (here, says), names in several.items()]  # fmt: skip
    return "\n".join([f"{HEADING}{title}\n", "| there | here | |", "|---|---|---|", *lines, ""])


def _unset(name: str, row: Row, defaults: Values) -> str:
    """The default there and here of an unset setting, if they differ.

    It is '' for settings that must be named here.
    """
    if name not in defaults or row.turn is None or ALL[row.ours].default is MUST:
        return ""
    theirs, ours = row.turn(defaults[name]), ALL[row.ours].default
    return "" if theirs == ours else f"unset: {spelt(theirs)} there, {spelt(ours)} here"


if __name__ == "__main__":
    before = DOCS.read_text("utf-8").partition(HEADING)[0].rstrip()
    DOCS.write_text(f"{before}\n\n{markdown()}", "utf-8")

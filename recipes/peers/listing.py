"""The tables of docs/coming_from.md, from those that `recipes.translate` goes by.

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
    """All tables; what transformers' Trainer has is in the first, once for all who have it."""
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
    for name, row in rows.items():  # those of which the same is said stand together
        here = ", ".join(f"`{ours}`" for ours in row.ours.split(", "))
        here = here if row.ours else "*not needed*" if row.idle else "*none*"
        says = "; ".join(filter(None, (row.says, _unset(name, row, defaults))))
        several.setdefault((here, says), []).append(f"`{name}`")
    told = lambda says: says.replace("|", "\\|").replace("*", "\\*")
    lines = [f"| {', '.join(names)} | {here} | {told(says)} |"
             for (here, says), names in several.items()]  # fmt: skip
    return "\n".join([f"{HEADING}{title}\n", "| there | here | |", "|---|---|---|", *lines, ""])


def _unset(name: str, row: Row, defaults: Values) -> str:
    """What a file there means that does not name it, where a config here means something else.

    Nothing of what must be named here.
    """
    if name not in defaults or row.turn is None or ALL[row.ours].default is MUST:
        return ""
    theirs, ours = row.turn(defaults[name]), ALL[row.ours].default
    return "" if theirs == ours else f"unset: {spelt(theirs)} there, {spelt(ours)} here"


if __name__ == "__main__":
    before = DOCS.read_text("utf-8").partition(HEADING)[0].rstrip()
    DOCS.write_text(f"{before}\n\n{markdown()}", "utf-8")

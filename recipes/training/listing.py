"""The settings of a recipe as a person reads them: for `--help`, and for docs/dpo.md.

  python -m recipes.training.listing

writes the table at the end of docs/dpo.md again.
"""

import pathlib
import textwrap

from recipes.training.settings import DPO, MUST, Groups, Setting, Table

WIDTH = 100
DOCS = pathlib.Path(__file__).parent.parent / "docs" / "dpo.md"
HEADING = "## All settings\n"


def text(groups: Groups, values: dict[str, object]) -> str:
    """All settings in their groups, each as a flag with its value, and what it means."""
    lines = []
    for title, group in groups.items():
        lines += ["", title]
        for name, setting in group.items():
            value = values.get(name, setting.default)
            shown = "" if value is MUST else _spelt(value)
            lines.append(f"  --config.{name}={shown}")
            lines += textwrap.wrap(
                meaning(setting), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def taken(names: list[str], table: Table) -> str:
    """What settings mean that a config does not name, but for those that are unset by default."""
    default = {name: table[name].default for name in names}
    shown = [f"{name}={_spelt(x)}" for name, x in default.items() if x not in (None, (), {})]
    if not shown:
        return ""
    text = f"settings that the config does not name: {', '.join(shown)}"
    return "\n  ".join(textwrap.wrap(text, WIDTH - 2))


def markdown(groups: Groups) -> str:
    """The table of docs/dpo.md."""
    lines = [
        HEADING,
        "What a config file does not name has the value in brackets; *resume*: a resumed run may "
        "have another.",
    ]
    for title, group in groups.items():
        lines += ["", f"**{title}**", "", "| setting | meaning |", "|---|---|"]
        for name, setting in group.items():
            default = "" if setting.default is MUST else f" ({_spelt(setting.default)})"
            free = " *resume*" if setting.free else ""
            lines.append(f"| `{name}`{default}{free} | {_escaped(meaning(setting))} |")
    return "\n".join(lines) + "\n"


def meaning(setting: Setting) -> str:
    """What it says, may be, and means when it is unset, in one sentence."""
    parts = [setting.says]
    if setting.choices and not all(choice in setting.says for choice in setting.choices):
        parts.append(f"one of {', '.join(setting.choices)}")
    if setting.bound:
        parts.append(setting.bound.says)
    if setting.unset:
        parts.append(f"unset: {setting.unset}")
    return "; ".join(parts)


def _spelt(value: object) -> str:
    """As a flag takes it."""
    if isinstance(value, tuple | list):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _escaped(sentence: str) -> str:
    return sentence.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    before = DOCS.read_text("utf-8").partition(HEADING)[0].rstrip()
    DOCS.write_text(f"{before}\n\n{markdown(DPO)}", "utf-8")

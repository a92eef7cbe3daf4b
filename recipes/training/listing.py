"""The settings of a recipe as text, for `--help` and for docs/dpo.md.

  python -m recipes.training.listing

rewrites the table at the end of docs/dpo.md.
"""

import pathlib
import textwrap

from recipes.training.settings import DPO, MUST, Groups, Setting, Table

WIDTH = 100
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "dpo.md"
HEADING = "## All settings\n"


def text(groups: Groups, values: dict[str, object]) -> str:
    """All settings in their groups, each as a flag with its value, and what it means."""
    lines = []
    for title, group in groups.items():
        lines += ["", title]
        for name, setting in group.items():
            value = values.get(name, setting.default)
            shown = "" if value is MUST else spelt(value)
            lines.append(f"  --config.{name}={shown}")
            told = meaning(setting) + (" (a resume may change it)" if setting.free else "")
            lines += textwrap.wrap(told, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def taken(names: list[str], table: Table) -> str:
    """The settings that affect results but are not in the config, and how many others are not.

    Settings that a resume may change do not affect results.
    """
    if {"adapter.rank", "adapter.path"} <= set(names):  # neither is set: there are no adapters
        names = [name for name in names if not name.startswith("adapter.")]
    own = {name: table[name] for name in names if not table[name].free}
    shown = [f"{n}={spelt(x.default)}" for n, x in own.items() if x.default not in (None, (), {})]
    if not shown:
        return ""
    more = len(names) - len(shown)
    others = f"; {more} others are unset, or do not affect results (see --help with the config)"
    text = (
        f"settings not in the config, at their defaults: {', '.join(shown)}{others if more else ''}"
    )
    return "\n  ".join(textwrap.wrap(text, WIDTH - 2))


def markdown(groups: Groups) -> str:
    """The table of docs/dpo.md."""
    lines = [
        HEADING,
        "The value in brackets is the default; *resume*: a resumed run may change the setting.",
    ]
    for title, group in groups.items():
        lines += ["", f"**{title}**", "", "| setting | meaning |", "|---|---|"]
        for name, setting in group.items():
            default = "" if setting.default is MUST else f" ({spelt(setting.default)})"
            free = " *resume*" if setting.free else ""
            lines.append(f"| `{name}`{default}{free} | {_escaped(meaning(setting))} |")
    return "\n".join(lines) + "\n"


def meaning(setting: Setting) -> str:
    """What a setting does, which values it takes, and what unset means, in one sentence."""
    parts = [setting.says, *([MUST] if setting.default is MUST else [])]
    if setting.choices and not all(choice in setting.says for choice in setting.choices):
        parts.append(f"one of {', '.join(setting.choices)}")
    if setting.bound:
        parts.append(setting.bound.says)
    if setting.unset:
        parts.append(f"unset: {setting.unset}")
    return "; ".join(parts)


def spelt(value: object) -> str:
    """A value as it is written in a flag."""
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

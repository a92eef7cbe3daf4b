"""Writes a config file of this project, as text, from settings by name."""

from collections.abc import Collection, Mapping
import json
import math
import re
import textwrap

from recipes.training.by_name import nested
from recipes.training.settings import ALL, DPO, MUST

WIDTH = 100
BEGIN = '''"""{title}

  python -m recipes.dpo --config={file}

What is not named here has the default of `python recipes/dpo.py --help`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings that this run is about."""
    config = ml_collections.ConfigDict(type_safe=False)
'''


def text(
    settings: Mapping[str, object], title: str, file: str, defaults: Collection[str], whose: str
) -> str:
    """The text of the file: settings in the order of `--help`, without those at our defaults.

    A comment after those in `defaults` says whose default they are.
    """
    title, file = (re.sub(r'[\\"\n]', "_", one) for one in (title, file))  # within a docstring
    lines = [BEGIN.format(title="\n".join(textwrap.wrap(title, WIDTH - 3)), file=file).rstrip()]
    groups = [{name: settings[name] for name in group if name in said(settings)}
              for group in DPO.values()]  # fmt: skip
    for group in filter(None, groups):
        for name, value in nested(group).items():
            inner = [one for one in group if one == name or one.startswith(f"{name}.")]
            note = f"  # {whose}'s default" if {*inner} <= {*defaults} else ""
            lines.append(_line(name, value, inner != [name]) + note)
        lines.append("")
    return "\n".join([*lines, "    return config"]) + "\n"


def said(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that differ from their defaults, or must be named."""
    return {
        name: value
        for name, value in settings.items()
        if ALL[name].default is MUST or value != ALL[name].default
    }


def _line(name: str, value: object, is_group: bool) -> str:
    if is_group and isinstance(value, dict):
        inner = ", ".join(f"{key}={_spelt(one)}" for key, one in value.items())
        return f"    config.{name} = dict({inner})"
    line = f"    config.{name} = {_spelt(value)}"
    if len(line) <= WIDTH or not isinstance(value, dict):
        return line
    inner = [f"        {_spelt(key)}: {_spelt(one)}," for key, one in value.items()]
    return "\n".join([f"    config.{name} = {{", *inner, "    }"])


def _spelt(value: object) -> str:
    """A value as this project's configs spell it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_spelt(key)}: {_spelt(one)}' for key, one in value.items())}}}"
    if isinstance(value, tuple):
        inner = ", ".join(map(_spelt, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(_spelt, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value) if isinstance(value, int | float | None) else _spelt(str(value))

"""What to type instead of a flag that is wrong."""

import re

from absl import flags

from recipes.training import nearest
from recipes.training.settings import Table


def unknown(name: str, argv: list[str], table: Table) -> str:
    """What to type instead of an unknown flag."""
    value = next((a.partition("=")[2] for a in argv if a.lstrip("-").startswith(f"{name}=")), "…")
    if near := nearest.nearest(name, [*flags.FLAGS]):
        return f"there is no flag --{name} (did you mean --{near}?)"
    if not table:
        return f"there is no flag --{name}"
    if near := nearest.nearest(name, table):
        return f"there is no flag --{name}: write --config.{near}={value}"
    return f"there is no flag --{name}; settings are given as --config.NAME=VALUE"


def no_flag(word: str, table: Table) -> str:
    """What to type instead of a word that is not a flag."""
    bare = re.sub(r"^[-–—]+", "", word)  # word processors turn two hyphens into a dash
    name, equals, value = bare.partition("=")
    if name in flags.FLAGS:
        return f"{word!r} is not a flag: write --{bare}"
    if not table:
        return f"{word!r} is not a flag; only flags are accepted"
    if equals and (near := nearest.nearest(name.removeprefix("config."), table)):
        return f"{word!r} is not a flag: write --config.{near}={value}"
    return f"{word!r} is not a flag; settings are given as --config.NAME=VALUE"


def of_absl(error: flags.Error) -> str:
    """What absl says of a value, as other errors here are said."""
    told = str(error).strip().partition("\n")[0]
    kinds = {"invalid literal for int": "a whole number", "could not convert string": "a number"}
    for reason, kind in kinds.items():
        if wrong := re.fullmatch(rf"flag (--\w+)=(.*): {reason}.*", told):
            return f"{wrong[1]}={wrong[2]!r} is not {kind}"
    told = re.sub("is not a non-negative (integer|number)", r"is not \1 >= 0", told)
    if low := re.fullmatch(r"flag (--\w+=.*): .* is not (?:integer|number) >= (.*)", told):
        return f"{low[1]} must be at least {low[2]}"
    missing = re.fullmatch(r"flag (--\w+)=None: Flag .* must have a value other than None\.", told)
    return f"give {missing[1]}=…" if missing else told.removeprefix("ERROR:: ")

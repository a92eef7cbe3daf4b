"""A config of this project from a YAML file of TRL, axolotl, LLaMA-Factory or Levanter.

  python -m recipes.translate THEIRS.yaml
  python -m recipes.translate THEIRS.yaml --to=mine.py --devices=8

prints the config, or writes it to a file, and tells on stderr which of their settings have no
counterpart here, with what to do instead; which differ; and which are not needed.
docs/coming_from.md has all of them.
"""

from absl import flags

if __name__ == "__main__":  # a wrong flag is answered before the imports below
    from recipes.training import command

    flags.DEFINE_string("to", None, "The file to write; unset: print the config.")
    flags.DEFINE_integer("devices", 1, "Number of devices that an update was split over there.")

from collections.abc import Mapping, Sequence
import pathlib
import sys

import ml_collections
import yaml

from checkpoints_io.errors import BadInput, NotFound
from recipes import peers
from recipes.peers import config_file, rows
from recipes.preference import objectives
from recipes.training import by_name, checks, command, settings


def translate(words: Sequence[str], to: str | None, devices: int) -> None:
    """Prints the config that a file says, or writes it, and what is to be known about it.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it is of none of these trainers.
    """
    if len(words) != 1:
        raise BadInput("give one file: python -m recipes.translate THEIRS.yaml")
    if devices < 1:
        raise BadInput(f"--devices must be above 0, not {devices}")
    path, file = pathlib.Path(words[0]), read(words[0])
    text, told = translated(file, path.stem, path.name, to or "mine.py", devices)
    if to is None:
        print(text, end="")
    else:
        if not pathlib.Path(to).absolute().parent.is_dir():
            raise NotFound(f"--to={to}: there is no folder {pathlib.Path(to).parent}")
        if pathlib.Path(to).exists():
            raise BadInput(f"--to={to} already exists: give another name, or remove it")
        pathlib.Path(to).write_text(text, "utf-8")
    print(told, file=sys.stderr)


def read(name: str) -> dict[str, object]:
    """The settings in a YAML file.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it is not one of settings.
    """
    path = pathlib.Path(name)
    if not path.is_file():
        raise NotFound(f"there is no file {name}")
    try:
        file = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(file, dict) or not all(isinstance(key, str) for key in file):
        raise BadInput(f"{name} is not a file of settings: it has no keys")
    return file


def translated(
    file: Mapping[str, object], name: str, where: str, to: str, devices: int = 1
) -> tuple[str, str]:
    """The text of the config, and what is to be known about it.

    Raises:
      ValueError: it is of none of these trainers.
    """
    source = peers.recognised(file)
    if source is None:
        known = ", ".join(one.name for one in peers.SOURCES)
        raise BadInput(f"{where} belongs to no known trainer: {known}")
    try:
        found = rows.translated(source, file, devices)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise BadInput(f"{where} is not a valid file of {source.name}: {error!r}") from error
    ours = {"name": name, "directory": f"runs/{name}", "mp": "p=f32,c=bfloat16"} | {
        name: value for name, value in found.settings.items() if value is not None
    }
    title = f"What {where}, of `{source.command}`, says here."
    text = config_file.text(ours, title, to, found.defaults, source.name)
    return text, _told(found.notes, ours)


def refused(ours: Mapping[str, object]) -> str | None:
    """What the recipe would say of these settings before it reads anything; nothing: they pass."""
    try:
        config = ml_collections.ConfigDict(by_name.nested(dict(ours)), type_safe=False)
        objectives.objective(checks.checked(config, settings.table_of(settings.DPO)))
    except ValueError as error:
        return str(error)
    return None


def _told(notes: rows.Notes, ours: Mapping[str, object]) -> str:
    parts = {
        "no counterpart here": notes.lacking,
        "not quite the same": notes.differs,
        "not needed here": notes.idle,
    }
    lines = []
    for title, some in parts.items():
        if some:
            lines += [f"{title}:", *(f"  {name}: {says}" for name, says in some), ""]
    if why := refused(ours):
        lines += [f"fix this before you run it: {why}", ""]
    lines.append("check the result before training: python -m recipes.data --config=FILE")
    return "\n".join(lines)


if __name__ == "__main__":
    command.main_with_words(lambda words: translate(words, flags.FLAGS.to, flags.FLAGS.devices))

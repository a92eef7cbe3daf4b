"""Settings from a config file, and the flags that change them: `--config.NAME=VALUE`.

They replace ml_collections' own flags, which allow neither unset settings nor names that the user
chooses (`--config.validation.mine=b.jsonl`), and do not explain a value of the wrong kind.
"""

import ast
import contextlib
import json
import pathlib
import re
import runpy
import traceback
from typing import NamedTuple

import ml_collections

from checkpoints_io.errors import BadInput
from recipes.data.rows import source
from recipes.training import by_name
from recipes.training.nearest import did_you_mean
from recipes.training.settings import CHOSEN_NAME, KIND_NAMES, Table, may_be_unset, unread

FLAG = re.compile(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", re.DOTALL)
INSTALLED = pathlib.Path(__file__).parents[2]  # where `recipes` is
SPLIT = 0.1  # fraction of the prompts held out if the config's own held-out data does not fit
UNSET = ("None", "none", "null")
BOOLS = dict.fromkeys(("true", "t", "1", "yes"), True)
BOOLS |= dict.fromkeys(("false", "f", "0", "no"), False)


class Change(NamedTuple):
    """A flag that changes a setting."""

    name: str
    text: str | None  # None: the flag came without a value


class Opened(NamedTuple):
    """A config as its file gives it, and the flags."""

    config: ml_collections.ConfigDict
    path: str
    changes: list[Change]
    others: list[str]  # arguments that are not about the config

    @property
    def names(self) -> set[str]:
        """The settings that the file or a flag names."""
        return {*self.config, *(change.name for change in self.changes)}


def read(argv: list[str], table: Table) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config that `--config=FILE` names, changed by the flags; and the other arguments.

    The table gives the names and kinds of settings.

    Raises:
      ValueError: the file or a flag is wrong.
    """
    given = opened(argv, table)
    return changed(given, table), given.others


def opened(argv: list[str], table: Table) -> Opened:
    """Executes the file that `--config=FILE` names, and collects the flags.

    Raises:
      ValueError: the file is wrong, or none is given; then the message suggests one that has the
        table's settings.
    """
    path, changes, others = _sorted(argv)
    if not path:
        file = next((word for word in others[1:] if word.endswith(".py")), None)
        raise BadInput(
            f"{file!r} is not a flag: write --config={file}"
            if file
            else f"give a config, for example --config={by_name.example(table)}"
        )
    return Opened(_loaded(path), path, changes, others)


def changed(given: Opened, table: Table) -> ml_collections.ConfigDict:
    """The config, changed by the flags.

    Raises:
      ValueError: a name or value is not in the table.
    """
    config = given.config.unlock()
    for change in given.changes:
        _make(change, config, given.path, table)
    by_name.check_names(config, table)
    return config.lock()


def left_behind(given: Opened) -> list[str]:
    """Held-out sets that belong to the config's own data, if a flag names other data.

    They are those in the same folder as the file that the config trains on, unless the data that
    the flag names is there too, or a flag names that set, or all of them.
    """
    named = {change.name: change.text for change in given.changes}
    own, other = given.config.get("train_data"), named.get("train_data")
    sets = given.config.get("validation") or {}
    if "validation" in named or not isinstance(own, str) or not other:
        return []
    folder = own.rpartition("/")[0]
    within = lambda path: isinstance(path, str) and path.rpartition("/")[0] == folder
    if "/" not in own or any(map(within, _paths(other))):
        return []
    return [name for name, x in sets.items() if within(x) and f"validation.{name}" not in named]


def _paths(train_data: str) -> list[object]:
    """The paths in a flag's value, which is one source, or several by name."""
    if not train_data.lstrip().startswith("{"):
        return [train_data]
    sources = _literal("train_data", train_data)
    every = sources.values() if isinstance(sources, dict) else ()
    return [one.get("path") if isinstance(one, dict) else one for one in every]


def leave(config: ml_collections.ConfigDict, sets: list[str], given: Opened) -> None:
    """Removes held-out sets from the config.

    If none is left, some prompts are held out, unless a flag gives the fraction.
    """
    named = {change.name for change in given.changes}
    with config.unlocked(), config.ignore_type():
        for name in sets:
            del config.validation[name]
        if config.validation or "validation_split_fraction" in named:
            return
        if config.get("validation_split_fraction") is None:
            config.validation_split_fraction = SPLIT


def _sorted(argv: list[str]) -> tuple[str | None, list[Change], list[str]]:
    path, changes, others, left = None, [], [], list(argv)
    while left:
        arg = left.pop(0)
        found = FLAG.fullmatch(arg)
        if arg == "--":
            continue  # the spelling in ml_collections' documentation
        if not found or (found[1] and not found[2]):
            others.append(arg)
            continue
        negated, name, text = found.groups()
        if negated and text is not None:
            raise BadInput(f"{arg} takes no value: write --noconfig.{name}")
        if text is None and not negated and left and not re.match(r"--?[a-zA-Z]", left[0]):
            text = left.pop(0)
        if name is None:
            if path is not None:
                raise BadInput(f"two configs given, {path} and {text}: give only one")
            path = text or ""
        else:
            changes.append(Change(name, "false" if negated else text))
    return path, changes, others


def _loaded(path: str) -> ml_collections.ConfigDict:
    named, *argument = path.split(":", 1)
    shipped = named.startswith("recipes/configs/") and not pathlib.Path(named).is_file()
    file = str(INSTALLED / named) if shipped else named  # when run outside a clone
    if not pathlib.Path(file).is_file():
        raise BadInput(f"there is no config file {named!r}")
    config = called(file, "get_config", *argument)
    if not isinstance(config, ml_collections.ConfigDict):
        raise BadInput(
            f"{file} is not a config: it has no get_config() that returns a ConfigDict, as those "
            "in recipes/configs do (ml_collections.ConfigDict(dict(name=…, …)))"
        )
    return config


def called(file: str, name: str, *argument: str) -> object:
    """What a function of a user's file returns; None: it has no such function.

    Raises:
      ValueError: the file or the function raised an error; the message has its line.
    """
    try:
        function = runpy.run_path(file).get(name)
        return function(*argument) if function else None
    except (Exception, SystemExit) as error:  # a config is a program, and may fail like one
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        line, told = lines[-1] if lines else None, str(error).strip().partition("\n")[0]
        if isinstance(error, SyntaxError):
            line, told = error.lineno, error.msg
        where = file if line is None else f"{file}, line {line}"
        if field := re.match(r"Could not override field '(.+?)'", told):
            raise BadInput(
                f"{where}: {field[1]} is given a value of another type than before; start the "
                "config with ml_collections.ConfigDict(type_safe=False)"
            ) from error
        raise BadInput(f"{where}: {type(error).__name__}: {told}") from error


def _make(change: Change, config: ml_collections.ConfigDict, path: str, table: Table) -> None:
    name, text = change
    if kind := _kind(name, table):
        _put(name, _value(name, text, kind, table), config)
        return
    inside = [known for known in table if known.startswith(f"{name}.")]
    if name in unread(table):
        raise BadInput(f"--config.{name} has no effect: scoring trains nothing; leave it out")
    if not inside:
        raise BadInput(f"{path} has no setting {name!r}{did_you_mean(name, table)}")
    given = _literal(name, text) if text and text.lstrip().startswith("{") else None
    if not isinstance(given, dict):
        raise BadInput(
            f"--config.{name} is a group of settings, not a single one: {', '.join(inside)}"
        )
    for inner, value in given.items():
        text = value if isinstance(value, str) else repr(value)
        _make(Change(f"{name}.{inner}", text), config, path, table)


def _kind(name: str, table: Table) -> type | None:
    """The kind of value that a setting takes, or None; `object` means one or several sources."""
    if name in table:
        return table[name].kind
    if re.fullmatch(CHOSEN_NAME, name):
        return str if name.startswith("data.") else object
    of_source = re.fullmatch(rf"(?:{CHOSEN_NAME})\.(\w+)(\.\w+)?", name)
    if of_source is None:
        return None
    if of_source[2]:
        return str if of_source[1] == "columns" else None
    return {"path": str, "layout": str, "weight": float, "columns": dict}.get(of_source[1])


def _value(name: str, text: str | None, kind: type, table: Table) -> object:
    """The value of a setting of this kind, parsed from a text; None: unset."""
    flag = f"--config.{name}"
    if text is None:
        if kind is bool:
            return True
        raise BadInput(f"{flag} needs a value: {flag}=…")
    if text in UNSET and not (name in table and text in table[name].choices):
        if not may_be_unset(name, table):
            raise BadInput(f"{flag} cannot be unset")
        return None
    if not text.strip() and kind is not tuple:
        raise BadInput(f"{flag} has an empty value: give one after the =")
    if kind in (dict, object) and text.lstrip().startswith("{"):
        return _literal(name, text)
    if kind is tuple:
        return _texts(name, text)
    if name.endswith(".weight") and text == source.BY_ROWS:  # of a source
        return text
    try:
        if kind is bool:
            return BOOLS[text.lower()]
        return text if kind in (str, object) else kind(text)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{flag}={text!r} is not {KIND_NAMES[kind]}") from error


def _literal(name: str, text: str) -> object:
    """Parses a dict or list that is written in Python or JSON."""
    for parse in (ast.literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            given = parse(text)
            break
    else:
        given = None
    if _has_names(given):
        return given
    raise BadInput(
        f"--config.{name}={text!r} cannot be parsed: write it like \"{{'prompt': 'question'}}\", "
        "in double quotes for the shell"
    )


def _has_names(given: object) -> bool:
    """Whether every name in a value can be written in a flag."""
    if not isinstance(given, dict):
        return given is not None
    return all(
        isinstance(name, str)
        and re.fullmatch(r"[^.]+", name)
        and (value is None or _has_names(value))
        for name, value in given.items()
    )


def _texts(name: str, text: str) -> tuple[str, ...]:
    """Parses several texts, `a,b` or a list in Python's syntax; `(a|b)=1` is a single one."""
    if not re.match(r"\s*[(\[](.*['\"]|.*[)\]]\s*$)", text, re.DOTALL):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    given = _literal(name, text)
    given = given if isinstance(given, list | tuple) else [given]
    if not all(isinstance(each, str) for each in given):
        raise BadInput(f"--config.{name}={text!r} is not {KIND_NAMES[tuple]}")
    return tuple(given)


def _put(name: str, value: object, config: ml_collections.ConfigDict) -> None:
    *rooms, last = name.split(".")
    with config.ignore_type():
        room = config
        for place, inner in enumerate(rooms):
            there = room.get(inner)
            if isinstance(there, str):  # a source, all that was given so far
                if place == 0:
                    raise BadInput(
                        f"--config.{inner} is a single source, {there!r}; give several as "
                        f"--config.{inner}=\"{{'a': {{'path': 'a.jsonl', 'weight': 1.0}}, …}}\""
                    )
                there = {"path": there}
            if not isinstance(there, ml_collections.ConfigDict):
                room[inner] = ml_collections.ConfigDict(there, type_safe=False)
            room = room[inner]
        if value is None and re.fullmatch(CHOSEN_NAME, name):
            if last not in room:
                raise BadInput(f"--config.{name} cannot be unset: there is no {last!r}")
            del room[last]
        else:
            room[last] = value

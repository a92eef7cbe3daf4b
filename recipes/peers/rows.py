"""How a file of another trainer is read, with a row for each of its settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import fnmatch
from typing import Any, NamedTuple

from recipes.training.settings import ALL

Values = Mapping[str, Any]


class Lacks(Exception):
    """A value that has no counterpart here; the text says why, or what to do."""


class Row(NamedTuple):
    """A setting of another trainer."""

    ours: str = ""  # the setting here, or several ("a, b"); empty: there is none
    says: str = ""  # how they correspond; without a setting here, why, and what to do
    turn: Callable[..., object] | None = None  # its value -> ours; None: by `Source.made`
    differs: bool = False  # the user of the config must be told what it says
    idle: bool = False  # there is none here, and none is needed


class Given(NamedTuple):
    """A file of another trainer, flat: `trainer.mp` is mp of the group trainer."""

    values: Values  # including defaults for what it does not name
    named: frozenset[str]  # the settings that it names
    devices: int
    notes: "Notes"


class Notes(NamedTuple):
    """What the user is told about settings, each as its name and a sentence."""

    differs: list[tuple[str, str]]
    lacking: list[tuple[str, str]]
    idle: list[tuple[str, str]]


class Source(NamedTuple):
    """Another trainer, whose config files can be translated."""

    name: str
    command: str  # the command that takes such a file
    rows: Mapping[str, Row]  # by its names, where * matches any text
    defaults: Values  # what it takes for settings that a file does not name, where that matters
    made: Callable[[Given], dict[str, object]]  # settings here that are made of several there
    nulls: tuple[str, ...] = ()  # of `defaults`, what null turns off; elsewhere null is unset


class Translated(NamedTuple):
    """The contents of a file in settings of this project."""

    settings: dict[str, object]
    defaults: frozenset[str]  # those that come only from the other trainer's defaults
    notes: Notes


def same(ours: str, says: str = "", *, differs: bool = False) -> Row:
    """A row for a setting that is the same here, whatever it is called."""
    return Row(ours, says, lambda value: of_kind(ours, value), differs)


def turned(ours: str, turn: Callable[..., object], says: str = "", *, differs: bool = False) -> Row:
    """A row for a setting that is the same here, but written differently."""
    return Row(ours, says, turn, differs)


def part(ours: str, says: str = "") -> Row:
    """A row for one of several settings that together give ours."""
    return Row(ours, says)


def idle(says: str, *names: str) -> dict[str, Row]:
    """Rows for settings that are not needed here."""
    return dict.fromkeys(names, Row(says=says, idle=True))


def lacks(says: str, *names: str) -> dict[str, Row]:
    """Rows for settings that have no counterpart here."""
    return dict.fromkeys(names, Row(says=says))


def trained_on(sources: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> object:
    """Sources in the form of train_data: a path if that is enough, or several that are one list."""
    if len(sources) == 1 and sources[0].keys() == {"path"}:
        return sources[0]["path"]
    called = names or [f"part{i}" for i in range(1, len(sources) + 1)]
    weight = {"weight": "rows"} if len(sources) > 1 else {}
    return {name: weight | dict(one) for name, one in zip(called, sources, strict=True)}


def held_out(sources: Sequence[object], name: str) -> dict[str, object]:
    """Sources in the form of validation: a single one is called `name`, several are numbered."""
    if len(sources) == 1:
        return {name: sources[0]}
    return {f"{name}{i}": one for i, one in enumerate(sources, 1)}


def translated(source: Source, file: Values, devices: int) -> Translated:
    """The settings of a file, and what to tell the user about it."""
    every = dict(flat(file))
    named = {name: value for name, value in every.items() if value is not None}
    off = {name for name in source.nulls if name in every and every[name] is None}
    defaults = {name: value for name, value in source.defaults.items() if name not in off}
    notes = Notes([], [], [])
    given = Given({**defaults, **named}, frozenset(named), devices, notes)
    settings: dict[str, object] = {}
    for name, value in given.values.items():
        row = row_of(name, source.rows)
        if row is None and is_off(value):
            continue
        if row is None:
            notes.lacking.append((name, f"not a known setting of {source.name}"))
        elif row.turn:
            try:
                settings[row.ours] = row.turn(value)
            except Lacks as why:
                notes.lacking.append((f"{name}: {value}", str(why)))
            if row.differs and name in named:
                notes.differs.append((name, row.says))
        elif not row.ours and name in named and not is_off(value):
            (notes.idle if row.idle else notes.lacking).append((name, row.says))
    settings |= source.made(given)
    theirs = {
        ours
        for name in named
        if (row := row_of(name, source.rows))
        for ours in row.ours.split(", ")
    }
    return Translated(settings, frozenset(settings.keys() - theirs), notes)


def row_of(name: str, rows: Mapping[str, Row]) -> Row | None:
    """The row of a setting, found by its name or a pattern; None: it has none."""
    if name in rows:
        return rows[name]
    return next((rows[key] for key in rows if "*" in key and fnmatch.fnmatch(name, key)), None)


def flat(file: Values, prefix: str = "") -> Iterable[tuple[str, object]]:
    """The names and values in all groups, flattened; lists are left alone."""
    for name, value in file.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_off(value: object) -> bool:
    """Whether a value turns something off."""
    return value in (None, False, 0, "", "no", "none", "None", [], {})


def of_kind(ours: str, value: Any) -> object:
    """A value converted to the type of our setting: YAML reads 5e-7 as text."""
    kind = ALL[ours].kind
    if is_off(value) and ALL[ours].default is None and kind not in (int, float):
        return None
    try:
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind in (int, float):
            return kind(float(value))
    except (TypeError, ValueError) as error:
        what = "a whole number" if kind is int else "a number"
        raise Lacks(f"{ours} is {what}: set it by hand") from error
    if kind is tuple:
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    return str(value) if kind is str else value

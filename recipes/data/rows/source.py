"""Where rows come from: a source as a config names it, and several of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from checkpoints_io.errors import BadInput

Given = Any  # a value in a config: a string, or a dict of settings
SETTINGS = ("path", "weight", "layout", "columns")
BY_ROWS = "rows"  # a weight: the source's number of examples


class Source(NamedTuple):
    """A source of rows, and how their columns are read."""

    path: str  # a file, several by `*`, or a hub dataset
    layout: str | None = None  # None: recognised
    columns: tuple[tuple[str, str], ...] = ()  # our name, theirs
    guessed: bool = False  # the layout was recognised, so it must not leave a question unread
    single: bool = False  # rows hold one answer each, not two
    labelled: bool = False  # and whether it is wanted


class Weighted(NamedTuple):
    """A source of training data, and its share of the rows drawn, relative to the others'."""

    source: Source
    weight: float | None  # None: as many as it has


class Rows(NamedTuple):
    """What the loss needs each row to hold."""

    single: bool  # one answer, not two
    labelled: bool  # and whether it is wanted


class Common(NamedTuple):
    """The defaults for sources that do not say otherwise."""

    layout: str | None
    columns: Mapping[str, str]
    single: bool  # for all sources: one answer per row is wanted
    labelled: bool = False  # and whether it is wanted


# Losses of single answers, each of which is wanted or unwanted, by its label.
UNPAIRED = ("kto",)


def common(given: Mapping[str, Any], rows: Rows) -> Common:
    """The settings for all sources, whose rows hold what the loss needs."""
    return Common(given["data.layout"], given["data.columns"] or {}, *rows)


def names_column(given: Mapping[str, object], rows: Rows, name: str) -> bool:
    """Whether the settings say, for any source, which column is our `name`."""
    of_all = common(given, rows)
    sources = [one.source for one in training(given["train_data"], of_all).values()]
    of_held_out = held_out(given["validation"]).items()
    sources += [parsed(f"validation.{name}", one, of_all) for name, one in of_held_out]
    return any(name in dict(one.columns) for one in sources)


def training(given: Given, common: Common) -> dict[str, Weighted]:
    """The sources of `train_data` by name; a plain string is one source, named `train`.

    Raises:
      ValueError: a source has something that is not a setting, or lacks what it needs.
    """
    if isinstance(given, str):
        return {"train": Weighted(parsed("train_data", given, common), 1.0)}
    if not given:
        raise BadInput("please set --config.train_data=…")
    if not isinstance(given, dict):
        raise BadInput(
            f"--config.train_data={given!r} is neither a source nor several: write several as "
            'dict(name=dict(path="…", weight=1.0), …); name files of one kind by a path with *'
        )
    found = {}
    for name, one in given.items():
        where = f"train_data.{name}"
        weight = one.get("weight", 1.0) if isinstance(one, dict) else 1.0
        found[name] = Weighted(parsed(where, one, common), _weight(where, weight))
    if len({one.weight is None for one in found.values()}) > 1:
        raise BadInput(
            f"--config.train_data: set weight={BY_ROWS} either for all sources, so that every "
            "example counts the same, or for none"
        )
    return found


def _weight(where: str, given: object) -> float | None:
    if given == BY_ROWS:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1e9:
        raise BadInput(f"--config.{where}.weight must be above 0, or {BY_ROWS!r}, not {given!r}")
    return float(given)


def held_out(given: Given) -> dict[str, Given]:
    """The held-out sources by name, from the setting `validation`.

    Raises:
      ValueError: it is only a path, without a name, or has a weight.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadInput(
            f"--config.validation={given!r} has no name: write "
            f"--config.validation.heldout={given}, and metrics are logged under eval/heldout"
        )
    for name, one in given.items():
        if not isinstance(one, str) and "weight" in (one or ()):
            raise BadInput(
                f"--config.validation.{name}.weight has no effect: all held-out examples weigh "
                "the same; leave it out"
            )
    return dict(given)


def parsed(where: str, given: Given, common: Common) -> Source:
    """Parses one source: its path, or a dict(path=…, layout=…, columns=…).

    Raises:
      ValueError: it is something else.
    """
    if not isinstance(given, str | dict):
        raise BadInput(f"--config.{where}={given!r} is not a source: give its path")
    said = {"path": given} if isinstance(given, str) else dict(given)
    if odd := sorted(said.keys() - set(SETTINGS)):
        raise BadInput(f"--config.{where} has no setting {odd[0]!r}: it has {', '.join(SETTINGS)}")
    path = said.get("path")
    own = said.get("columns", common.columns)
    own = {} if own is None else own
    if not isinstance(path, str) or not path:
        raise BadInput(f"please set --config.{where}.path=…")
    if not isinstance(own, Mapping):
        raise BadInput(f'the columns of --config.{where} are not of the form dict(prompt="x")')
    layout = said.get("layout", common.layout)
    names = tuple(sorted(own.items()))
    return Source(path, layout, names, single=common.single, labelled=common.labelled)

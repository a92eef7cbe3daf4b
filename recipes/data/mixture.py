"""Several sources of pairs, drawn by weight into one endless stream."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import ml_collections
import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.tokenise import Source
from recipes.data.tokens import PairIds

Setting = Any  # of a config: a string, or a dict of settings
SETTINGS = ("path", "weight", "layout", "columns")


class Part(NamedTuple):
    """The training pairs of one source. Their rows are numbered through all sources."""

    name: str
    weight: float  # its share of the pairs drawn, relative to the others'
    pairs: list[PairIds]
    last_row: int  # rows of the parts before it are smaller, those behind it larger


def sources_of(setting: Setting, data: Setting) -> dict[str, tuple[Source, float]]:
    """Sources and their weights by name; a mere string is one source, named `train`.

    `data` says the layout and columns of those that do not say so themselves.

    Raises:
      ValueError: a source says something that is no setting, or lacks what it needs.
    """
    if isinstance(setting, str):
        return {"train": (source_of("train_data", setting, data), 1.0)}
    if not setting:
        raise BadInput("please set --config.train_data=…")
    if not isinstance(setting, dict | ml_collections.ConfigDict):
        raise BadInput(
            f"--config.train_data={setting!r} is neither a source nor several: those are "
            'dict(name=dict(path="…", weight=1.0), …); files of one kind are a path with *'
        )
    found = {}
    for name, given in setting.items():
        where = f"train_data.{name}"
        weight = given.get("weight", 1.0) if hasattr(given, "get") else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise BadInput(f"--config.{where}.weight must be above 0, not {weight!r}")
        found[name] = source_of(where, given, data), float(weight)
    return found


def held_out_of(setting: Setting) -> dict[str, Setting]:
    """The held-out sources by name, as the setting `validation` gives them.

    Raises:
      ValueError: it is a mere path, which has no name, or gives a weight.
    """
    if setting is None:
        return {}
    if not isinstance(setting, dict | ml_collections.ConfigDict):
        raise BadInput(
            f"--config.validation={setting!r} gives no name: write --config.validation.heldout="
            f"{setting}, and metrics are under eval/heldout"
        )
    for name, given in setting.items():
        if not isinstance(given, str) and "weight" in (given or ()):
            raise BadInput(
                f"--config.validation.{name}.weight has no effect: every held-out pair weighs the "
                "same; leave it out"
            )
    return dict(setting.items())


def source_of(where: str, given: Setting, data: Setting) -> Source:
    """One source: its path, or a dict(path=…, layout=…, columns=…).

    Raises:
      ValueError: it says something else.
    """
    if not isinstance(given, str | dict | ml_collections.ConfigDict):
        raise BadInput(f"--config.{where}={given!r} is no source: give its path")
    said: dict[str, Any] = {"path": given} if isinstance(given, str) else dict(given)
    if odd := sorted(said.keys() - set(SETTINGS)):
        raise BadInput(f"--config.{where} has no setting {odd[0]!r}: it has {', '.join(SETTINGS)}")
    path: Any = said.get("path")
    columns: Any = said.get("columns", data["columns"])
    columns = {} if columns is None else columns
    if not isinstance(path, str) or not path:
        raise BadInput(f"please set --config.{where}.path=…")
    if not isinstance(columns, dict | ml_collections.ConfigDict):
        raise BadInput(f'the columns of --config.{where} are not written like dict(chosen="x")')
    return Source(path, said.get("layout", data["layout"]), tuple(sorted(dict(columns).items())))


def numbered(pairs: Sequence[PairIds], first_row: int) -> list[PairIds]:
    """The pairs with `first_row` added to their rows."""
    return [pair._replace(row=pair.row + first_row) for pair in pairs] if first_row else list(pairs)


def endless(parts: Sequence[Part], seed: int) -> grain.MapDataset:
    """A stream of pairs: element i depends on i, the seed and the parts alone.

    Each epoch of a part holds every pair of it once, in another order; parts take turns by weight.
    """
    streams = [
        grain.MapDataset.source(part.pairs).seed(seed + i).shuffle().repeat()
        for i, part in enumerate(parts)
    ]
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, [part.weight for part in parts])


def part_of(parts: Sequence[Part], rows: np.ndarray) -> np.ndarray:
    """Of each row, the number of the part that it is from."""
    return np.searchsorted([part.last_row for part in parts], rows)

"""The files of a run as a page reads them; whatever no run would write is skipped."""

from collections.abc import Iterator, Mapping
import json
from typing import Any, NamedTuple

from checkpoints_io import places
from checkpoints_io.errors import NotFound


class RunFiles(NamedTuple):
    """The contents of a run's directory, without its weights."""

    name: str
    settings: dict[str, object]  # by name: "data.layout"
    records: list[tuple[int, dict[str, int | float]]]  # by step, only finite figures
    samples: list[dict[str, Any]]
    data: list[dict[str, object]]  # what became of the rows of each source


def read(directory: places.Place, name: str) -> RunFiles:
    """Reads those of the files that exist.

    Raises:
      FileNotFoundError: it is not the directory of a run.
      OSError: they cannot be read.
    """
    settings, records = directory.read("settings.json"), directory.read("metrics.jsonl")
    if settings is None and records is None:
        raise NotFound(f"{directory} is not the directory of a run: it has no metrics.jsonl")
    named = _parsed(settings or b"")
    data = _parsed(directory.read("data.json") or b"")
    return RunFiles(
        name,
        dict(_flat(named)) if isinstance(named, dict) else {},
        [*_numbers(records or b"")],
        [one for one in _lines(directory.read("samples.jsonl") or b"") if _is_sample(one)],
        [one for one in data if _is_part(one)] if isinstance(data, list) else [],
    )


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _lines(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.split(b"\n"):
        if isinstance(found := _parsed(line), dict) and _is_count(found.get("step")):
            yield found


def _numbers(text: bytes) -> Iterator[tuple[int, dict[str, int | float]]]:
    for record in _lines(text):
        figures = {name: x for name, x in record.items() if name != "step" and _is_number(x)}
        yield record["step"], figures


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def _is_sample(one: Mapping[str, object]) -> bool:
    ratios = one.get("log_ratios")
    return (
        isinstance(one.get("prompt"), str)
        and isinstance(one.get("policy"), str)
        and _is_number(one.get("temperature"))
        and isinstance(ratios, dict)
        and all(isinstance(each, list) and all(map(_is_piece, each)) for each in ratios.values())
        and all(one.get(x) is None or isinstance(one[x], str) for x in ("reference", *GIVEN, "set"))
    )


GIVEN = "wanted", "unwanted"


def _is_piece(piece: object) -> bool:
    return (
        isinstance(piece, list)
        and len(piece) == 2
        and isinstance(piece[0], str)
        and _is_number(piece[1])
    )


def _is_part(one: object) -> bool:
    counted = lambda value: isinstance(value, dict) and all(map(_is_count, value.values()))
    return (
        isinstance(one, dict)
        and all(isinstance(one.get(name), str) for name in ("name", "source"))
        and all(_is_count(one.get(name)) for name in ("rows", "used"))
        and all(counted(one.get(name)) for name in ("lost", "notes"))
    )


def _flat(room: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in room.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

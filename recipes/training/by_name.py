"""The settings of a config by their names: what a ConfigDict and the table say, as plain values."""

from collections.abc import Callable, Iterator, Mapping
import inspect
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from checkpoints_io.errors import BadInput
from recipes.training.nearest import did_you_mean
from recipes.training.settings import (
    KIND_NAMES,
    MUST,
    NAMED_BY_THE_USER,
    Table,
    trains_on_pairs,
    unread,
)

# Settings of adapters elsewhere, and why they are none here.
NOT_HERE = dict.fromkeys(
    ("dropout", "lora_dropout"),
    "dropout on adapters would make policy and reference differ before the first step, and make "
    "results depend on packing and resumes: leave it out",
) | {
    "modules_to_save": "whole weights cannot be trained beside adapters: leave it out",
    "bias": "biases cannot be trained beside adapters: leave it out",
    "init_lora_weights": "set --config.adapter.zero=A, or B as in PEFT",
}
Part = TypeVar("Part")
Values = dict[str, Any]  # every setting of a table by its name, checked: what a run was given


def check_names(config: ml_collections.ConfigDict, table: Table) -> None:
    """Checks the names of a config against the table, and the kind of each value.

    Raises:
      ValueError: with the setting's name, and what to write.
    """
    if shared := _shared(config):
        remedy = "give each its own value"
        if "reference_model_path" in shared:
            remedy = (
                "write config.reference_model_path = config_dict.placeholder(str), which means "
                "the weights that the policy starts from"
            )
        raise BadInput(
            f"{' and '.join(shared)} of the config share one reference (get_ref), so setting one "
            f"sets both: {remedy}"
        )
    own = lambda name: f"{name}.".startswith(tuple(f"{one}." for one in NAMED_BY_THE_USER))
    ours = {name for name, _ in flat(config) if not own(name)}
    if unknown := sorted(ours - table.keys() - unread(table).keys()):
        if why := NOT_HERE.get(unknown[0].rpartition(".")[2]):
            raise BadInput(f"--config.{unknown[0]}: {why}")
        near = did_you_mean(unknown[0], table)
        raise BadInput(f"the config has an unknown setting {unknown[0]!r}{near}")
    lacking = [name for name in left_out(config, table) if table[name].default is MUST]
    if lacking:
        if {"beta", "loss"} <= set(lacking):
            raise BadInput(
                "the config has no beta and no loss: it is a config of recipes/sft.py, which "
                f"trains on single answers; see {example(table)} for one with pairs"
            )
        raise BadInput(
            f"the config has no {', '.join(sorted(lacking))}: add it as in {example(table)}"
        )
    for name, value in flat(config):
        if value is not None and name in table and not _is(value, table[name].kind):
            raise BadInput(f"--config.{name}={value!r} is not {KIND_NAMES[table[name].kind]}")


def example(table: Table) -> str:
    """The example config of the recipe that has these settings."""
    return f"recipes/configs/{'tiny' if trains_on_pairs(table) else 'tiny_sft'}.py"


def left_out(config: ml_collections.ConfigDict, table: Table) -> list[str]:
    """The settings that the config does not name."""
    return [name for name in table if not _has(config, name)]


def flat(
    config: ml_collections.ConfigDict | Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Names and values: ("data.layout", "preference_chat") and so on."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def part(kind: Callable[..., Part], given: Values) -> Part:
    """A NamedTuple (or a call) whose fields are settings, filled by their names."""
    return kind(**{name: given[name] for name in inspect.signature(kind).parameters})


def nested(given: Values) -> dict[str, object]:
    """The settings as a config file groups them: {"data": {"layout": …}, …}."""
    found: Values = {}
    for name, value in given.items():
        *rooms, last = name.split(".")
        room = found
        for inner in rooms:
            room = room.setdefault(inner, {})
        room[last] = value
    return found


def plain(config: ml_collections.ConfigDict, table: Table) -> Values:
    """The settings by name, in Python's own dicts; the table's default for one that is not there.

    Nothing is checked.
    """
    given: Values = {}
    for name, setting in table.items():
        value: object = setting.default
        if _has(config, name):
            value = config
            for inner in name.split("."):
                value = value[inner]
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        given[name] = tuple(value) if isinstance(value, list) and setting.kind is tuple else value
    return given


def mesh_sizes(given: Values) -> tuple[int, int, int, int]:
    """What `sharding.mesh_of` is asked for."""
    data, fsdp, tensor, context = (
        given[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor", "context")
    )
    return data, fsdp, tensor, context


def _has(config: ml_collections.ConfigDict, name: str) -> bool:
    room, _, last = name.rpartition(".")
    return last in (config.get(room) or () if room else config)


def _shared(config: ml_collections.ConfigDict) -> tuple[str, str] | None:
    """Two settings that are one object: a flag for either would set both."""
    met: dict[int, str] = {}
    rooms = [("", config)]
    for prefix, room in rooms:  # which grows
        for name, value in room.items(preserve_field_references=True):
            if isinstance(value, config_dict.FieldReference | ml_collections.ConfigDict):
                if id(value) in met:
                    return met[id(value)], prefix + name
                met[id(value)] = prefix + name
            if isinstance(room[name], ml_collections.ConfigDict):
                rooms.append((f"{prefix}{name}.", room[name]))
    return None


def _is(value: object, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))

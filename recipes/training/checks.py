"""Checks a config against the table of settings before anything else happens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import datetime
import importlib.util
import inspect
import re
from typing import Any, NamedTuple, TypeVar

import ml_collections
from ml_collections import config_dict
import ml_dtypes
import numpy as np

from checkpoints_io import hf_hub
from checkpoints_io.errors import BadInput
from recipes.data.chats import layouts
from recipes.data.rows import source
from recipes.training.nearest import did_you_mean
from recipes.training.settings import (
    ALONG_THE_WAY,
    KIND_NAMES,
    MUST,
    NAMED_BY_THE_USER,
    OF_FOLDER,
    Table,
    may_be_unset,
    trains,
    unread,
)

DTYPES = {
    "f32": np.dtype(np.float32),
    "float32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "float16": np.dtype(np.float16),
}
# Metrics that can choose the best checkpoint, and whether higher is better.
BEST_BY = {
    "loss": False,
    "dpo_loss": False,
    "dpo_accuracy": True,
    "dpo_reward_margin": True,
    "dpo_margin_policy": True,
}
# Settings of adapters elsewhere, and why they are none here.
NOT_HERE = dict.fromkeys(
    ("dropout", "lora_dropout"),
    "dropout on adapters would make policy and reference differ before the first step, and packing "
    "and a resume random: leave it out",
) | {
    "modules_to_save": "whole weights are not trained beside adapters: leave it out",
    "bias": "biases are not trained beside adapters: leave it out",
    "init_lora_weights": "new adapters begin with --config.adapter.zero=A, or B as in PEFT",
}

Part = TypeVar("Part")
Values = dict[str, Any]  # every setting of a table by its name, checked: what a run was given


class Precision(NamedTuple):
    """Dtypes of the stored weights and of the computation."""

    params: np.dtype
    compute: np.dtype


def checked(config: ml_collections.ConfigDict, table: Table) -> Values:
    """The settings of a config by name, those it does not name with the table's defaults.

    Raises:
      ValueError: one is missing, unknown, impossible, or contradicts another; the message names
        the flag to change and what it may be.
    """
    check_names(config, table)
    given = plain(config, table)
    unset = [n for n in sorted(given) if given[n] is None and not may_be_unset(n, table)]
    if unset:
        raise BadInput(f"please set {', '.join(f'--config.{name}=…' for name in unset)}")
    for name, setting in table.items():
        value = given[name]
        if value is None:
            continue
        if setting.choices:
            _one_of(name, value, setting.choices)
        if setting.bound and not setting.bound.holds(value):
            raise BadInput(f"--config.{name} must be {setting.bound.says}, not {value}")
    precision(given["mp"])
    pairs = "beta" in table
    _check_data(given)
    _check_rows(given, pairs)
    _check_processes(given)
    if not trains(table):
        _check_scored(given)
        return given
    profiled(given["profile"])
    _check_steps(given)
    _check_texts(given)
    _check_tasks(given)
    _check_keep(given, pairs)
    _check_hub(given)
    _refuse_without_effect(given)
    _check_optimizer(given, table)
    _check_adapters(given, table)
    if pairs:
        _check_preference(given)
    return given


def check_names(config: ml_collections.ConfigDict, table: Table) -> None:
    """Checks the names of a config against the table, and the kind of each value.

    Raises:
      ValueError: with the setting's name, and what to write.
    """
    if shared := _shared(config):
        remedy = "write a value of its own for each"
        if "reference_model_path" in shared:
            remedy = (
                "write config.reference_model_path = config_dict.placeholder(str), which stands "
                "for the weights that the policy starts from"
            )
        raise BadInput(
            f"{' and '.join(shared)} of the config are one reference (get_ref), and setting "
            f"one of them sets both: {remedy}"
        )
    own = lambda name: f"{name}.".startswith(tuple(f"{one}." for one in NAMED_BY_THE_USER))
    ours = {name for name, _ in flat(config) if not own(name)}
    if unknown := sorted(ours - table.keys() - unread(table).keys()):
        if why := NOT_HERE.get(unknown[0].rpartition(".")[2]):
            raise BadInput(f"--config.{unknown[0]}: {why}")
        near = did_you_mean(unknown[0], table)
        raise BadInput(f"the config has a setting {unknown[0]!r} that nothing reads{near}")
    lacking = [name for name in left_out(config, table) if table[name].default is MUST]
    if lacking:
        raise BadInput(
            f"the config has no {', '.join(sorted(lacking))}: add it, as {example(table)} has it"
        )
    for name, value in flat(config):
        if value is not None and name in table and not _is(value, table[name].kind):
            raise BadInput(f"--config.{name}={value!r} is not {KIND_NAMES[table[name].kind]}")


def example(table: Table) -> str:
    """A config of the recipe that has these settings."""
    return f"recipes/configs/{'tiny' if 'beta' in table else 'tiny_sft'}.py"


def left_out(config: ml_collections.ConfigDict, table: Table) -> list[str]:
    """The settings that the config does not name."""
    return [name for name in table if not _has(config, name)]


def precision(mp: str) -> Precision:
    """Parses `p=f32,c=bfloat16`.

    Raises:
      ValueError: it is written otherwise, or names dtypes that do not train.
    """
    try:
        given = dict(part.split("=") for part in mp.split(","))
        read = Precision(DTYPES[given.pop("p")], DTYPES[given.pop("c")])
    except (ValueError, KeyError) as error:
        raise BadInput(f"--config.mp={mp!r} is not written like p=f32,c=bfloat16") from error
    if given or read.compute == np.float16 or read.params == np.float16:
        raise BadInput(f"--config.mp={mp!r}: p and c may be f32 or bfloat16")
    if read.params != np.float32:
        raise BadInput(
            f"--config.mp={mp!r}: weights kept in bfloat16 do not move at the learning rates of "
            "fine-tuning; use p=f32"
        )
    return read


def adapters_wanted(given: Values) -> bool:
    """Whether the policy has adapters: they are trained, and no weights."""
    return given.get("adapter.rank") is not None or given["adapter.path"] is not None


def less_memory(given: Values, *, has_reference: bool = True) -> list[str]:
    """Flags by which what is frozen would take less memory, if there are such."""
    shared = adapters_wanted(given) and given.get("reference_model_path") is None
    found = []
    if adapters_wanted(given) and given["frozen"] != "nf4":
        found.append("--config.frozen=nf4")
    resident = has_reference and given.get("reference_mode", "cached") != "cached"
    resident = resident and given.get("reference_sync_steps") is None
    if resident and not shared:
        found.append("--config.reference_mode=cached")
    return found


def profiled(steps: str | None) -> range:
    """The steps of `11-13`; an empty range for None.

    Raises:
      ValueError: it is written otherwise.
    """
    if steps is None:
        return range(0)
    found = re.fullmatch(r"(\d+)-(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise BadInput(f"--config.profile={steps!r} is not written like 11-13")
    return range(int(found[1]), int(found[2]) + 1)


def steps_at(steps: str | None) -> frozenset[int]:
    """The steps of `1,5,25`; none for None.

    Raises:
      ValueError: it is written otherwise.
    """
    if steps is None:
        return frozenset()
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", steps):
        raise BadInput(f"--config.eval_at={steps!r} is not written like 1,5,25")
    return frozenset(map(int, steps.split(",")))


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


def nested(given: Values) -> dict[str, Any]:
    """The settings as a config file groups them: {"data": {"layout": …}, …}."""
    found: dict[str, Any] = {}
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
        value: Any = setting.default
        if _has(config, name):
            value = config
            for inner in name.split("."):
                value = value[inner]
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        given[name] = tuple(value) if isinstance(value, list) and setting.kind is tuple else value
    return given


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


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise BadInput(
            f"--config.{name}={value!r} is none of {', '.join(known)}{did_you_mean(value, known)}"
        )


def _check_data(given: Values) -> None:
    common = source.common(given)
    if common.single and given["data.answers"] != 2:
        raise BadInput(
            f"--config.data.answers={given['data.answers']} has no effect: this run trains on "
            "single answers; leave it out"
        )
    read = {
        f"train_data.{name}.": one.source
        for name, one in source.training(given["train_data"], common).items()
    }
    for name, one in source.held_out(given["validation"]).items():
        read[f"validation.{name}."] = source.parsed(f"validation.{name}", one, common)
    known = layouts.columns_of(single=common.single)
    for where, one in read.items():
        if one.layout is not None:
            prefix = "data." if one.layout == given["data.layout"] else where
            _one_of(f"{prefix}layout", one.layout, layouts.named(single=common.single))
        is_common = dict(one.columns) == common.columns
        columns = f"--config.{'data.' if is_common else where}columns"
        for column, theirs in one.columns:
            if column not in known:
                raise BadInput(f"{columns} has no column {column!r}{did_you_mean(column, known)}")
            if not isinstance(theirs, str):
                raise BadInput(f"{columns}.{column}={theirs!r} is not a column's name")
    try:
        datetime.date.fromisoformat(given["data.date"] or "2026-01-31")
    except ValueError as error:
        raise BadInput(
            f"--config.data.date={given['data.date']!r} is not written like 2026-01-31"
        ) from error
    if given["validation_split_fraction"] and "validation" in (given["validation"] or {}):
        raise BadInput(
            "--config.validation_split_fraction makes a held-out set named `validation`: give the "
            "one in --config.validation another name"
        )
    held_out = given["validation"] or given["validation_split_fraction"]
    held_out = held_out or given.get("validation_texts") or given.get("tasks")
    if given.get("max_eval_pairs") and not held_out:
        raise BadInput("--config.max_eval_pairs has no effect: nothing is held out")


def mesh_sizes(given: Values) -> tuple[int, int, int, int]:
    """What `sharding.mesh_of` is asked for."""
    data, fsdp, tensor, context = (
        given[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor", "context")
    )
    return data, fsdp, tensor, context


def _check_texts(given: Values) -> None:
    texts = given["validation_texts"]
    if texts is None:
        return
    if not isinstance(texts, dict):
        raise BadInput(
            f"--config.validation_texts={texts!r} gives no name: write "
            f"--config.validation_texts.wiki={texts}, and figures are under eval/wiki"
        )
    others = {
        *(given["validation"] or ()),
        *(["validation"] * bool(given["validation_split_fraction"])),
    }
    for name, path in texts.items():
        if not isinstance(path, str):
            raise BadInput(f"--config.validation_texts.{name}={path!r} is not a path")
        if name in others:
            raise BadInput(
                f"--config.validation_texts.{name} has the name of a held-out set, and their "
                "figures could not be told apart: give it another name"
            )


def _check_tasks(given: Values) -> None:
    if given["tasks_folder"] is not None and not given["tasks"]:
        raise BadInput(
            f"--config.tasks_folder={given['tasks_folder']} has no effect without --config.tasks"
        )
    named = given["validation_texts"] or {}, given["validation"] or {}
    for name in given["tasks"]:
        if any(name in some for some in named):
            raise BadInput(
                f"--config.tasks={name} has the name of a held-out set, and their figures could "
                "not be told apart: give the set another name"
            )


def _check_steps(given: Values) -> None:
    steps, epochs = given["num_train_steps"], given["num_epochs"]
    if steps is None and epochs is None:
        raise BadInput("set one of --config.num_train_steps=… and --config.num_epochs=…")
    if steps is not None and epochs is not None:
        raise BadInput(
            f"--config.num_train_steps={steps} and --config.num_epochs={epochs} both say how long "
            "to train, so set one of them: for epochs add --config.num_train_steps=None, for steps "
            "--config.num_epochs=None"
        )


def _check_rows(given: Values, pairs: bool) -> None:
    row, longest = given["row_length"], given["train_seq_len"]
    if row is not None and longest > row:
        raise BadInput(
            f"--config.train_seq_len={longest} does not fit into rows of --config.row_length={row}"
        )
    if "train_batch_size" not in given:
        return
    rows, examples = given["per_device_parallelism"], given["train_batch_size"]
    most = given["data.answers"] if pairs else 1
    what, told = {1: ("answers", "one"), 2: ("pairs", "two")}.get(most, ("lists", most))
    if (rows or 0) > most * examples:
        raise BadInput(
            f"--config.per_device_parallelism={rows} is more rows than the {examples} {what} of an "
            f"update (--config.train_batch_size) can fill: each takes {told} at most"
        )


def _check_keep(given: Values, pairs: bool) -> None:
    saved, evaluated = given["steps_per_checkpoint"], given["steps_per_eval"]
    every, best = given["keep_every"], given["keep_best"]
    if every is not None and (saved is None or every % saved):
        raise BadInput(
            f"--config.keep_every={every} must be a multiple of --config.steps_per_checkpoint, "
            f"which is {saved}: there are no checkpoints between"
        )
    for name in ("keep_best", "stop_when"):
        _check_figure(name, given[name], pairs)
    steps_at(given["eval_at"])
    patience = given["stop_patience"]
    if given["stop_when"] is None and patience != ALONG_THE_WAY["stop_patience"].default:
        raise BadInput(
            f"--config.stop_patience={patience} has no effect without "
            "--config.stop_when: set it, like heldout/dpo_loss"
        )
    if given["stop_when"] and evaluated is None and given["eval_at"] is None:
        raise BadInput(
            f"--config.stop_when={given['stop_when']} has no effect without evaluations along the "
            "way: set --config.steps_per_eval"
        )
    if best is None:
        return
    if saved is None or evaluated is None or saved % evaluated:
        raise BadInput(
            "--config.keep_best needs --config.steps_per_checkpoint to be a multiple of "
            f"--config.steps_per_eval, and they are {saved} and {evaluated}: checkpoints would be "
            "without figures"
        )


def _check_figure(setting: str, figure: str | None, pairs: bool) -> None:
    if figure is None:
        return
    held_out, _, name = figure.rpartition("/")
    known = [known for known in BEST_BY if known.startswith("dpo_") == pairs]
    if not held_out or name not in known:
        raise BadInput(
            f"--config.{setting}={figure!r} is not a held-out set and one of {', '.join(known)}, "
            f"like heldout/{'dpo_accuracy' if pairs else 'loss'}"
        )


def _check_hub(given: Values) -> None:
    repo = given["push_to_hub"]
    if repo is None:
        for name in ("hub_strategy", "hub_private"):
            if given[name] != ALONG_THE_WAY[name].default:
                raise BadInput(
                    f"--config.{name}={given[name]} has no effect without "
                    "--config.push_to_hub=owner/name"
                )
    elif not re.fullmatch(hf_hub.ID, repo):
        raise BadInput(f"--config.push_to_hub={repo} is not written like owner/name")
    elif given["steps_per_hf_export"] == -1:
        raise BadInput(
            f"--config.push_to_hub={repo} has no effect with --config.steps_per_hf_export=-1: "
            "nothing is exported"
        )
    elif "://" in given["directory"]:
        raise BadInput(
            f"--config.push_to_hub={repo} sends folders of this machine, and "
            f"--config.directory={given['directory']} is elsewhere: leave it out, and send the "
            "export with `hf upload`"
        )


def _check_adapters(given: Values, table: Table) -> None:
    begun = given["adapter.path"]
    own = [name for name in table if name.startswith("adapter.") and given[name] is not None]
    changed = [name for name in own if given[name] != table[name].default]
    if not adapters_wanted(given):
        changed += ["frozen"] if given["frozen"] is not None else []
        if changed:
            some = given["trainable"] is not None
            what = "no adapters" if some else "all weights"
            instead = "without --config.trainable " if some else ""
            raise BadInput(
                f"--config.{changed[0]} has no effect: {what} are trained; for adapters set "
                f"--config.adapter.rank or --config.adapter.path {instead}".rstrip()
            )
        if given.get("reference_mode") == "base":
            raise BadInput(
                "--config.reference_mode=base is the policy without its adapters, and it has none: "
                "set --config.adapter.rank or --config.adapter.path, or another mode"
            )
        return
    if given["frozen"] in ("int8", "nf4") and given["remat"] == "none":
        raise BadInput(
            f"--config.remat=none keeps the weights of all layers as they are computed with, and "
            f"--config.frozen={given['frozen']} would save nothing: use --config.remat=products"
        )
    if given["trainable"] is not None:
        raise BadInput(
            f"--config.trainable={given['trainable']!r} has no effect: adapters are trained, and "
            "no weights; leave it out, or the settings of --config.adapter"
        )
    if begun is not None and (idle := [name for name in changed if name not in OF_FOLDER]):
        raise BadInput(
            f"--config.{idle[0]} has no effect: the adapters in --config.adapter.path={begun} are "
            "what they are; leave it out, or start new ones without --config.adapter.path"
        )
    named = given.get("reference_model_path")
    if given.get("reference_mode") == "base" and named is not None:
        raise BadInput(
            "--config.reference_mode=base is the policy without its adapters, and "
            f"--config.reference_model_path={named} names another reference: set one of them"
        )


def _check_scored(given: Values) -> None:
    """Two models, and sources that are told apart, where nothing is trained."""
    if given["data.answers"] != 2:
        raise BadInput(
            f"--config.data.answers={given['data.answers']} has no effect: scores are of pairs; "
            "add --config.data.answers=2"
        )
    train = given["train_data"] if isinstance(given["train_data"], dict) else ("train",)
    if alike := [name for name in given["validation"] or () if name in train]:
        raise BadInput(
            f"--config.validation.{alike[0]} has the name of a source of --config.train_data, and "
            "their scores could not be told apart: give it another name"
        )
    path, named, begun = (
        given[name] for name in ("initialize_from_hf", "reference_model_path", "adapter.path")
    )
    if begun is None and given["reference_is_hf"] and named in (None, path):
        raise BadInput(same_weights(path))
    if begun is None and given["frozen"] is not None:
        raise BadInput(
            f"--config.frozen={given['frozen']} is for the weights beside adapters: name these "
            "with --config.adapter.path=…, or add --config.frozen=None"
        )
    _check_reference(given)


def same_weights(path: str) -> str:
    """Why the scores of a model against itself are refused: the reference was forgotten."""
    return (
        f"policy and reference are both {path}, so every reward would be 0: give the trained model "
        "as --config.initialize_from_hf=… (or its adapters as --config.adapter.path=…), and what "
        "it began from as --config.reference_model_path=…"
    )


def _check_processes(given: Values) -> None:
    several = ("coordinator_address", "num_processes", "process_id")
    idle = [name for name in several if given[f"distributed.{name}"] is not None]
    if idle and not given["distributed.enabled"]:
        raise BadInput(
            f"--config.distributed.{idle[0]} has no effect without --config.distributed.enabled"
            "=true, on every process of the run"
        )


def _refuse_without_effect(given: Values) -> None:
    falls = given["cooldown"] is not None or given["min_lr_ratio"]
    if given["lr_schedule"] == "constant" and falls:
        raise BadInput(
            "--config.cooldown and --config.min_lr_ratio have no effect with "
            "--config.lr_schedule=constant: add --config.cooldown=None --config.min_lr_ratio=0"
        )
    _check_samples(given)
    for library, called in (("wandb", "Weights & Biases"), ("trackio", "trackio")):
        if given[f"{library}_project"] and importlib.util.find_spec(library) is None:
            raise BadInput(
                f"--config.{library}_project needs {called}: pip install -e '.[{library}]', or "
                "leave it unset"
            )


def _check_samples(given: Values) -> None:
    if given["steps_per_sample"] is not None:
        return
    for name in ("sample_prompts", "sample_temperature", "sample_count"):
        if given[name] != ALONG_THE_WAY[name].default:
            raise BadInput(
                f"--config.{name}={given[name]} has no effect without --config.steps_per_sample: "
                "set it, like 100"
            )


def _check_optimizer(given: Values, table: Table) -> None:
    meant = lambda value: DTYPES.get(value, value)
    for name, setting in table.items():
        idle = setting.of_optimizers and given["optimizer"] not in setting.of_optimizers
        if idle and meant(given[name]) != meant(setting.default):
            raise BadInput(
                f"--config.{name}={given[name]} has no effect with --config.optimizer="
                f"{given['optimizer']}, and only with {', '.join(setting.of_optimizers)}: leave it "
                f"out, or set --config.{name}={setting.default}"
            )


def _check_preference(given: Values) -> None:
    if given["reference_mode"] != "cached" and given["reference_cache"]:
        raise BadInput(
            "--config.reference_cache has no effect with --config.reference_mode="
            f"{given['reference_mode']}"
        )
    _check_reference(given)


def _check_reference(given: Values) -> None:
    if not given["reference_is_hf"] and given["reference_model_path"] is None:
        raise BadInput(
            "--config.reference_is_hf=false means that the reference is the newest checkpoint of "
            "another run: give the directory of a run as --config.reference_model_path=…"
        )

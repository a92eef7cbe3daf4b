"""The settings of a run, checked before anything else happens, in sentences."""

from collections.abc import Iterable, Iterator, Mapping
import datetime
import difflib
import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict

from checkpoints_io.errors import BadInput
from recipes import losses
from recipes.configs import tiny
from recipes.data import chat, layouts, mixture, tokens
from zoo import attention, stack

DTYPES = {
    "f32": jnp.float32,
    "float32": jnp.float32,
    "bf16": jnp.bfloat16,
    "bfloat16": jnp.bfloat16,
    "f16": jnp.float16,
    "float16": jnp.float16,
}

# Settings that are one of a few words.
CHOICES: dict[str, Iterable[str]] = {
    "hf_save_dtype": DTYPES,
    "adam_mu_dtype": ("f32", "float32", "bf16", "bfloat16"),
    "reference_mode": ("resident", "cached"),
    "remat": stack.REMAT,
    "nonfinite": ("stop", "skip"),
    "attention": attention.BACKENDS,
    "lr_schedule": ("constant", "linear", "cosine"),
    "data.over_length": tokens.OVER_LENGTH,
    "data.scored_turns": chat.SCORED_TURNS,
}

# Settings that may stay unset, and what that means.
OPTIONAL = {
    "reference_model_path": "the weights that the policy begins from",
    "validation": "no held-out files",
    "data.columns": "the columns have our names",
    "attention": "the backend of the platform",
    "compile_cache": "every start compiles afresh",
    "profile": "nothing is traced",
    "reference_cache": "reference-cache beside the run's directory",
    "token_cache": "every start tokenises afresh",
    "data.layout": "recognised from the columns",
    "data.end_of_turn": "what the chat template writes after an answer",
    "data.date": "there is none: the chat template prints no date",
    "tokenizer": "the one in initialize_from_hf",
    "chat_template": "the tokenizer's own",
    "validation_split_fraction": "nothing is split off; `validation` names the held-out files",
    "distributed.coordinator_address": "found by jax on TPU pods and under Slurm",
    "distributed.num_processes": "likewise",
    "distributed.process_id": "likewise",
    "cooldown": "the decay takes all that the warm-up leaves",
    "max_grad_norm": "no clipping",
    "max_eval_pairs": "all held-out pairs",
    "num_train_steps": "num_epochs decides",
    "num_epochs": "num_train_steps decides",
    "per_device_parallelism": "chosen from the memory of the devices",
    "row_length": "chosen from the lengths of the pairs and the mesh",
    "steps_per_checkpoint": "only the last step",
    "steps_per_hf_export": "only the last step; -1 never",
    "steps_per_eval": "only the last step",
    "wandb_project": "no Weights & Biases",
    "keep_every": "the newest stay",
    "keep_best": "the newest stay",
    "dpop_lambda": "only for loss=dpop",
}
# Under these the user chooses the names.
NAMED_BY_THE_USER = ("train_data", "validation", "data.columns")
CHOSEN_NAME = r"(?:train_data|validation|data\.columns)\.[^.]+"
# What the same thing is called elsewhere.
ELSEWHERE = {
    "dataset": "train_data",
    "dataset_name": "train_data",
    "eval_dataset": "validation",
    "eval_steps": "steps_per_eval",
    "gradient_checkpointing": "remat",
    "logging_steps": "steps_per_log",
    "loss_type": "loss",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "mask_user_turns": "data.scored_turns",  # as it was called here
    "max_length": "train_seq_len",
    "max_seq_length": "train_seq_len",
    "max_steps": "num_train_steps",
    "model": "initialize_from_hf",
    "model_name_or_path": "initialize_from_hf",
    "model_path": "initialize_from_hf",
    "num_train_epochs": "num_epochs",
    "output_dir": "directory",
    "per_device_train_batch_size": "train_batch_size",
    "precompute_ref_log_probs": "reference_mode",
    "ref_model": "reference_model_path",
    "ref_model_name_or_path": "reference_model_path",
    "reference_model": "reference_model_path",
    "run_name": "name",
    "save_steps": "steps_per_checkpoint",
    "save_total_limit": "keep_checkpoints",
    "train_dataset": "train_data",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
}
# By which a checkpoint may be the best, and whether high ones are good.
BEST_BY = {
    "dpo_loss": False,
    "dpo_accuracy": True,
    "dpo_reward_margin": True,
    "dpo_margin_policy": True,
}


class Precision(NamedTuple):
    """Dtypes of the stored weights and of the computation."""

    params: Any
    compute: Any


def precision(mp: str) -> Precision:
    """Reads `p=f32,c=bfloat16`.

    Raises:
      ValueError: it is written otherwise, or names dtypes that do not train.
    """
    try:
        given = dict(part.split("=") for part in mp.split(","))
        read = Precision(DTYPES[given.pop("p")], DTYPES[given.pop("c")])
    except (ValueError, KeyError) as error:
        raise BadInput(f"--config.mp={mp!r} is not written like p=f32,c=bfloat16") from error
    if given or read.compute == jnp.float16 or read.params == jnp.float16:
        raise BadInput(f"--config.mp={mp!r}: p and c may be f32 or bfloat16")
    if read.params != jnp.float32:
        raise BadInput(
            f"--config.mp={mp!r}: weights kept in bfloat16 do not move at the learning rates of "
            "DPO; use p=f32"
        )
    return read


def profiled(steps: str | None) -> range:
    """The steps of `11-13`; none of None.

    Raises:
      ValueError: it is written otherwise.
    """
    if steps is None:
        return range(0)
    found = re.fullmatch(r"(\d+)-(\d+)", steps)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise BadInput(f"--config.profile={steps!r} is not written like 11-13")
    return range(int(found[1]), int(found[2]) + 1)


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses settings that are missing, impossible, or contradict each other.

    Raises:
      ValueError: with the flag to change and what it may be.
    """
    check_names(config)
    if unset := [flag for flag, value in flat(config) if value is None and not may_be_unset(flag)]:
        raise BadInput(f"please set {', '.join(f'--config.{flag}=…' for flag in unset)}")
    precision(config.mp)
    for name, value in flat(config):
        if name in CHOICES and value is not None:
            _one_of(name, value, CHOICES[name])
    profiled(config.profile)
    _check_loss(config.loss)
    _check_data(config)
    positive = (
        "beta learning_rate train_batch_size train_seq_len row_length per_device_parallelism "
        "steps_per_log keep_checkpoints adam_epsilon num_train_steps num_epochs "
        "steps_per_checkpoint steps_per_eval max_grad_norm max_eval_pairs keep_every dpop_lambda"
    )
    for name in positive.split():
        value = config[name]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise BadInput(f"--config.{name} must be above 0, not {value}")
    not_negative = "warmup min_lr_ratio weight_decay cooldown sample_tokens save_retries"
    for name in not_negative.split():
        if config[name] is not None and not 0 <= config[name] < math.inf:
            raise BadInput(f"--config.{name} must be at least 0, and is {config[name]}")
    shares = ("label_smoothing", "min_pack_fill", "min_lr_ratio", "data.max_malformed_fraction")
    for name, value in flat(config):
        if name in shares and not 0 <= value <= 1:
            raise BadInput(f"--config.{name} must lie between 0 and 1, and is {value}")
        if name in ("adam_beta1", "adam_beta2") and not 0 <= value < 1:
            raise BadInput(f"--config.{name} must be at least 0 and below 1, and is {value}")
    if not 0 <= config.seed < 2**31:
        raise BadInput(f"--config.seed must lie between 0 and 2**31, and is {config.seed}")
    if config.label_smoothing >= 0.5:
        raise BadInput("--config.label_smoothing must be below 0.5: half is no preference at all")
    fraction = config.validation_split_fraction
    if fraction is not None and not 0 < fraction < 1:
        raise BadInput(
            f"--config.validation_split_fraction must lie between 0 and 1, and is {fraction}"
        )
    if config.num_train_steps is None and config.num_epochs is None:
        raise BadInput("set one of --config.num_train_steps=… and --config.num_epochs=…")
    if config.num_train_steps is not None and config.num_epochs is not None:
        raise BadInput(
            f"--config.num_train_steps={config.num_train_steps} and --config.num_epochs="
            f"{config.num_epochs} both say how long to train, so set one of them: for epochs add "
            "--config.num_train_steps=None, for steps --config.num_epochs=None"
        )
    if config.row_length is not None and config.row_length % 64:
        raise BadInput(f"--config.row_length={config.row_length} must be a multiple of 64")
    if config.row_length is not None and config.train_seq_len > config.row_length:
        raise BadInput(
            f"--config.train_seq_len={config.train_seq_len} does not fit into rows of "
            f"--config.row_length={config.row_length}"
        )
    if (config.per_device_parallelism or 0) > 2 * config.train_batch_size:
        raise BadInput(
            f"--config.per_device_parallelism={config.per_device_parallelism} is more rows than "
            f"the {config.train_batch_size} pairs of an update (--config.train_batch_size) can "
            "fill: each takes two at most"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise BadInput(
            "--config.wandb_project needs Weights & Biases: pip install -e '.[wandb]', or leave it "
            "unset"
        )
    every = config.steps_per_hf_export
    if every is not None and every != -1 and every < 1:
        raise BadInput("--config.steps_per_hf_export must be a number of steps, or -1 for never")
    _check_keep(config)
    _refuse_without_effect(config)
    if not config.reference_is_hf and config.reference_model_path is None:
        raise BadInput(
            "--config.reference_is_hf=false means that the reference is the newest checkpoint of "
            "another run: give the directory of a run as --config.reference_model_path=…"
        )


def may_be_unset(name: str) -> bool:
    """Does a setting mean something while it is unset?"""
    return name in OPTIONAL or bool(re.fullmatch(rf"{CHOSEN_NAME}(\.layout|\.columns)?", name))


def reference_path(config: ml_collections.ConfigDict) -> str:
    """Where the reference is from: by default the weights that the policy begins from."""
    return config.reference_model_path or config.initialize_from_hf


def check_names(config: ml_collections.ConfigDict) -> None:
    """Holds a config to the settings of `tiny`: all of them, no other, each of its kind.

    Raises:
      ValueError: with the setting's name, and what to write.
    """
    if shared := _shared(config):
        remedy = "write a value of its own for each"
        if "reference_model_path" in shared:
            remedy = (
                "write config.reference_model_path = config_dict.placeholder(str), which stands "
                "for the weights that the policy begins from"
            )
        raise BadInput(
            f"{' and '.join(shared)} of the config are one reference (get_ref), and whoever sets "
            f"one of them sets both: {remedy}"
        )
    own = lambda name: f"{name}.".startswith(tuple(f"{one}." for one in NAMED_BY_THE_USER))
    ours, known = (
        {name for name in names if not own(name)} for names in (dict(flat(config)), KINDS)
    )
    lacking = [name for name in NAMED_BY_THE_USER if not _has(config, name)]
    if missing := sorted([*(known - ours), *lacking]):
        raise BadInput(
            f"the config has no {', '.join(missing)}: add it, as recipes/configs/tiny.py has it"
        )
    if unknown := sorted(ours - known):
        near = did_you_mean(unknown[0], known)
        raise BadInput(f"the config has a setting {unknown[0]!r} that nothing reads{near}")
    for name, value in flat(config):
        if value is not None and name in KINDS and not _is(value, KINDS[name]):
            raise BadInput(f"--config.{name}={value!r} is not {KIND_NAMES[KINDS[name]]}")


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


def _is(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _check_keep(config: ml_collections.ConfigDict) -> None:
    saved, evaluated = config.steps_per_checkpoint, config.steps_per_eval
    if config.keep_every is not None and (saved is None or config.keep_every % saved):
        raise BadInput(
            f"--config.keep_every={config.keep_every} must be a multiple of "
            f"--config.steps_per_checkpoint, which is {saved}: there are no checkpoints between"
        )
    if config.keep_best is None:
        return
    name, _, figure = config.keep_best.rpartition("/")
    if not name or figure not in BEST_BY:
        raise BadInput(
            f"--config.keep_best={config.keep_best!r} is not a held-out set and one of "
            f"{', '.join(BEST_BY)}, like heldout/dpo_accuracy"
        )
    if saved is None or evaluated is None or saved % evaluated:
        raise BadInput(
            "--config.keep_best wants --config.steps_per_checkpoint to be a multiple of "
            f"--config.steps_per_eval, and they are {saved} and {evaluated}: checkpoints would be "
            "without figures"
        )


def score(config: ml_collections.ConfigDict, held_out: Mapping[str, float]) -> float | None:
    """What `keep_best` makes of the held-out figures of a step: the higher, the better."""
    value = held_out.get(f"eval/{config.keep_best}")
    if value is None or not math.isfinite(value):
        return None
    return value if BEST_BY[config.keep_best.rpartition("/")[2]] else -value


def _check_loss(name: str) -> None:
    if name in losses.LOSSES:
        return
    plain = re.sub(r"[\W_]", "", name.lower()).removesuffix("pair")
    if plain in losses.NOT_YET:
        raise BadInput(
            f"--config.loss={name}: {losses.NOT_YET[plain]} is not implemented here yet; there are "
            f"{losses.HERE}"
        )
    also = losses.ALSO.get(plain)
    near = f" (did you mean {also}?)" if also else did_you_mean(name, losses.LOSSES)
    raise BadInput(f"--config.loss={name!r} is none of {losses.HERE}{near}")


def _check_data(config: ml_collections.ConfigDict) -> None:
    named = mixture.sources_of(config.train_data, config.data)
    read = {f"train_data.{name}.": source for name, (source, _) in named.items()}
    for name, given in mixture.held_out_of(config.validation).items():
        source = mixture.source_of(f"validation.{name}", given, config.data)
        read[f"validation.{name}."] = source
    for where, source in read.items():
        if source.layout is not None and source.layout not in layouts.LAYOUTS:
            prefix = "data." if source.layout == config.data.layout else where
            _one_of(f"{prefix}layout", source.layout, layouts.LAYOUTS)
        common = dict(source.columns) == dict(config.data.columns or {})
        columns = f"--config.{'data.' if common else where}columns"
        for column, theirs in source.columns:
            if column not in layouts.COLUMNS:
                near = did_you_mean(column, layouts.COLUMNS)
                raise BadInput(f"{columns} has no column {column!r}{near}")
            if not isinstance(theirs, str):
                raise BadInput(f"{columns}.{column}={theirs!r} is not a column's name")
    try:
        datetime.date.fromisoformat(config.data.date or "2026-01-31")
    except ValueError as error:
        raise BadInput(
            f"--config.data.date={config.data.date!r} is not written like 2026-01-31"
        ) from error


def _refuse_without_effect(config: ml_collections.ConfigDict) -> None:
    if config.lr_schedule == "constant" and (config.cooldown is not None or config.min_lr_ratio):
        raise BadInput(
            "--config.cooldown and --config.min_lr_ratio have no effect with "
            "--config.lr_schedule=constant: add --config.cooldown=None --config.min_lr_ratio=0"
        )
    several = [name for name, value in config.distributed.items() if value is not None]
    if not config.distributed.enabled and (idle := [n for n in several if n != "enabled"]):
        raise BadInput(
            f"--config.distributed.{idle[0]} has no effect without --config.distributed.enabled"
            "=true, on every process of the run"
        )
    if (config.loss == "dpop") != (config.dpop_lambda is not None):
        raise BadInput("set --config.dpop_lambda with --config.loss=dpop, and only with it")
    if config.reference_mode == "resident" and config.reference_cache:
        raise BadInput(
            "--config.reference_cache has no effect with --config.reference_mode=resident"
        )
    if config.validation_split_fraction is not None and "validation" in (config.validation or {}):
        raise BadInput(
            "--config.validation_split_fraction makes a held-out set named `validation`: give the "
            "one in --config.validation another name"
        )
    if config.max_eval_pairs is not None and not (
        config.validation or config.validation_split_fraction
    ):
        raise BadInput("--config.max_eval_pairs has no effect: there are no held-out pairs")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise BadInput(
            f"--config.{name}={value!r} is none of {', '.join(known)}{did_you_mean(value, known)}"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean …?)', or nothing where no known word is near."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was meant: misspelt, called so elsewhere, or given in part."""
    word, known = word.lower().replace("-", "_"), list(known)
    if (here := ELSEWHERE.get(word.rpartition(".")[2])) in known:
        return here
    ends = {name.rpartition(".")[2]: name for name in known} | {name: name for name in known}
    spelt = difflib.get_close_matches(word, [end.lower() for end in ends], 1, cutoff=0.8)
    near = [name for end, name in ends.items() if end.lower() in spelt]
    # batch_size is a part of train_batch_size, and of no other.
    parts = [name for name in known if f"_{word}_" in f"_{name}_"]
    near += parts if len(parts) == 1 else []
    return near[0] if near else None


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values: ("data.layout", "preference_chat") and so on."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _kinds(room: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, type]]:
    for name, value in room.items():
        path = prefix + name
        if isinstance(value, ml_collections.ConfigDict) and path not in NAMED_BY_THE_USER:
            yield from _kinds(value, f"{path}.")
        else:
            yield path, room.get_type(name)


# What each setting may hold; of those whose names the user chooses, `mixture` sees to it.
KINDS = dict(_kinds(tiny.get_config()))
KINDS |= {"train_data": object, "validation": object, "data.columns": dict}
KIND_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "several texts, like a,b",
    dict: "written like \"{'chosen': 'better'}\"",
}

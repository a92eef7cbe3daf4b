"""The settings of a run, checked before anything else happens, in sentences."""

from collections.abc import Iterator, Mapping
import datetime
import difflib
import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections

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

MU_DTYPES = ("f32", "float32", "bf16", "bfloat16")
REFERENCE_MODES = ("resident", "cached")
NONFINITE = ("stop", "skip")

# Settings that may stay unset, and what that means.
OPTIONAL = {
    "attention": "the backend of the platform",
    "compile_cache": "every start compiles afresh",
    "profile": "nothing is traced",
    "reference_cache": "reference-cache beside the run's directory",
    "token_cache": "every start tokenises afresh",
    "data.layout": "recognised from the columns",
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
        raise ValueError(f"--config.mp={mp!r} is not written like p=f32,c=bfloat16") from error
    if given or read.compute == jnp.float16 or read.params == jnp.float16:
        raise ValueError(f"--config.mp={mp!r}: p and c may be f32 or bfloat16")
    if read.params != jnp.float32:
        raise ValueError(
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
        raise ValueError(f"--config.profile={steps!r} is not written like 11-13")
    return range(int(found[1]), int(found[2]) + 1)


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses settings that are missing, impossible, or contradict each other.

    Raises:
      ValueError: with the flag to change and what it may be.
    """
    _refuse_other_names(config)
    may = lambda flag: (
        flag in OPTIONAL or re.fullmatch(r"(train_data|validation)\..*\.layout", flag)
    )
    if unset := [flag for flag, value in flat(config) if value is None and not may(flag)]:
        raise ValueError(f"please set {', '.join(f'--config.{flag}=…' for flag in unset)}")
    precision(config.mp)
    _one_of(config, "hf_save_dtype", DTYPES)
    _one_of(config, "adam_mu_dtype", MU_DTYPES)
    _one_of(config, "reference_mode", REFERENCE_MODES)
    _one_of(config, "remat", stack.REMAT)
    _one_of(config, "nonfinite", NONFINITE)
    if config.attention is not None:
        _one_of(config, "attention", attention.BACKENDS)
    profiled(config.profile)
    _one_of(config, "loss", losses.LOSSES)
    _one_of(config, "lr_schedule", ("constant", "linear", "cosine"))
    _check_data(config)
    positive = (
        "beta learning_rate train_batch_size train_seq_len row_length per_device_parallelism "
        "steps_per_log keep_checkpoints adam_epsilon num_train_steps num_epochs "
        "steps_per_checkpoint steps_per_eval max_grad_norm max_eval_pairs keep_every dpop_lambda"
    )
    for name in positive.split():
        value = config[name]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--config.{name} must be above 0, not {value}")
    not_negative = "warmup min_lr_ratio weight_decay cooldown sample_tokens save_retries"
    for name in not_negative.split():
        if config[name] is not None and not 0 <= config[name] < math.inf:
            raise ValueError(f"--config.{name} must be at least 0, and is {config[name]}")
    shares = ("label_smoothing", "min_pack_fill", "min_lr_ratio", "data.max_malformed_fraction")
    for name, value in flat(config):
        if name in shares and not 0 <= value <= 1:
            raise ValueError(f"--config.{name} must lie between 0 and 1, and is {value}")
        if name in ("adam_beta1", "adam_beta2") and not 0 <= value < 1:
            raise ValueError(f"--config.{name} must be at least 0 and below 1, and is {value}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--config.seed must lie between 0 and 2**31, and is {config.seed}")
    if config.label_smoothing >= 0.5:
        raise ValueError("--config.label_smoothing must be below 0.5: half is no preference at all")
    fraction = config.validation_split_fraction
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(
            f"--config.validation_split_fraction must lie between 0 and 1, and is {fraction}"
        )
    if (config.num_train_steps is None) == (config.num_epochs is None):
        raise ValueError("set one of --config.num_train_steps and --config.num_epochs")
    if config.row_length is not None and config.row_length % 64:
        raise ValueError(f"--config.row_length={config.row_length} must be a multiple of 64")
    if config.row_length is not None and config.train_seq_len > config.row_length:
        raise ValueError(
            f"--config.train_seq_len={config.train_seq_len} does not fit into rows of "
            f"--config.row_length={config.row_length}"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--config.wandb_project needs Weights & Biases: pip install -e '.[wandb]', or leave it "
            "unset"
        )
    every = config.steps_per_hf_export
    if every is not None and every != -1 and every < 1:
        raise ValueError("--config.steps_per_hf_export must be a number of steps, or -1 for never")
    _check_keep(config)
    _refuse_without_effect(config)
    if not config.reference_is_hf and config.reference_model_path == config.initialize_from_hf:
        raise ValueError(
            "--config.reference_is_hf=false means that --config.reference_model_path is the "
            "directory of a run; it is the same as --config.initialize_from_hf"
        )


def _refuse_other_names(config: ml_collections.ConfigDict) -> None:
    """A config has the settings of `tiny`, all of them and no other."""
    named_by_the_user = ("train_data.", "validation.", "data.columns.")
    ours, known = (
        {name for name, _ in flat(one) if not f"{name}.".startswith(named_by_the_user)}
        for one in (config, tiny.get_config())
    )
    if missing := sorted(known - ours):
        raise ValueError(
            f"the config has no {', '.join(missing)}: add it, as recipes/configs/tiny.py has it"
        )
    if unknown := sorted(ours - known):
        near = did_you_mean(unknown[0], known)
        raise ValueError(f"the config has a setting {unknown[0]!r} that nothing reads{near}")


def _check_keep(config: ml_collections.ConfigDict) -> None:
    saved, evaluated = config.steps_per_checkpoint, config.steps_per_eval
    if config.keep_every is not None and (saved is None or config.keep_every % saved):
        raise ValueError(
            f"--config.keep_every={config.keep_every} must be a multiple of "
            f"--config.steps_per_checkpoint, which is {saved}: there are no checkpoints between"
        )
    if config.keep_best is None:
        return
    name, _, figure = config.keep_best.rpartition("/")
    if not name or figure not in BEST_BY:
        raise ValueError(
            f"--config.keep_best={config.keep_best!r} is not a held-out set and one of "
            f"{', '.join(BEST_BY)}, like heldout/dpo_accuracy"
        )
    if saved is None or evaluated is None or saved % evaluated:
        raise ValueError(
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


def _check_data(config: ml_collections.ConfigDict) -> None:
    _one_of(config.data, "over_length", tokens.OVER_LENGTH, "data.")
    _one_of(config.data, "scored_turns", chat.SCORED_TURNS, "data.")
    named = mixture.sources_of(config.train_data, config.data)
    read = {f"train_data.{name}.": source for name, (source, _) in named.items()}
    for name, given in config.validation.items():
        source = mixture.source_of(f"validation.{name}", given, config.data)
        read[f"validation.{name}."] = source
    for where, source in read.items():
        if source.layout is not None and source.layout not in layouts.LAYOUTS:
            prefix = "data." if source.layout == config.data.layout else where
            _one_of({"layout": source.layout}, "layout", layouts.LAYOUTS, prefix)
        for column, theirs in source.columns:
            if column not in layouts.COLUMNS:
                near = did_you_mean(column, layouts.COLUMNS)
                raise ValueError(f"--config.data.columns has no column {column!r}{near}")
            if not isinstance(theirs, str):
                raise ValueError(f"--config.data.columns.{column} is not a column's name")
    try:
        datetime.date.fromisoformat(config.data.date or "2026-01-31")
    except ValueError as error:
        raise ValueError(
            f"--config.data.date={config.data.date!r} is not written like 2026-01-31"
        ) from error


def _refuse_without_effect(config: ml_collections.ConfigDict) -> None:
    if config.lr_schedule == "constant" and (config.cooldown is not None or config.min_lr_ratio):
        raise ValueError(
            "--config.cooldown and --config.min_lr_ratio have no effect with "
            "--config.lr_schedule=constant: set them to None and 0"
        )
    if (config.loss == "dpop") != (config.dpop_lambda is not None):
        raise ValueError("set --config.dpop_lambda with --config.loss=dpop, and only with it")
    if config.reference_mode == "resident" and config.reference_cache:
        raise ValueError(
            "--config.reference_cache has no effect with --config.reference_mode=resident"
        )
    if config.validation_split_fraction is not None and "validation" in config.validation:
        raise ValueError(
            "--config.validation_split_fraction makes a held-out set named `validation`: give the "
            "one in --config.validation another name"
        )
    if config.max_eval_pairs is not None and not (
        config.validation or config.validation_split_fraction
    ):
        raise ValueError("--config.max_eval_pairs has no effect: there are no held-out pairs")


def _one_of(config: Any, name: str, known, prefix: str = "") -> None:
    if config[name] not in known:
        raise ValueError(
            f"--config.{prefix}{name}={config[name]!r} is none of {', '.join(known)}"
            f"{did_you_mean(str(config[name]), known)}"
        )


def did_you_mean(word: str, known) -> str:
    """' (did you mean …?)', or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values: ("data.layout", "preference_chat") and so on."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

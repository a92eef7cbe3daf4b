"""Checks a config against the table of settings before anything else happens."""

import importlib.util
import re

import ml_collections

from checkpoints_io import hf_hub
from checkpoints_io.errors import BadInput
from recipes.training import by_name, data_checks, written
from recipes.training.by_name import Values
from recipes.training.settings import (
    LOGGING_AND_SAVING,
    OF_FOLDER,
    Table,
    may_be_unset,
    trains,
    trains_on_pairs,
)


def checked(config: ml_collections.ConfigDict, table: Table) -> Values:
    """The settings of a config by name, those it does not name with the table's defaults.

    Raises:
      ValueError: one is missing, unknown, impossible, or contradicts another; the message names
        the flag to change and what it may be.
    """
    by_name.check_names(config, table)
    given = by_name.plain(config, table)
    unset = [n for n in sorted(given) if given[n] is None and not may_be_unset(n, table)]
    if unset:
        raise BadInput(f"please set {', '.join(f'--config.{name}=…' for name in unset)}")
    for name, setting in table.items():
        value = given[name]
        if value is None:
            continue
        if setting.choices:
            data_checks.one_of(name, value, setting.choices)
        if setting.bound and not setting.bound.holds(value):
            raise BadInput(f"--config.{name} must be {setting.bound.says}, not {value}")
    written.precision(given["mp"])
    pairs = trains_on_pairs(table)
    data_checks.check(given, pairs=pairs)
    _check_processes(given)
    if not trains(table):
        _check_scored(given)
        return given
    written.profiled(given["profile"])
    _check_steps(given)
    _check_keep(given, pairs)
    _check_hub(given)
    _refuse_without_effect(given)
    _check_optimizer(given, table)
    _check_adapters(given, table)
    if pairs:
        _check_preference(given)
    return given


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


def _check_steps(given: Values) -> None:
    steps, epochs = given["num_train_steps"], given["num_epochs"]
    if steps is None and epochs is None:
        raise BadInput("set one of --config.num_train_steps=… and --config.num_epochs=…")
    if steps is not None and epochs is not None:
        raise BadInput(
            f"--config.num_train_steps={steps} and --config.num_epochs={epochs} both set the "
            "length of the run; set only one of them: for epochs add "
            "--config.num_train_steps=None, for steps --config.num_epochs=None"
        )


def _check_keep(given: Values, pairs: bool) -> None:
    saved, evaluated = given["steps_per_checkpoint"], given["steps_per_eval"]
    every, best = given["keep_every"], given["keep_best"]
    if every is not None and (saved is None or every % saved):
        raise BadInput(
            f"--config.keep_every={every} must be a multiple of --config.steps_per_checkpoint, "
            f"which is {saved}: there are no checkpoints in between"
        )
    for name in ("keep_best", "stop_when"):
        _check_figure(name, given[name], pairs)
    written.steps_at(given["eval_at"])
    patience = given["stop_patience"]
    if given["stop_when"] is None and patience != LOGGING_AND_SAVING["stop_patience"].default:
        raise BadInput(
            f"--config.stop_patience={patience} has no effect without --config.stop_when: set it "
            "(e.g. heldout/dpo_loss)"
        )
    if given["stop_when"] and evaluated is None and given["eval_at"] is None:
        raise BadInput(
            f"--config.stop_when={given['stop_when']} has no effect without evaluations during "
            "training: set --config.steps_per_eval"
        )
    if best is None:
        return
    if saved is None or evaluated is None or saved % evaluated:
        raise BadInput(
            "--config.keep_best needs --config.steps_per_checkpoint to be a multiple of "
            f"--config.steps_per_eval, but they are {saved} and {evaluated}: there would be "
            "checkpoints without metrics"
        )


def _check_figure(setting: str, figure: str | None, pairs: bool) -> None:
    if figure is None:
        return
    held_out, _, name = figure.rpartition("/")
    known = [known for known in written.BEST_BY if known.startswith("dpo_") == pairs]
    if not held_out or name not in known:
        raise BadInput(
            f"--config.{setting}={figure!r} is not a held-out set with one of {', '.join(known)} "
            f"(e.g. heldout/{'dpo_accuracy' if pairs else 'loss'})"
        )


def _check_hub(given: Values) -> None:
    repo = given["push_to_hub"]
    if repo is None:
        for name in ("hub_strategy", "hub_private"):
            if given[name] != LOGGING_AND_SAVING[name].default:
                raise BadInput(
                    f"--config.{name}={given[name]} has no effect without "
                    "--config.push_to_hub=owner/name"
                )
    elif not re.fullmatch(hf_hub.ID, repo):
        raise BadInput(f"--config.push_to_hub={repo} is not of the form owner/name")
    elif given["steps_per_hf_export"] == -1:
        raise BadInput(
            f"--config.push_to_hub={repo} has no effect with --config.steps_per_hf_export=-1: "
            "nothing is exported"
        )
    elif "://" in given["directory"]:
        raise BadInput(
            f"--config.push_to_hub={repo} only pushes folders of this machine, but "
            f"--config.directory={given['directory']} is elsewhere: leave it out, and push the "
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
                "--config.reference_mode=base is the policy without its adapters, but it has "
                "none: set --config.adapter.rank or --config.adapter.path, or another mode"
            )
        return
    if given["frozen"] in ("int8", "nf4") and given["remat"] == "none":
        raise BadInput(
            "--config.remat=none keeps the weights of all layers dequantised, so "
            f"--config.frozen={given['frozen']} would save nothing: use --config.remat=products"
        )
    if given["trainable"] is not None:
        raise BadInput(
            f"--config.trainable={given['trainable']!r} has no effect: only adapters are trained; "
            "leave out either this or the settings of --config.adapter"
        )
    if begun is not None and (idle := [name for name in changed if name not in OF_FOLDER]):
        raise BadInput(
            f"--config.{idle[0]} has no effect: the adapters in --config.adapter.path={begun} "
            "decide it; leave it out, or start new ones without --config.adapter.path"
        )
    if given.get("adapter.export") == "adapter" and given.get("hf_text_only"):
        raise BadInput(
            "--config.hf_text_only=True has no effect: exports hold only adapters; leave it out, "
            "or set --config.adapter.export=merged"
        )
    named = given.get("reference_model_path")
    if given.get("reference_mode") == "base" and named is not None:
        raise BadInput(
            "--config.reference_mode=base is the policy without its adapters, but "
            f"--config.reference_model_path={named} names another reference: set only one of them"
        )


def _check_scored(given: Values) -> None:
    """Checks scoring: two different models, and sources with distinct names."""
    if given["data.answers"] != 2:
        raise BadInput(
            f"--config.data.answers={given['data.answers']} has no effect: only pairs are scored; "
            "add --config.data.answers=2"
        )
    train = given["train_data"] if isinstance(given["train_data"], dict) else ("train",)
    if alike := [name for name in given["validation"] or () if name in train]:
        raise BadInput(
            f"--config.validation.{alike[0]} has the same name as a source of "
            "--config.train_data, so that their scores could not be told apart: rename it"
        )
    path, named, begun = (
        given[name] for name in ("initialize_from_hf", "reference_model_path", "adapter.path")
    )
    if begun is None and given["reference_is_hf"] and named in (None, path):
        raise BadInput(same_weights(path))
    if begun is None and given["frozen"] is not None:
        raise BadInput(
            f"--config.frozen={given['frozen']} only applies to weights under adapters: name "
            "these with --config.adapter.path=…, or add --config.frozen=None"
        )
    _check_reference(given)


def same_weights(path: str) -> str:
    """Why the scores of a model against itself are refused: the reference was forgotten."""
    return (
        f"policy and reference are both {path}, so every reward would be 0: give the trained "
        "model as --config.initialize_from_hf=… (or its adapters as --config.adapter.path=…), "
        "and the model it was trained from as --config.reference_model_path=…"
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
                "unset it"
            )


def _check_samples(given: Values) -> None:
    if given["steps_per_sample"] is not None:
        return
    for name in ("sample_prompts", "sample_temperature", "sample_count"):
        if given[name] != LOGGING_AND_SAVING[name].default:
            raise BadInput(
                f"--config.{name}={given[name]} has no effect without --config.steps_per_sample: "
                "set it (e.g. 100)"
            )


def _check_optimizer(given: Values, table: Table) -> None:
    meant = lambda value: written.DTYPES.get(value, value)
    for name, setting in table.items():
        idle = setting.of_optimizers and given["optimizer"] not in setting.of_optimizers
        if idle and meant(given[name]) != meant(setting.default):
            raise BadInput(
                f"--config.{name}={given[name]} has no effect with "
                f"--config.optimizer={given['optimizer']}: it only applies to "
                f"{', '.join(setting.of_optimizers)}; leave it out, or set "
                f"--config.{name}={setting.default}"
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

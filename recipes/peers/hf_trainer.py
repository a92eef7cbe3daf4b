"""The settings of transformers' Trainer, shared by TRL, LLaMA-Factory and, renamed, axolotl."""

from collections.abc import Iterable
import re

from checkpoints_io import hf_hub
from recipes.peers.rows import Given, Lacks, Row, idle, is_off, lacks, of_kind, part, same, turned

# Other trainers' names of our optimizers, without the words for how they are computed.
OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "lion": "lion", "lion8bit": "lion",
    "rmsprop": "rmsprop", "rmsprop8bit": "rmsprop", "adafactor": "adafactor", "muon": "muon",
}  # fmt: skip
BEST = {
    "eval_loss": "dpo_loss", "loss": "dpo_loss",
    "eval_rewards/accuracies": "dpo_accuracy", "rewards/accuracies": "dpo_accuracy",
    "eval_rewards/margins": "dpo_reward_margin", "rewards/margins": "dpo_reward_margin",
}  # fmt: skip


def steps(ours: str) -> Row:
    """A setting that is a number of steps; a fraction of all steps has no counterpart."""

    def turn(value: int | float | str) -> object:
        if not float(value) >= 1:
            raise Lacks(f"{ours} is a number of steps, not a fraction of them: set it by hand")
        return of_kind(ours, value)

    return turned(ours, turn)


ROWS = {
    "output_dir": same("directory"),
    "run_name": same("name"),
    "seed": same("seed", "the order of the data differs"),
    "num_train_epochs": part("num_epochs", "unless max_steps is set"),
    "max_steps": part("num_train_steps"),
    "per_device_train_batch_size": part(
        "train_batch_size", "times gradient_accumulation_steps and the devices: an update has "
        "this many pairs on any number of devices"
    ),
    "gradient_accumulation_steps": part("train_batch_size"),
    "learning_rate": same("learning_rate"),
    "lr_scheduler_type": part("lr_schedule", "linear, cosine, cosine_with_min_lr, constant, "
                              "constant_with_warmup, inverse_sqrt"),
    "lr_scheduler_kwargs*": part("min_lr_ratio", "min_lr_rate or min_lr of cosine_with_min_lr"),
    "warmup_steps": part("warmup", "below 1 a fraction of all steps, as here"),
    "warmup_ratio": part("warmup"),
    "optim": part("optimizer", "names with fused, paged and the like are one optimizer here"),
    "adam_beta1": part("adam_beta1", "for adamw, adamw8bit and muon"),
    "adam_beta2": part("adam_beta2", "their default is 0.999, here it is 0.95"),
    "adam_epsilon": part("adam_epsilon"),
    "weight_decay": same("weight_decay"),
    "max_grad_norm": turned("max_grad_norm", lambda norm: float(norm) or None),
    "bf16": part("mp", "p=f32,c=bfloat16: trained weights stay in float32"),
    "fp16": part("mp", "computed in bfloat16 here"),
    "gradient_checkpointing": part("remat", "unset, or none"),
    "logging_steps": steps("steps_per_log"),
    "eval_strategy": part("steps_per_eval", "by steps; epoch has no counterpart"),
    "evaluation_strategy": part("steps_per_eval", "an older name of eval_strategy"),
    "eval_steps": part("steps_per_eval"),
    "eval_on_start": same("run_initial_eval"),
    "save_strategy": part("steps_per_checkpoint", "by steps; epoch has no counterpart"),
    "save_steps": part("steps_per_checkpoint"),
    "save_total_limit": same("keep_checkpoints", "unset, all are kept there, only the newest here"),
    "load_best_model_at_end": part("keep_best", "and the best is exported"),
    "metric_for_best_model": part("keep_best", "eval_loss, rewards/accuracies, rewards/margins"),
    "report_to": part(
        "tensorboard, wandb_project, trackio_project", "metrics.jsonl is always written"
    ),
    "project": part("wandb_project, trackio_project"),
    "push_to_hub": part("push_to_hub"),
    "hub_model_id": part("push_to_hub", "written like owner/name"),
    "hub_strategy": turned("hub_strategy", lambda how: "end" if how == "end" else "every"),
    "hub_private_repo": same("hub_private", "a new repository is private here by default"),
    **lacks("set in the environment: TRACKIO_SPACE_ID", "trackio_space_id", "trackio_bucket_id",
            "trackio_static_space_id"),
    **lacks("there is only one seed: set seed", "data_seed"),
    **lacks("evaluations are at steps_per_eval and eval_at", "eval_delay"),
    **lacks("noise on embeddings is not supported: leave it out", "neftune_noise_alpha"),
    **lacks("of the language model's loss: label_smoothing is that of pairs",
            "label_smoothing_factor"),
    **lacks("optimizers only take the settings listed here", "optim_args*",
            "optim_target_modules"),
    **idle("the same command resumes a run, and another run's directory is refused",
           "resume_from_checkpoint", "overwrite_output_dir", "ignore_data_skip"),
    **idle("the recipe trains, and evaluates where something is held out", "do_train", "do_eval",
           "do_predict"),
    **idle("weights and rows are split over all devices (mesh.fsdp=-1)", "deepspeed*", "fsdp",
           "fsdp_config*", "accelerator_config*", "ddp_timeout", "ddp_backend",
           "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "local_rank"),
    **idle("the rows of a micro-batch are chosen to fit the memory (per_device_parallelism)",
           "per_device_eval_batch_size", "auto_find_batch_size", "eval_accumulation_steps"),
    **idle("rows are packed, so lengths need no grouping", "group_by_length",
           "train_sampling_strategy", "length_column_name"),
    **idle("everything is compiled by XLA", "torch_compile", "torch_compile_backend",
           "torch_compile_mode", "use_liger_kernel", "liger_kernel_config*", "tf32",
           "torch_empty_cache_steps"),
    **idle("a detail of how torch recomputes", "gradient_checkpointing_kwargs*"),
    **idle("data is prefetched automatically", "dataloader_num_workers", "dataloader_pin_memory",
           "dataloader_drop_last", "dataloader_prefetch_factor", "dataloader_persistent_workers",
           "remove_unused_columns"),
    **idle("an export only holds the model", "save_only_model", "save_safetensors"),
    **idle("the recipe decides what is printed", "log_level", "log_level_replica", "disable_tqdm",
           "logging_strategy", "logging_first_step", "include_num_input_tokens_seen"),
    **idle("runs resume to the same bits", "full_determinism"),
    **idle("jax uses the devices that it finds (JAX_PLATFORMS)", "use_cpu"),
    **idle("determined by the metric", "greater_is_better"),
    **idle("the hub's token is HF_TOKEN, or that of `hf auth login`", "hub_token"),
}  # fmt: skip
DEFAULTS = {
    "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "optim": "adamw_torch", "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "save_strategy": "steps",
    "save_steps": 500, "eval_strategy": "no", "seed": 42,
}  # fmt: skip


def made(given: Given, held_out: str | None) -> dict[str, object]:
    """Our settings that combine several of the Trainer's; `held_out` names the held-out set."""
    theirs = given.values
    micro, times = (
        int(theirs[n]) for n in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    found: dict[str, object] = {"train_batch_size": micro * times * given.devices}
    named = {"per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_size"}
    whose = "" if named & given.named else " (the defaults there)"
    told = f"an update is {micro} x {times}{whose} x {given.devices} devices: --devices=N says how "
    given.notes.differs.append(("per_device_train_batch_size", f"{told}many there were"))
    if float(theirs.get("max_steps") or -1) > 0:
        found["num_train_steps"] = int(theirs["max_steps"])
    else:
        found["num_epochs"] = float(theirs["num_train_epochs"])
    if theirs.get("fp16"):
        given.notes.differs.append(("fp16", "bfloat16 here, which needs no scale of the loss"))
    if theirs.get("warmup_ratio") and "warmup_steps" in given.named:
        told = "both are named, and the ratio is taken; earlier versions took the steps"
        given.notes.differs.append(("warmup_ratio, warmup_steps", told))
    found["mp"] = "p=f32,c=f32" if theirs.get("bf16") is False and not theirs.get("fp16") else (
        "p=f32,c=bfloat16"
    )  # fmt: skip
    if not theirs.get("gradient_checkpointing", True):
        found["remat"] = "none"
    return found | _rate(given) | _optimizer(given) | _along_the_way(given, held_out)


def lora(
    rank: int | float | str, alpha: int | float | str, targets: str | Iterable[object] | None
) -> dict[str, object]:
    """The settings of new adapters, whose B starts at zero, as in PEFT."""
    names = [targets] if isinstance(targets, str) else list(targets or ())
    names = [one.strip() for name in names for one in str(name).split(",")]
    everything = not names or "all" in names or "all-linear" in names
    return {
        "adapter.rank": int(rank),
        "adapter.alpha": float(alpha),
        "adapter.targets": ("all-linear",) if everything else tuple(names),
        "adapter.zero": "B",
    }


def losses(names: str | Iterable[object], weights: Iterable[int | float | str] | None) -> str:
    """Several losses with their weights, in the form that `loss` takes."""
    each = [names] if isinstance(names, str) else list(names)
    each = [one.strip() for name in each for one in str(name).split(",")]
    counts = list(weights) if weights else [1] * len(each)
    told = [
        name if float(w) == 1 else f"{name}={float(w):g}"
        for name, w in zip(each, counts, strict=True)
    ]
    return ",".join(told)


def _rate(given: Given) -> dict[str, object]:
    theirs, found = given.values, {}
    kind, more = str(theirs["lr_scheduler_type"]), theirs.get("lr_scheduler_kwargs") or {}
    more = more if isinstance(more, dict) else {}
    more |= {name.rpartition(".")[2]: x for name, x in theirs.items()
             if name.startswith("lr_scheduler_kwargs.")}  # fmt: skip
    known = {"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"}
    schedule = known.get(kind, kind)
    if schedule not in ("linear", "cosine", "constant", "inverse_sqrt"):
        told = "linear in its place; lr_schedule has linear, cosine, constant and inverse_sqrt"
        given.notes.lacking.append((f"lr_scheduler_type: {kind}", told))
        schedule = "linear"
    found["lr_schedule"] = schedule
    read = {"min_lr", "min_lr_rate"} if kind == "cosine_with_min_lr" else set()
    for name in sorted(more.keys() - read):
        told = f"{more[name]!r}; lr_schedule is {schedule}, as it is"
        given.notes.lacking.append((f"lr_scheduler_kwargs.{name}", told))
    if kind == "cosine_with_min_lr":
        least = more.get("min_lr_rate")
        if least is None:
            least = round(float(more.get("min_lr") or 0) / float(theirs["learning_rate"]), 9)
        found["min_lr_ratio"] = float(least)
    warmup = float(theirs.get("warmup_ratio") or 0) or float(theirs.get("warmup_steps") or 0)
    found["warmup"] = 0.0 if kind == "constant" else warmup
    return found


def _optimizer(given: Given) -> dict[str, object]:
    name = str(given.values["optim"])
    plain = re.sub(r"_?(torch|fused|hf|apex|xla|npu|paged|bnb|32bit|anyprecision)", "", name)
    kind = OPTIMIZERS.get(plain.strip("_").replace("_", ""))
    if kind is None:
        told = f"adamw in its place; optimizer has {', '.join(sorted({*OPTIMIZERS.values()}))}"
        given.notes.lacking.append((f"optim: {name}", told))
        kind = "adamw"
    betas = ("adam_beta1", "adam_beta2", "adam_epsilon")
    if kind in ("adamw", "adamw8bit", "muon"):
        return {"optimizer": kind} | {n: float(given.values[n]) for n in betas}
    given.notes.lacking.extend((n, f"not of {kind}") for n in betas if n in given.named)
    return {"optimizer": kind}


def _along_the_way(given: Given, held_out: str | None) -> dict[str, object]:
    theirs, found = given.values, {}
    every = {}
    strategy = theirs.get("evaluation_strategy") or theirs["eval_strategy"]
    for what, how, ours in (("eval", strategy, "steps_per_eval"),
                            ("save", theirs["save_strategy"], "steps_per_checkpoint")):  # fmt: skip
        often = theirs.get(f"{what}_steps") or theirs.get("logging_steps") or 500
        if how == "steps" and float(often) >= 1:
            every[ours] = int(float(often))
        elif not is_off(how) and how is not False:
            told = f"only after the last step; {ours} is a number of steps: set it by hand"
            given.notes.lacking.append(
                (f"{what}_strategy: {how}" if how != "steps" else f"{what}_steps: {often}", told)
            )
    if held_out is None:
        every.pop("steps_per_eval", None)
    found |= every
    if theirs.get("load_best_model_at_end") and held_out:
        figure = str(theirs.get("metric_for_best_model") or "loss")
        if figure in BEST and len(every) == 2:
            found["keep_best"] = f"{held_out}/{BEST[figure]}"
        else:
            told = f"keep_best is one of {', '.join(sorted({*BEST.values()}))} of a held-out set, "
            told += "evaluated at every checkpoint"
            given.notes.lacking.append((f"metric_for_best_model: {figure}", told))
    return found | _reported(given) | _pushed(given)


def _reported(given: Given) -> dict[str, object]:
    to = given.values.get("report_to")
    if to is None:
        return {}
    to = [to] if isinstance(to, str) else to or []
    found: dict[str, object] = {"tensorboard": bool({"tensorboard", "all"} & {*to})}
    for tracker in ("wandb", "trackio"):
        if tracker in to:
            found[f"{tracker}_project"] = str(given.values.get("project") or "huggingface")
    if others := sorted({*to} - {"tensorboard", "all", "wandb", "trackio", "none"}):
        told = "metrics are in metrics.jsonl, and go to TensorBoard, Weights & Biases and trackio"
        given.notes.lacking.append((f"report_to: {', '.join(others)}", told))
    return found


def _pushed(given: Given) -> dict[str, object]:
    if not given.values.get("push_to_hub"):
        return {}
    repo = str(given.values.get("hub_model_id") or "")
    if re.fullmatch(hf_hub.ID, repo):
        return {"push_to_hub": repo}
    told = "set push_to_hub to owner/name"
    given.notes.lacking.append((f"hub_model_id: {repo or 'not named'}", told))
    return {}

"""Levanter: `python -m levanter.main.train_dpo --config_path`, of 2026; lora_dpo too."""

from recipes.peers import levanter_data
from recipes.peers.rows import (
    Given,
    Lacks,
    Row,
    Source,
    idle,
    lacks,
    of_kind,
    part,
    same,
    turned,
)
from recipes.training.settings import ALL


def _minutes(interval: object) -> object:
    """An interval in minutes, from a value like 600, "10m" or "15min"."""
    text = str(interval).strip()
    units = {"s": 1 / 60, "sec": 1 / 60, "m": 1, "min": 1, "minutes": 1, "h": 60}
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    return float(number) * units.get(text[len(number) :].strip() or "s", 1)


def _positive(ours: str) -> Row:
    """A setting for which -1 means unset."""
    return turned(ours, lambda n: of_kind(ours, n) if float(n) > 0 else None)


def _of_hf(is_hf: object) -> object:
    if not is_hf:
        raise Lacks("a checkpoint of Levanter's cannot be read: export it to a Hugging Face folder")
    return True


def _schedule(kind: object) -> object:
    found = "inverse_sqrt" if kind == "inv_sqrt" else kind
    if found not in ("constant", "linear", "cosine", "inverse_sqrt"):
        raise Lacks("lr_schedule has linear, cosine, constant and inverse_sqrt")
    return found


def _optimizer(kind: object) -> object:
    if kind not in ("adam", "adamw", "lion", "muon", "rmsprop"):
        raise Lacks(f"optimizer has {', '.join(ALL['optimizer'].choices)}")
    return "adamw" if kind == "adam" else kind


ROWS = {
    "initialize_from_hf": same("initialize_from_hf"),
    "reference_model_path": same("reference_model_path"),
    "reference_is_hf": turned(
        "reference_is_hf", _of_hf, "false here is the directory of a run of ours"
    ),
    "reference.type": part("reference_model_path", "adapter_base: the frozen weights, as new "
                           "adapters have it by themselves"),
    "reference.model_path": same("reference_model_path"),
    "reference.is_hf": turned(
        "reference_is_hf", _of_hf, "false here is the directory of a run of ours"
    ),
    "reference_eval_cache.mode": part("reference_mode", "cached: of the training data too, "
                                      "by content"),
    "reference_eval_cache.cache_dir": part("reference_cache"),
    "beta": same("beta"),
    "train_seq_len": same("train_seq_len", "rows are packed, not padded to it"),
    "validation_split_fraction": same("validation_split_fraction"),
    "gamma_beta_ratio": part("gamma_beta_ratio", "of train_simpo, and loss=simpo"),
    "run_initial_eval": same("run_initial_eval"),
    "scheduled_eval_steps": turned("eval_at", lambda steps: ",".join(map(str, steps)) or None),
    "epoch": part("num_epochs"),
    "data.tokenizer": same("tokenizer"),
    "data.configs.*.train_urls": part("train_data", "raw files; several are a path with *"),
    "data.configs.*.validation_urls": part("validation"),
    "data.components.*.source.train_urls": part("train_data"),
    "data.components.*.source.validation_urls": part("validation"),
    "data.components.*.source.id": part("train_data", "a dataset of the hub"),
    "data.train_urls": part("train_data"),
    "data.validation_urls": part("validation"),
    "data.id": part("train_data"),
    "data.train_weights.*": part("train_data", "the weight of each"),
    "data.*.format.chosen_field": part("data.columns"),
    "data.*.format.rejected_field": part("data.columns"),
    "data.*.format.slice_strategy": part("data.over_length", "left is cut_answer, right is "
                                         "cut_prompt, raise and drop are drop"),
    "data.*.format.mask_user_turns": part("data.scored_turns", "false is all"),
    "adapter.type": part("adapter.rank"),
    "adapter.r": part("adapter.rank"),
    "adapter.alpha": part("adapter.alpha"),
    "adapter.target_modules": part("adapter.targets", "unset, all-linear"),
    "adapter.exclude_modules": same("adapter.exclude"),
    "adapter.zero_init_b": part("adapter.zero", "true is B"),
    "adapter.a_init_mode": part("adapter.zero", "zero is A"),
    "lora.r": part("adapter.rank"),
    "lora.alpha": part("adapter.alpha"),
    "lora.target_modules": part("adapter.targets"),
    "lora.exclude_modules": same("adapter.exclude"),
    "lora.zero_init_b": part("adapter.zero"),
    "lora.a_init_mode": part("adapter.zero"),
    "optimizer.type": turned("optimizer", _optimizer, "adam is adamw"),
    "optimizer.learning_rate": same("learning_rate"),
    "optimizer.weight_decay": same("weight_decay"),
    "optimizer.min_lr_ratio": same("min_lr_ratio"),
    "optimizer.warmup": same("warmup"),
    "optimizer.warmup_ratio": same("warmup"),
    "optimizer.decay": same("cooldown"),
    "optimizer.cooldown": same("cooldown"),
    "optimizer.lr_schedule": turned("lr_schedule", _schedule, "inv_sqrt is inverse_sqrt"),
    "optimizer.beta1": same("adam_beta1"),
    "optimizer.beta2": same("adam_beta2"),
    "optimizer.epsilon": same("adam_epsilon"),
    "optimizer.max_grad_norm": same("max_grad_norm"),
    "trainer.seed": same("seed"),
    "data_seed": same("seed", "the order of the data, and all else that is drawn"),
    "trainer.mp": turned("mp", lambda mp: {"f32": "p=f32,c=f32", "bf16": "p=f32,c=bfloat16",
                                           "bfloat16": "p=f32,c=bfloat16"}.get(mp, mp)),
    "trainer.num_train_steps": same("num_train_steps"),
    "trainer.train_batch_size": same("train_batch_size", "one number"),
    "trainer.per_device_parallelism": _positive("per_device_parallelism"),
    "trainer.steps_per_eval": same("steps_per_eval"),
    "trainer.id": same("name"),
    "trainer.tracker.type": part("tensorboard, wandb_project"),
    "trainer.tracker.project": part("wandb_project"),
    "trainer.tracker.name": same("name"),
    "trainer.tracker.tags": same("tags"),
    "trainer.wandb.project": part("wandb_project"),
    "trainer.wandb.name": same("name"),
    "trainer.wandb.tags": same("tags"),
    "trainer.checkpointer.base_path": same("directory", "checkpoints are a folder in it"),
    "trainer.checkpointer.save_interval": turned("minutes_per_checkpoint", _minutes),
    "trainer.checkpointer.keep": part("steps_per_checkpoint, keep_every", "the first rule's every"),
    "trainer.crash_on_nan": turned("nonfinite", lambda on: "stop" if on else "skip"),
    "trainer.jax_compilation_cache_dir": same("compile_cache"),
    "trainer.model_axis_size": same("mesh.tensor"),
    "trainer.tensor_parallel_axes": part("mesh.tensor"),
    "trainer.mesh.axes.model": same("mesh.tensor"),
    "trainer.mesh.axes.replica": same("mesh.data"),
    "trainer.distributed.coordinator_address": same("distributed.coordinator_address"),
    "trainer.distributed.num_processes": same("distributed.num_processes"),
    "trainer.distributed.process_id": same("distributed.process_id"),
    "trainer.model_averaging.beta": same("ema_decay"),
    "trainer.require_accelerator": same("require_accelerator"),
    "model.gradient_checkpointing": turned("remat", lambda on: "full" if on else "none"),
    "hf_save_steps": same("steps_per_hf_export"),
    "hf_save_dtype": same("hf_save_dtype"),
    "hf_upload": part("push_to_hub", "written like owner/name"),
    "peft_save_path": part("adapter.export", "adapter: in DIRECTORY/hf"),
    "merged_hf_save_path": part("adapter.export", "merged: in DIRECTORY/hf"),
    **lacks("a checkpoint of Levanter's cannot be read: export it to a Hugging Face folder",
            "initialize_from_checkpoint_path", "trainer.initialize_from",
            "trainer.load_checkpoint_path", "initialize_from"),
    **lacks("adapters have no dropout: policy and reference would differ before the first step",
            "adapter.dropout", "lora.dropout"),
    **lacks("name files of plain text in validation_texts", "lm_validation_data*"),
    **lacks("rates are one plateau: warmup, cooldown and lr_schedule", "optimizer.rewarmup",
            "optimizer.cycle_length", "optimizer.cycles"),
    **lacks("max_eval_pairs is a number of pairs", "trainer.max_eval_batches"),
    **lacks("only matrices decay", "optimizer.weight_decay_modules",
            "optimizer.default_weight_decay_mask"),
    **lacks("nonfinite=skip skips an update that is NaN or infinite", "optimizer.skip_bad_steps*"),
    **lacks("computed in bfloat16 or float32; frozen weights by frozen", "trainer.quantization*"),
    **lacks("a system prompt is a column of the data", "data.*.format.system_prompt"),
    **lacks("chat templates are the tokenizer's own, or a file: chat_template",
            "data.*.format.chat_template", "data.chat_template"),
    **idle("config.json decides", "model.*", "use_hf_model_config", "trust_remote_code"),
    **idle("exports are in DIRECTORY/hf", "hf_save_path", "peft_hf_upload", "merged_hf_upload"),
    **idle("the end of turn is in generation_config.json", "hf_generation_eos_token_ids"),
    **idle("tokens are kept by content (token_cache)", "data.cache_dir", "data.cache_options*",
           "data.auto_build_caches", "data.*.cache_dir", "data.enforce_eos"),
    **idle("layouts are recognised, rows shuffled, each epoch otherwise, and packed",
           "data.*.format.type", "data.*.format.pack", "data.format*", "data.*.source.type",
           "data.*.format.chat_template_kwargs", "data.shuffle*", "data.permutation_type",
           "data.mixture_block_size", "data.stop_strategy", "data.shuffle_before_trainval_split",
           "data.block_cross_document_attention", "data.*.source.stream", "data.*.tags",
           "data.*.source.splits"),
    **idle("weights and rows are split over all devices (mesh.fsdp=-1)", "trainer.fsdp_axis",
           "trainer.batch_axis", "trainer.mesh*", "trainer.replica_*",
           "trainer.use_explicit_mesh_axes", "trainer.allow_nondivisible_batch_size",
           "trainer.per_device_eval_parallelism", "trainer.axis_resources*",
           "trainer.parameter_axis_resources*"),
    **idle("for launching, or for other trackers", "trainer.ray*", "trainer.log_*",
           "trainer.profiler*", "trainer.watch*", "trainer.jax_config*", "trainer.checkpointer*",
           "trainer.load_checkpoint", "trainer.allow_partial_checkpoint", "trainer.wandb*",
           "trainer.tracker*", "trainer.crash_on_inf", "trainer.shutdown_at_exit",
           "trainer.distributed*", "trainer.model_averaging.type", "trainer.progress_watchdog*",
           "lm_validation_prefix"),
}  # fmt: skip
DEFAULTS = {
    "beta": 0.1, "reference_is_hf": True, "validation_split_fraction": 0.1,
    "optimizer.learning_rate": 6e-4, "optimizer.weight_decay": 0.1, "optimizer.min_lr_ratio": 0.1,
    "optimizer.warmup": 0.01, "optimizer.lr_schedule": "cosine", "optimizer.max_grad_norm": 1.0,
    "optimizer.type": "adam", "optimizer.beta1": 0.9, "optimizer.beta2": 0.95,
    "optimizer.epsilon": 1e-8, "hf_save_dtype": "float32", "trainer.seed": 0, "trainer.mp": "f32",
    "trainer.num_train_steps": 400_000, "trainer.train_batch_size": 512,
    "trainer.steps_per_eval": 1000, "trainer.checkpointer.save_interval": "15m",
}  # fmt: skip


def _made(given: Given) -> dict[str, object]:
    theirs = given.values
    found: dict[str, object] = {"loss": "sigmoid"} | levanter_data.sources(given) | _adapters(given)
    if theirs.get("validation_split_fraction") and found.pop("validation", None):
        told = "held-out files are read there only where this is null"
        given.notes.differs.append(("validation_split_fraction", told))
    if theirs.get("gamma_beta_ratio"):
        found |= {"loss": "simpo", "gamma_beta_ratio": float(theirs["gamma_beta_ratio"])}
    if theirs.get("epoch"):
        found |= {"num_epochs": float(theirs["epoch"]), "num_train_steps": None}
    if "train_seq_len" not in given.named:
        longest = int(theirs.get("model.max_seq_len") or 4096)
        found["train_seq_len"] = longest
        told = f"not named: {longest}; set it to the tokens of a prompt with its answer"
        given.notes.differs.append(("train_seq_len", told))
    if theirs.get("reference.type") == "adapter_base":
        found["reference_model_path"] = None
    elif theirs.get("reference_eval_cache.mode") not in (None, "disabled"):
        found["reference_mode"] = "cached"
        if folder := theirs.get("reference_eval_cache.cache_dir"):
            found["reference_cache"] = folder
    reference = theirs.get("reference.model_path") or theirs.get("reference_model_path")
    if reference == theirs.get("initialize_from_hf"):
        found["reference_model_path"] = None
    if keep := theirs.get("trainer.checkpointer.keep"):
        found["steps_per_checkpoint"] = found["keep_every"] = int(keep[0]["every"])
    if theirs.get("trainer.tensor_parallel_axes") and "mesh.tensor" not in found:
        told = "mesh.tensor is the number of devices that split a row's work"
        given.notes.differs.append(("trainer.tensor_parallel_axes", told))
    tracker = theirs.get("trainer.tracker.type")
    if tracker == "wandb" or theirs.get("trainer.wandb.project"):
        project = theirs.get("trainer.tracker.project") or theirs.get("trainer.wandb.project")
        found["wandb_project"] = str(project or "levanter")
    if isinstance(theirs.get("hf_upload"), str):
        found["push_to_hub"] = theirs["hf_upload"]
    if "trainer.distributed.coordinator_address" in given.named:
        found["distributed.enabled"] = True
    if theirs.get("merged_hf_save_path"):
        found["adapter.export"] = "merged"
    return found


def _adapters(given: Given) -> dict[str, object]:
    theirs = given.values
    group = "lora" if any(name.startswith("lora.") for name in theirs) else "adapter"
    if group == "adapter" and theirs.get("adapter.type", "none") == "none":
        return {}
    rank = int(theirs.get(f"{group}.r") or 8)
    targets = theirs.get(f"{group}.target_modules")
    targets = (targets,) if isinstance(targets, str) else tuple(targets or ("all-linear",))
    zero_b = theirs.get(f"{group}.zero_init_b") or theirs.get(f"{group}.a_init_mode") == "random"
    return {
        "adapter.rank": rank,
        "adapter.alpha": float(theirs.get(f"{group}.alpha") or 8),
        "adapter.targets": targets,
        "adapter.zero": "B" if zero_b else "A",
    }


LEVANTER = Source(
    "Levanter",
    "python -m levanter.main.train_dpo --config_path",
    ROWS,
    DEFAULTS,
    _made,
    nulls=(
        "validation_split_fraction",
        "optimizer.max_grad_norm",
        "trainer.checkpointer.save_interval",
    ),
)

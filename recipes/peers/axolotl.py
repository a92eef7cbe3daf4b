"""axolotl: `axolotl train`, with rl: dpo, ipo, simpo, orpo or kto. As of 0.19."""

from collections.abc import Sequence
from typing import Any

from checkpoints_io.errors import BadInput
from recipes.peers import hf_trainer
from recipes.peers.rows import (
    Given,
    Source,
    Values,
    held_out,
    idle,
    is_off,
    lacks,
    part,
    same,
    trained_on,
    turned,
)
from recipes.peers.trl import paths, say_unread

LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "simpo": "simpo", "kto": "kto", "orpo": "orpo"}
# What the Trainer calls it.
RENAMED = {
    "micro_batch_size": "per_device_train_batch_size", "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type", "optimizer": "optim", "wandb_project": "project",
}  # fmt: skip

ROWS = {
    **{name: row for name, row in hf_trainer.ROWS.items() if name not in RENAMED.values()},
    "base_model": same("initialize_from_hf"),
    "tokenizer_config": same("tokenizer"),
    "chat_template_jinja": same("chat_template", "here a file", differs=True),
    "rl": part("loss", "dpo, ipo, simpo, orpo, kto"),
    "rl_beta": part("beta"),
    "trl.beta": part("beta"),
    "dpo_loss_type": part("loss", "the same names, with weights: sigmoid=0.8,sft=0.2"),
    "dpo_loss_weights": part("loss"),
    "dpo_label_smoothing": same("label_smoothing"),
    "dpo_use_weighting": turned("use_weighting", lambda on: True if on else None),
    "orpo_alpha": part("loss", "sft,orpo=orpo_alpha"),
    "simpo_gamma": part("gamma_beta_ratio", "divided by beta"),
    "cpo_alpha": part("loss", "simpo,sft=cpo_alpha; 1 if it is not named"),
    "kto_desirable_weight": part("desirable_weight", "of kto"),
    "kto_undesirable_weight": part("undesirable_weight", "of kto"),
    "precompute_ref_log_probs": turned(
        "reference_mode", lambda on: "cached" if on else "resident", "kept on disk for other runs"
    ),
    "datasets": part("train_data", "path, name, split and revision as owner/name:subset:split@"
                     "revision, or data_files; layouts are recognised from columns"),
    "test_datasets": part("validation"),
    "val_set_size": part("validation_split_fraction", "a fraction of the prompts"),
    "sequence_len": same("train_seq_len"),
    "excess_length_strategy": turned(
        "data.over_length", lambda how: "cut_answer" if how == "truncate" else "drop"
    ),
    "adapter": part("adapter.rank", "lora and qlora"),
    "lora_r": part("adapter.rank"),
    "lora_alpha": part("adapter.alpha"),
    "lora_target_modules": part("adapter.targets"),
    "lora_target_linear": part("adapter.targets", "all-linear"),
    "lora_model_dir": same("adapter.path"),
    "lora_rank_pattern.*": part("adapter.rank_pattern"),
    "lora_alpha_pattern.*": part("adapter.alpha_pattern"),
    "peft_layers_to_transform": part("adapter.layers", "written like 0-7,12"),
    "peft_use_dora": part("adapter.dora"),
    "peft_use_rslora": part("adapter.rslora"),
    "loraplus_lr_ratio": part("adapter.lora_plus"),
    "load_in_8bit": part("frozen", "int8, beside adapters"),
    "load_in_4bit": part("frozen", "nf4, beside adapters"),
    "micro_batch_size": part("train_batch_size", "times gradient_accumulation_steps and the "
                             "devices"),
    "num_epochs": part("num_epochs", "unless max_steps is set"),
    "optimizer": part("optimizer", "names with fused, paged, torch, bnb are one optimizer here"),
    "lr_scheduler": part("lr_schedule", "linear, cosine, constant, inverse_sqrt"),
    "cosine_min_lr_ratio": same("min_lr_ratio"),
    "evals_per_epoch": part("steps_per_eval", "no counterpart: a number of steps"),
    "saves_per_epoch": part("steps_per_checkpoint", "no counterpart: a number of steps"),
    "use_tensorboard": same("tensorboard"),
    "wandb_project": part("wandb_project"),
    "wandb_name": same("name"),
    "wandb_run_id": same("name"),
    "use_trackio": part("trackio_project"),
    "trackio_project_name": part("trackio_project"),
    "trackio_run_name": same("name"),
    "early_stopping_patience": part("stop_when, stop_patience"),
    "bfloat16": part("mp", "p=f32,c=bfloat16"),
    "unfrozen_parameters": turned(
        "trainable", lambda names: "|".join(f"(?:.*{name}.*)" for name in names),
        "a regular expression over whole names",
    ),
    "tensor_parallel_size": same("mesh.tensor"),
    "dp_replicate_size": same("mesh.data"),
    **lacks("chat templates are the tokenizer's own, or a file: chat_template", "chat_template",
            "default_system_message", "chat_template_kwargs*", "tokens", "eot_tokens",
            "added_tokens_overrides*"),
    **lacks("adapters have no dropout: policy and reference would differ before the first step",
            "lora_dropout"),
    **lacks("whole weights cannot be trained beside adapters", "lora_modules_to_save"),
    **lacks("name the modules in adapter.targets", "lora_target_parameters", "peft_*", "peft.*",
            "loraplus_lr_embedding"),
    **lacks("adapters are LoRA and DoRA, trained once", "relora*", "loftq*", "gptq"),
    **lacks("rows are on devices as long as they are: no parallelism over positions",
            "sequence_parallel_degree", "context_parallel_size", "ring_attn_func"),
    **lacks("one rate, and adapter.lora_plus", "embedding_lr", "embedding_lr_scale", "lr_groups",
            "cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_div_factor"),
    **lacks("a NaN or infinite loss stops the run (nonfinite)", "loss_watchdog_*"),
    **lacks("remove them from the file", "dataset_exact_deduplication"),
    **lacks("samples are steps_per_sample and sample_tokens", "generate_samples",
            "num_generation_samples", "generation_*", "eval_table_size", "eval_max_new_tokens",
            "eval_table_max_new_tokens"),
    **lacks("metrics are in metrics.jsonl, TensorBoard and Weights & Biases", "use_mlflow",
            "mlflow_*", "use_comet", "comet_*", "plugins"),
    **lacks("less memory by remat, frozen=nf4, reference_mode=cached or mesh.fsdp",
            "activation_offloading", "layer_offloading"),
    **lacks("config.json decides", "resize_token_embeddings_to_32x", "overrides_of_model_config*",
            "overrides_of_model_kwargs*", "rope_scaling*"),
    **lacks("computed in bfloat16 or float32", "fp8", "fp8_*", "quantization*", "qat*"),
    **lacks("set in the environment: TRACKIO_SPACE_ID", "trackio_space_id"),
    **lacks("set in the environment: WANDB_ENTITY, WANDB_MODE, WANDB_LOG_MODEL", "wandb_entity",
            "wandb_mode", "wandb_watch", "wandb_log_model"),
    **idle("tokens are those of the tokenizer; masks need no padding", "special_tokens*"),
    **idle("config.json decides", "model_type", "tokenizer_type", "tokenizer_use_fast",
           "tokenizer_legacy", "is_llama_derived_model", "is_mistral_derived_model",
           "is_qwen_derived_model", "is_falcon_derived_model", "type_of_model",
           "base_model_config", "processor_type", "trust_remote_code"),
    **idle("rows are always packed, each prompt once", "sample_packing", "eval_sample_packing",
           "sample_packing_*", "pad_to_sequence_len", "pad_to_multiple_of", "batch_flattening",
           "dpo_padding_free", "multipack_real_batches", "max_prompt_len", "min_sample_len",
           "eval_sequence_len"),
    **idle("the platform's best is used (attention)", "flash_attention", "xformers_attention",
           "sdp_attention", "eager_attention", "flex_attention", "attn_implementation",
           "flash_attn_*", "sage_attention", "s2_attention"),
    **idle("everything is compiled by XLA", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
           "dpo_use_liger_kernel", "liger_*", "use_kernels", "cut_cross_entropy",
           "chunked_cross_entropy*", "tiled_mlp*", "unsloth_*", "gc_steps", "deepcompile"),
    **idle("tokens are kept by content (token_cache), with one process per core",
           "dataset_prepared_path", "dataset_processes", "dataset_num_proc",
           "dataset_keep_in_memory", "shuffle_merged_datasets", "streaming",
           "skip_prepare_dataset"),
    **idle("weights and rows are split over all devices (mesh.fsdp=-1)", "fsdp*", "deepspeed*",
           "dp_shard_size", "ddp*", "device_map", "max_memory", "gpu_memory_limit", "world_size",
           "low_cpu_mem_usage", "qlora_sharded_model_loading", "lora_on_cpu"),
    **idle("prompts are never scored", "train_on_inputs", "lora_fan_in_fan_out"),
    **idle("for other programs, or for launching", "strict", "debug", "hf_use_auth_token",
           "merge_*", "push_dataset_to_hub", "auto_resume_from_checkpoints", "save_first_step",
           "include_tokens_per_second", "include_tkps", "bnb_config_kwargs*", "eval_batch_size",
           "batch_size"),
}  # fmt: skip
DEFAULTS = {name: value for name, value in hf_trainer.DEFAULTS.items()
            if name not in (*RENAMED.values(), "save_steps")} | {
    "micro_batch_size": 1, "num_epochs": 1.0, "lr_scheduler": "cosine", "optimizer": "adamw_torch",
    "sequence_len": 512, "warmup_ratio": 0.03, "eval_strategy": None, "save_strategy": None,
    "output_dir": "./model-out",
}  # fmt: skip


def _made(given: Given) -> dict[str, object]:
    rl = given.values.get("rl")
    if rl not in LOSSES:
        raise BadInput(
            f"rl: {rl} is not preference training: {', '.join(LOSSES)} are translated; "
            "supervised fine-tuning is recipes/sft.py"
        )
    theirs = dict(given.values)
    for name in ("evals_per_epoch", "saves_per_epoch"):
        if not is_off(theirs.get(name)):
            ours = ROWS[name].ours
            told = f"only after the last step; {ours} is a number of steps: set it by hand"
            given.notes.lacking.append((f"{name}: {theirs[name]}", told))
    for what in ("eval", "save"):
        by_steps = "steps" if theirs.get(f"{what}_steps") else "no"
        theirs[f"{what}_strategy"] = theirs[f"{what}_strategy"] or by_steps
    if "warmup_steps" in given.named:
        theirs["warmup_ratio"] = None
    theirs |= {new: theirs.pop(old, None) for old, new in RENAMED.items()}
    theirs["bf16"] = theirs.get("bf16") or theirs.get("bfloat16") or not theirs.get("fp16")
    if theirs["project"]:
        theirs["report_to"] = ["wandb", *(["tensorboard"] if theirs.get("use_tensorboard") else [])]
    if theirs.get("hub_model_id"):
        theirs["push_to_hub"] = True
    found = _data(given)
    if theirs.get("use_trackio"):
        found["trackio_project"] = str(theirs.get("trackio_project_name") or "axolotl")
    held = "test" if "validation" in found else "validation" if "validation_split_fraction" in (
        found
    ) else None  # fmt: skip
    found |= hf_trainer.made(given._replace(values=theirs), held)
    here = {new: old for old, new in RENAMED.items()}
    for told in given.notes:
        told[:] = [(_as_here(name, here), says) for name, says in told]
    if theirs.get("early_stopping_patience") and held:
        found["stop_when"] = f"{held}/dpo_loss"
        found["stop_patience"] = int(theirs["early_stopping_patience"])
    return found | _loss(theirs) | _adapters(given)


def _as_here(name: str, here: Values) -> str:
    """The name in a note, as axolotl spells it."""
    called, colon, value = name.partition(":")
    return f"{here.get(called, called)}{colon}{value}"


def _loss(theirs: Values) -> dict[str, object]:
    rl = theirs["rl"]
    beta = float(theirs.get("trl.beta") or theirs.get("rl_beta") or 0.1)
    found: dict[str, object] = {"loss": LOSSES[rl], "beta": beta}
    if theirs.get("dpo_loss_type") and rl == "dpo":
        found["loss"] = hf_trainer.losses(theirs["dpo_loss_type"], theirs.get("dpo_loss_weights"))
    elif rl == "orpo":
        found["loss"] = f"sft,orpo={float(theirs.get('orpo_alpha') or beta):g}"
    elif rl == "simpo":
        alpha = theirs.get("cpo_alpha")
        terms = {"simpo": 1.0, "sft": 1.0 if alpha is None else float(alpha)}
        some = [name for name, weight in terms.items() if weight]
        found["loss"] = hf_trainer.losses(some, [terms[name] for name in some])
        found["gamma_beta_ratio"] = float(theirs.get("simpo_gamma") or 0.5) / beta
    elif rl == "kto":
        for ours in ("desirable_weight", "undesirable_weight"):
            found[ours] = float(theirs.get(f"kto_{ours}") or 1)
    return found


def _adapters(given: Given) -> dict[str, object]:
    theirs, kind = given.values, given.values.get("adapter")
    if kind not in ("lora", "qlora"):
        return {}
    few = "nf4" if theirs.get("load_in_4bit") or kind == "qlora" else None
    few = few or ("int8" if theirs.get("load_in_8bit") else None)
    found: dict[str, object] = {"frozen": few} if few else {}
    if theirs.get("loraplus_lr_ratio"):
        found["adapter.lora_plus"] = float(theirs["loraplus_lr_ratio"])
    if theirs.get("lora_model_dir"):
        return found
    targets = (
        "all-linear" if theirs.get("lora_target_linear") else theirs.get("lora_target_modules")
    )
    rank, alpha = theirs.get("lora_r") or 8, theirs.get("lora_alpha") or 16
    found |= hf_trainer.lora(rank, alpha, targets)
    for name, ours in (("peft_use_rslora", "adapter.rslora"), ("peft_use_dora", "adapter.dora")):
        found[ours] = bool(theirs.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        start = f"lora_{name}."
        pattern = tuple(f"{key.removeprefix(start)}={value}" for key, value in theirs.items()
                        if key.startswith(start))  # fmt: skip
        if pattern:
            found[f"adapter.{name}"] = pattern
    if layers := theirs.get("peft_layers_to_transform"):
        found["adapter.layers"] = ",".join(map(str, layers))
    return found


def _data(given: Given) -> dict[str, object]:
    theirs = given.values
    found: dict[str, object] = {}
    for name in ("datasets", "test_datasets"):
        for one in theirs.get(name) or ():
            _say_unread(given, name, one)
    if several := _sources(theirs.get("datasets")):
        found["train_data"] = trained_on(several)
    if tests := _sources(theirs.get("test_datasets")):
        found["validation"] = held_out(tests, "test")
    if share := float(theirs.get("val_set_size") or 0):
        if share < 1:
            found["validation_split_fraction"] = share
        else:
            told = "a number of rows: set validation_split_fraction to a share"
            given.notes.lacking.append((f"val_set_size: {share:g}", told))
    return found


def _say_unread(given: Given, where: str, one: dict[str, object]) -> None:
    """Notes what else an entry has besides files and columns: a format, or a part of its rows."""
    read = ("path", "name", "split", "revision", "ds_type", "data_files", *FIELDS)
    kind = one.get("type")
    own = kind if isinstance(kind, dict) else {"type": kind}
    if str(own.get("type") or "").partition(".")[0] in ("", "chat_template"):
        own = {key: value for key, value in own.items() if key != "type"}
    say_unread(given, where, {key: x for key, x in one.items() if key != "type"} | own, read)


FIELDS = ("field_prompt", "field_messages", "field_chosen", "field_rejected", "field_system")


def _sources(entries: Sequence[dict[str, object]] | None) -> list[dict[str, Any]]:
    """The path of each file, and the names of its columns if they differ from ours."""
    found = []
    for one in entries or ():
        own = one["type"] if isinstance(one.get("type"), dict) else one
        fields = {"prompt": own.get("field_prompt") or own.get("field_messages")}
        fields |= {side: own.get(f"field_{side}") for side in ("chosen", "rejected")}
        fields["system_prompt"] = own.get("field_system")
        renamed = {ours: theirs for ours, theirs in fields.items() if theirs and theirs != ours}
        columns = {"columns": renamed} if renamed else {}
        found += [{"path": path} | columns for path in _paths(one)]
    return found


def _paths(one: dict[str, object]) -> list[str]:
    if one.get("ds_type") and not one.get("data_files"):  # `path` is a file
        return [str(one["path"])]
    revision = f"@{one['revision']}" if one.get("revision") and not one.get("data_files") else ""
    return [path + revision for path in paths(one)]


AXOLOTL = Source("axolotl", "axolotl train", ROWS, DEFAULTS, _made)

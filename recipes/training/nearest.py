"""Suggestions for a name that does not exist: what the user may have meant."""

from collections.abc import Iterable
import difflib

# What a setting of ours is called elsewhere, or was called here.
SETTINGS = {
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "dataset": "train_data",
    "dataset_name": "train_data",
    "eval_dataset": "validation",
    "eval_steps": "steps_per_eval",
    "gradient_checkpointing": "remat",
    "logging_steps": "steps_per_log",
    "lora_alpha": "adapter.alpha",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_target_modules": "adapter.targets",
    "loss_type": "loss",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "mask_user_turns": "data.scored_turns",
    "max_length": "train_seq_len",
    "max_seq_length": "train_seq_len",
    "max_steps": "num_train_steps",
    "model": "initialize_from_hf",
    "model_name_or_path": "initialize_from_hf",
    "model_path": "initialize_from_hf",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "output_dir": "directory",
    "per_device_train_batch_size": "train_batch_size",
    "precompute_ref_log_probs": "reference_mode",
    "ref_model": "reference_model_path",
    "ref_model_name_or_path": "reference_model_path",
    "reference_model": "reference_model_path",
    "r": "adapter.rank",
    "run_name": "name",
    "save_steps": "steps_per_checkpoint",
    "save_total_limit": "keep_checkpoints",
    "target_modules": "adapter.targets",
    "train_dataset": "train_data",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant: misspelt, another tool's name, or given in part."""
    word, known = word.lower().replace("-", "_"), list(known)
    if (here := SETTINGS.get(word.rpartition(".")[2])) in known:
        return here
    ends = {name.rpartition(".")[2]: name for name in known} | {name: name for name in known}
    spelt = difflib.get_close_matches(word, [end.lower() for end in ends], 1, cutoff=0.8)
    near = [name for end, name in ends.items() if end.lower() in spelt]
    # For example, batch_size is a part of train_batch_size and of no other name.
    parts = [name for name in known if f"_{word}_" in f"_{name}_"]
    near += parts if len(parts) == 1 else []
    return near[0] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean …?)', or nothing if no known word is near."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""

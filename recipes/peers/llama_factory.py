"""LLaMA-Factory: `llamafactory-cli train`, stages dpo and kto. As of 0.9.5."""

import json
import pathlib
from typing import Any

from checkpoints_io.errors import BadInput
from recipes.peers import hf_trainer
from recipes.peers.rows import Given, Source, Values, held_out, idle, lacks, part, same, trained_on
from recipes.peers.trl import hub_data

ROWS = {
    **hf_trainer.ROWS,
    "stage": part("loss", "dpo, or kto"),
    "model_name_or_path": same("initialize_from_hf"),
    "model_revision": part("initialize_from_hf", "written behind an @"),
    "adapter_name_or_path": same("adapter.path"),
    "finetuning_type": part("adapter.rank", "lora or full; freeze is trainable, an expression"),
    "lora_rank": part("adapter.rank"),
    "lora_alpha": part("adapter.alpha", "unset, twice the rank there, and the rank here"),
    "lora_target": part("adapter.targets", "all is all-linear"),
    "use_rslora": part("adapter.rslora"),
    "use_dora": part("adapter.dora"),
    "loraplus_lr_ratio": part("adapter.lora_plus"),
    "quantization_bit": part("frozen", "4: nf4; 8: int8; beside adapters"),
    "pref_beta": same("beta"),
    "pref_loss": part("loss", "sigmoid, hinge, ipo, simpo; orpo is sft_seq,orpo=pref_beta"),
    "pref_ftx": part("loss", "sft_seq=pref_ftx beside the loss"),
    "pref_bco_weight": part("loss", "w: sigmoid=1/(1+w),bco_pair=w/(1+w), without a running mean"),
    "dpo_label_smoothing": same("label_smoothing"),
    "simpo_gamma": part("gamma_beta_ratio", "divided by pref_beta"),
    "kto_chosen_weight": part("desirable_weight", "of stage kto"),
    "kto_rejected_weight": part("undesirable_weight", "of stage kto"),
    "ld_alpha": same("ld_alpha"),
    "ref_model": same("reference_model_path"),
    "dataset": part("train_data", "names of dataset_info.json, whose files, columns and hub ids "
                    "are read where that file is"),
    "eval_dataset": part("validation"),
    "dataset_dir": part("train_data"),
    "mix_strategy": part("train_data", "concat, the default: weight=rows; interleaved: by weight"),
    "interleave_probs": part("train_data", "the weights of several, interleaved"),
    "val_size": part("validation_split_fraction", "a fraction of the prompts"),
    "cutoff_len": same("train_seq_len", "longer ones are dropped and counted here, and cut there; "
                       "data.over_length cuts", differs=True),
    "mask_history": part("data.scored_turns", "pairs only score the last answer there"),
    "early_stopping_steps": part("stop_when, stop_patience"),
    "pure_bf16": part("mp", "trained weights stay in float32"),
    "disable_gradient_checkpointing": part("remat", "none"),
    **lacks("not this recipe's", "do_sample", "predict_with_generate", "max_new_tokens"),
    **lacks("shorten the file, or set max_eval_pairs for held-out sets", "max_samples"),
    **lacks("chat templates are the tokenizer's own, or a file: chat_template", "template",
            "default_system", "tool_format", "enable_thinking"),
    **lacks("adapters have no dropout: policy and reference would differ before the first step",
            "lora_dropout"),
    **lacks("whole weights cannot be trained beside adapters", "additional_target"),
    **lacks("new adapters are initialised by adapter.zero", "pissa_init", "pissa_iter",
            "pissa_convert"),
    **lacks("adapters continue with adapter.path; a merged model is a folder for new ones",
            "create_new_adapter"),
    **lacks("merge them: python -m zoo merge, and give the folder as reference_model_path",
            "ref_model_adapters"),
    **lacks("frozen weights of a policy without adapters are in the dtype of mp",
            "ref_model_quantization_bit"),
    **lacks("optimizers are adamw, adamw8bit, lion, rmsprop, muon and adafactor", "use_galore",
            "galore_*", "use_apollo", "apollo_*", "use_badam", "badam_*", "use_adam_mini",
            "use_llama_pro"),
    **lacks("set optimizer=muon", "use_muon"),
    **lacks("trainable is a regular expression over names of weights", "freeze_trainable_layers",
            "freeze_trainable_modules", "freeze_extra_modules"),
    **lacks("only the text decoder is trained", "freeze_vision_tower", "media_dir", "image_*",
            "video_*", "freeze_multi_modal_projector"),
    **lacks("config.json decides", "rope_scaling", "resize_vocab", "add_tokens",
            "add_special_tokens", "shift_attn", "mixture_of_depths"),
    **lacks("experts are not balanced during preference training", "moe_aux_loss_coef"),
    **lacks("prompts are never scored", "train_on_prompt"),
    **lacks("metrics are in metrics.jsonl, TensorBoard and Weights & Biases", "use_swanlab",
            "swanlab_*"),
    **lacks("launch/ray_run.py: docs/clusters.md", "ray_*"),
    **lacks("computed in bfloat16 or float32", "fp8", "fp8_*"),
    **idle("the page of a run has its curves", "plot_loss"),
    **idle("tokens are kept by content (token_cache), with one process per core",
           "overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size",
           "tokenized_path", "data_shared_file_system", "streaming", "buffer_size"),
    **idle("rows are always packed, each prompt once", "packing", "neat_packing",
           "ignore_pad_token_for_loss"),
    **idle("the platform's best is used (attention)", "flash_attn", "use_unsloth",
           "use_unsloth_gc", "enable_liger_kernel", "use_reentrant_gc", "upcast_layernorm",
           "upcast_lmhead_output", "use_v1_kernels", "low_cpu_mem_usage", "use_fast_tokenizer",
           "use_kv_cache", "offload_folder", "cache_dir", "split_special_tokens"),
    **idle("a hub's code is never run: docs/models.md has the families", "trust_remote_code"),
    **idle("frozen=nf4 and int8 are the zoo's own", "quantization_method", "quantization_type",
           "double_quantization", "quantization_device_map"),
    **idle("each source has its own figures", "eval_on_each_dataset"),
    **idle("dpo_accuracy and tokens_per_second are always recorded", "compute_accuracy",
           "include_effective_tokens_per_second", "include_num_input_tokens_seen"),
    **idle("for generation, or for other programs", "infer_*", "export_*", "vllm_*", "hf_hub_token",
           "print_param_status"),
}  # fmt: skip
DEFAULTS = hf_trainer.DEFAULTS | {
    "pref_beta": 0.1, "pref_loss": "sigmoid", "learning_rate": 5e-5, "cutoff_len": 2048,
    "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "logging_steps": 500,
    "dataset_dir": "data", "mix_strategy": "concat",
}  # fmt: skip
# The roles of columns in dataset_info.json, and what a column of that role is called here.
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "answer", "history": "history",
    "messages": "conversations", "system": "system_prompt", "tools": "tools", "chosen": "chosen",
    "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip


# Other places that dataset_info.json may give for a dataset.
ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "s3_file_name", "cloud_file_name")
# The usual names of keys and roles of messages in files that can be read here.
KNOWN = frozenset((
    "role", "from", "content", "value", "system", "developer", "user", "human", "prompter",
    "assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "tool", "observation",
    "function", "ipython", "tool_response", "function_call", "tool_call",
))  # fmt: skip
USUAL = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
         "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
         "system_tag": "system"}  # fmt: skip


def _made(given: Given) -> dict[str, Any]:
    theirs = given.values
    if theirs.get("stage") not in ("dpo", "kto"):
        raise BadInput(
            f"stage: {theirs.get('stage')} is not preference training: dpo and kto are "
            "translated; supervised fine-tuning is recipes/sft.py"
        )
    found = _data(given)
    held = "eval" if "validation" in found else None
    if theirs.get("val_size"):
        if float(theirs["val_size"]) < 1:
            found["validation_split_fraction"], held = float(theirs["val_size"]), "validation"
        else:
            told = "a number of rows: set validation_split_fraction to a share"
            given.notes.lacking.append((f"val_size: {theirs['val_size']}", told))
    found |= hf_trainer.made(given, held)
    if theirs.get("disable_gradient_checkpointing"):
        found["remat"] = "none"
    if theirs.get("early_stopping_steps") and held:
        found["stop_when"] = f"{held}/dpo_loss"
        found["stop_patience"] = int(theirs["early_stopping_steps"])
    if theirs.get("model_revision") not in (None, "main"):
        found["initialize_from_hf"] = f"{theirs['model_name_or_path']}@{theirs['model_revision']}"
    return found | _loss(theirs) | _adapters(given)


def _loss(theirs: Values) -> dict[str, object]:
    beta, name = float(theirs["pref_beta"]), str(theirs["pref_loss"])
    if theirs["stage"] == "kto":
        weights = {"desirable_weight": "kto_chosen_weight",
                   "undesirable_weight": "kto_rejected_weight"}  # fmt: skip
        return {"loss": "kto"} | {
            ours: float(theirs[name]) for ours, name in weights.items() if theirs.get(name)
        }
    found: dict[str, object] = {}
    if name == "simpo":
        found["gamma_beta_ratio"] = float(theirs.get("simpo_gamma") or 0.5) / beta
    loss = {"orpo": f"sft_seq,orpo={beta:g}", "kto_pair": "bco_pair"}.get(name, name)
    if bco := float(theirs.get("pref_bco_weight") or 0):
        loss = f"{loss}={1 / (1 + bco):g},bco_pair={bco / (1 + bco):g}"
    if ftx := float(theirs.get("pref_ftx") or 0):
        loss += f",sft_seq={ftx:g}"
    return found | {"loss": loss}


def _adapters(given: Given) -> dict[str, Any]:
    theirs, kind = given.values, given.values["finetuning_type"]
    if kind != "lora":
        if kind != "full":
            told = "all weights are trained: trainable names some; adapters are LoRA and DoRA"
            given.notes.lacking.append((f"finetuning_type: {kind}", told))
        return {}
    found: dict[str, object] = {}
    if not theirs.get("adapter_name_or_path"):
        rank = int(theirs["lora_rank"])
        found |= hf_trainer.lora(rank, theirs.get("lora_alpha") or 2 * rank, theirs["lora_target"])
        for name, ours in (("use_rslora", "adapter.rslora"), ("use_dora", "adapter.dora")):
            found[ours] = bool(theirs.get(name))
    if theirs.get("loraplus_lr_ratio"):
        found["adapter.lora_plus"] = float(theirs["loraplus_lr_ratio"])
    if bits := theirs.get("quantization_bit"):
        found["frozen"] = "nf4" if int(bits) == 4 else "int8"
    return found


def _data(given: Given) -> dict[str, Any]:
    theirs = given.values
    known = _registered(str(theirs["dataset_dir"]))
    names = _listed(theirs.get("dataset"))
    sources = [_source(name, known, given) for name in names]
    if len(names) > 1 and str(theirs["mix_strategy"]).startswith("interleave"):
        shares = _listed(theirs.get("interleave_probs")) or ["1"] * len(names)
        sources = [
            one | {"weight": float(share)} for one, share in zip(sources, shares, strict=True)
        ]
    found: dict[str, object] = {}
    if sources:
        found["train_data"] = trained_on(sources, names)
    if held := _listed(theirs.get("eval_dataset")):
        found["validation"] = held_out([_source(name, known, given) for name in held], "eval")
    return found


def _listed(given: object) -> list[str]:
    """Names that are separated by commas, or in a list."""
    each = given if isinstance(given, list) else str(given or "").split(",")
    return [name for name in (str(one).strip() for one in each) if name]


def _registered(folder: str) -> dict[str, object]:
    """The contents of dataset_info.json, if the file is there."""
    path = pathlib.Path(folder) / "dataset_info.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _source(name: str, known: Values, given: Given) -> dict[str, Any]:
    folder, said = given.values["dataset_dir"], known.get(name)
    if said is None and str(folder) == "ONLINE":
        return {"path": hub_data(name)}
    if said is None:
        path = f"{folder}/{name}.json"
        told = f"{folder}/dataset_info.json is not here or does not have it: {path} is a guess"
        given.notes.differs.append((f"dataset: {name}", told))
        return {"path": path}
    if said.get("hf_hub_url"):
        path = hub_data(said["hf_hub_url"], said.get("subset"), said.get("split") or "train")
    else:
        path = f"{folder}/{said.get('file_name', name)}"
    if not said.get("hf_hub_url") and not said.get("file_name"):
        elsewhere = next((key for key in ELSEWHERE if said.get(key)), "no file_name")
        told = f"{elsewhere}: only files and datasets of the hub are read; {path} is a guess"
        given.notes.lacking.append((f"dataset: {name}", told))
    for key in ("folder", *([] if said.get("hf_hub_url") else ["subset", "split"])):
        if said.get(key):
            told = f"its {key} {said[key]} is not read: name the files of it as the path"
            given.notes.lacking.append((f"dataset: {name}", told))
    for tag, value in (said.get("tags") or {}).items():
        if str(value).lower() not in KNOWN:
            told = f"its {tag} {value} is not known: rename it in the file, as {USUAL.get(tag)}"
            given.notes.lacking.append((f"dataset: {name}", told))
    if said.get("num_samples"):
        told = f"{said['num_samples']} of its rows there, and all here: shorten the file"
        given.notes.lacking.append((f"dataset: {name}", told))
    columns = {}
    for role, column in (said.get("columns") or {}).items():
        if role not in COLUMNS:
            given.notes.lacking.append((f"dataset: {name}", f"its column of {role} is not read"))
        elif column and COLUMNS[role] != column:
            columns[COLUMNS[role]] = column
    return {"path": path} | ({"columns": columns} if columns else {})


LLAMA_FACTORY = Source(
    "LLaMA-Factory", "llamafactory-cli train", ROWS, DEFAULTS, _made, nulls=("max_grad_norm",)
)

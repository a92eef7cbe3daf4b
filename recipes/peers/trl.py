"""TRL: `trl dpo --config`, whose YAML names fields of DPOConfig, ModelConfig and ScriptArguments.

The names are those of TRL 1.16, and those of earlier versions that are still in use.
"""

from collections.abc import Collection, Mapping
import pathlib

from checkpoints_io.errors import BadInput
from recipes.peers import hf_trainer
from recipes.peers.rows import (
    Given,
    Lacks,
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

# Keys that an entry of several sources may have, and what to do about them here.
FORMAT = "the chat template writes it here; data.layout=plain_text takes texts as they are"
UNREAD = {
    "data_dir": "all of the dataset is read: name the files, as hf://datasets/owner/name/folder/*",
    "shards": "a part of its rows there, and all here: shorten the file",
    "shards_idx": "a part of its rows there, and all here: shorten the file",
    "roles": "roles are known by their usual names: rename them in the file",
    "message_property_mappings": "messages are {role, content} or {from, value}: rename the keys",
    **dict.fromkeys(("prompt_format", "chosen_format", "rejected_format", "no_input_format",
                     "format", "type"), FORMAT),
}  # fmt: skip

OVER_LENGTH = "longer ones are cut at the end of the answer, as there; drop counts and drops them"


# Settings that only TRL's other trainers have, and what to do with their files.
OTHERS = {
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "dataset_text_field", "packing"),
        "`trl sft`: supervised fine-tuning is a recipe of its own, recipes/sft.py",
    ),
    **dict.fromkeys(
        ("num_generations", "num_iterations", "reward_funcs", "reward_model_name_or_path"),
        "a trainer that samples answers during training, which is not supported; "
        "recipes/sample_pairs.py makes pairs from samples between runs",
    ),
    "center_rewards_coefficient": "`trl reward`, and reward models are read here, not trained",
}


def _cut(mode: object) -> object:
    known = {"keep_start": "cut_answer", "keep_end": "cut_prompt"}
    if mode not in known:
        raise Lacks(f"none of {', '.join(known)}: longer pairs are dropped, and counted")
    return known[mode]


def _of_open_instruct(kind: object) -> object:
    known = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "simpo": "simpo", "wpo": "sigmoid"}
    if kind not in known:
        raise Lacks(f"none of {', '.join(known)}: set loss by hand")
    return known[kind]


ROWS = {
    **hf_trainer.ROWS,
    # DPOConfig
    "beta": same("beta"),
    "loss_type": part("loss", "the same names, with weights: sigmoid=0.8,sft=0.2"),
    "loss_weights": part("loss"),
    "label_smoothing": same("label_smoothing"),
    "ld_alpha": turned("ld_alpha", lambda a: None if float(a) == 1 else float(a)),
    "f_divergence_type": turned(
        "f_divergence_type", lambda kind: None if kind == "reverse_kl" else str(kind)
    ),
    "f_alpha_divergence_coef": part("f_alpha_divergence_coef", "only for alpha_divergence"),
    "dpo_beta": same("beta", "as open-instruct has it"),
    "dpo_loss_type": turned(
        "loss", _of_open_instruct, "as open-instruct has it: dpo, dpo_norm, simpo, wpo"
    ),
    "use_weighting": turned("use_weighting", lambda on: True if on else None),
    "discopop_tau": part("discopop_tau", "only for discopop"),
    "desirable_weight": part("desirable_weight", "of `trl kto`, and loss=kto"),
    "undesirable_weight": part("undesirable_weight", "of `trl kto`, and loss=kto"),
    "max_length": part("train_seq_len", OVER_LENGTH),
    "truncation_mode": turned(
        "data.over_length", _cut, "keep_end is cut_prompt: the prompt's beginning goes, no answer's"
    ),
    "precompute_ref_log_probs": turned(
        "reference_mode", lambda on: "cached" if on else "resident", "kept on disk for other runs"
    ),
    "sync_ref_model": part("reference_sync_steps"),
    "ref_model_sync_steps": part("reference_sync_steps"),
    "ref_model_mixup_alpha": part("reference_mixup_alpha"),
    "cpo_alpha": part("cpo_alpha", "of `trl cpo`, and loss=cpo; of simpo simpo,sft=cpo_alpha"),
    "simpo_gamma": part("gamma_beta_ratio", "of simpo, divided by beta"),
    "reference_free": part("loss", "of earlier versions: reference_free"),
    "rpo_alpha": part("loss", "of earlier versions: ,sft=ALPHA beside the loss"),
    **lacks("no limit of its own: data.over_length says what is cut", "max_prompt_length",
            "max_completion_length"),
    **lacks("experts are not balanced during preference training", "router_aux_loss_coef"),
    **lacks("less memory by remat, frozen=nf4, reference_mode=cached or mesh.fsdp",
            "activation_offloading"),
    **idle("rows are always packed, each prompt once", "padding_free", "pad_to_multiple_of",
           "padding_value", "pad_token", "label_pad_token_id"),
    **idle("chosen to fit the memory", "precompute_ref_batch_size"),
    **idle("there is no dropout", "disable_dropout"),
    **idle("as many processes as there are cores", "dataset_num_proc", "preprocessing_num_workers"),
    # ModelConfig
    "model_name_or_path": same("initialize_from_hf"),
    "model_revision": part("initialize_from_hf", "written behind an @"),
    "use_peft": part("adapter.rank", "without it adapters are none"),
    "lora_r": part("adapter.rank"),
    "lora_alpha": part("adapter.alpha"),
    "lora_target_modules": part(
        "adapter.targets", "unset, PEFT chooses a few by model type; here it is all-linear"
    ),
    "use_rslora": part("adapter.rslora"),
    "use_dora": part("adapter.dora"),
    "load_in_8bit": part("frozen", "int8, beside adapters"),
    "load_in_4bit": part("frozen", "nf4, beside adapters"),
    "bnb_4bit_quant_type": part("frozen", "nf4 is the only one of 4 bits"),
    **lacks("adapters have no dropout: policy and reference would differ before the first step",
            "lora_dropout"),
    **lacks("whole weights cannot be trained beside adapters", "lora_modules_to_save"),
    **lacks("name the modules in adapter.targets", "lora_target_parameters"),
    **lacks("weights are read as config.json says", "model_init_kwargs.*", "model_init_kwargs"),
    **idle("trained weights are float32, frozen ones in the dtype of mp", "dtype",
           "torch_dtype"),
    **idle("the platform's best is used (attention)", "attn_implementation",
           "use_flash_attention_2"),
    **idle("a hub's code is never run: docs/models.md has the families", "trust_remote_code"),
    **idle("of the same kind by itself", "lora_task_type", "bnb_4bit_quant_storage",
           "use_bnb_nested_quant", "bnb_4bit_compute_dtype"),
    # ScriptArguments, DatasetMixtureConfig, and the alignment handbook's
    "dataset_name": part("train_data", "owner/name:subset:split, or a path"),
    "dataset_config": part("train_data", "the subset"),
    "dataset_train_split": part("train_data"),
    "dataset_test_split": part("validation", "where eval_strategy is not no"),
    "datasets": part("train_data", "several, as one list: weight=rows"),
    "test_split_size": part("validation_split_fraction", "of the prompts, not of the rows"),
    "dataset_mixer.*": part("train_data"),
    "dataset_splits": part("train_data, validation"),
    "dataset_mixture.datasets": part("train_data"),
    **idle("rows are read as they come", "dataset_streaming", "streaming"),
    **idle("works around a fault of torch", "ignore_bias_buffers"),
}  # fmt: skip
DEFAULTS = hf_trainer.DEFAULTS | {
    "beta": 0.1, "learning_rate": 1e-6, "loss_type": ["sigmoid"], "max_length": 1024,
    "truncation_mode": "keep_start", "lora_r": 16, "lora_alpha": 32, "logging_steps": 10,
    "dataset_train_split": "train", "dataset_test_split": "test",
}  # fmt: skip


def hub_data(name: object, subset: object = None, split: object = None) -> str:
    """A dataset on the hub or in a local folder, in the form of a source."""
    if pathlib.Path(str(name)).is_dir():  # its files are named by split, or are all of one
        files = pathlib.Path(str(name)) / str(split or "train")
        here = any(files.parent.glob(f"{files.name}*"))
        return f"{files}*" if here or files.name != "train" else str(name)
    if not subset and split == "train":
        split = None  # the default of a bare name; after a subset it must be named
    return ":".join(str(x) for x in (name, subset, split or (subset and "train")) if x)


def _made(given: Given) -> dict[str, object]:
    theirs = given.values
    for name in sorted(OTHERS.keys() & given.named):
        raise BadInput(f"{name} belongs to {OTHERS[name]}")
    told = "of plain strings here are turns of the chat template, and there texts as they are: "
    given.notes.differs.append(("prompts and answers", f"{told}data.layout=plain_text"))
    found = _data(given)
    found |= hf_trainer.made(given, "test" if "validation" in found else None)
    if "dpo_loss_type" not in given.named:
        found["loss"] = hf_trainer.losses(theirs["loss_type"], theirs.get("loss_weights"))
        found |= _contrastive(given, str(found["loss"]))
    elif theirs["dpo_loss_type"] == "wpo":
        found["use_weighting"] = True
    if theirs.get("reference_free"):
        if found.get("loss") != "sigmoid":
            told = f"only for sigmoid here, but the loss is {found.get('loss')}"
            given.notes.lacking.append(("reference_free", told))
        else:
            found["loss"] = "reference_free"
    if theirs.get("rpo_alpha"):
        found["loss"] = f"{found['loss']},sft={float(theirs['rpo_alpha']):g}"
    if theirs.get("desirable_weight") or theirs.get("undesirable_weight"):
        found["loss"] = "kto"
        for name in ("desirable_weight", "undesirable_weight"):
            found[name] = float(theirs.get(name) or 1)
    if found.get("loss") == "discopop":
        found["discopop_tau"] = float(theirs.get("discopop_tau") or 0.05)
    if theirs.get("f_divergence_type") == "alpha_divergence":
        found["f_alpha_divergence_coef"] = float(theirs.get("f_alpha_divergence_coef") or 0.5)
    if theirs.get("max_length"):
        found["train_seq_len"] = int(theirs["max_length"])
    if theirs.get("sync_ref_model"):
        found["reference_sync_steps"] = int(theirs.get("ref_model_sync_steps") or 512)
        found["reference_mixup_alpha"] = float(theirs.get("ref_model_mixup_alpha") or 0.6)
    if theirs.get("model_revision") not in (None, "main"):
        found["initialize_from_hf"] = f"{theirs['model_name_or_path']}@{theirs['model_revision']}"
    return found | _adapters(given)


def _contrastive(given: Given, loss: str) -> dict[str, object]:
    """The losses of `trl cpo`, which has no reference; these settings identify its files."""
    theirs, beta = given.values, float(given.values["beta"])
    if loss != "simpo" and not {"cpo_alpha", "simpo_gamma"} & given.named:
        return {}
    alpha = float(theirs["cpo_alpha"]) if "cpo_alpha" in given.named else 1.0
    if loss == "simpo":
        ratio = float(theirs.get("simpo_gamma") or 0.5) / beta
        return {"loss": f"simpo,sft={alpha:g}" if alpha else "simpo", "gamma_beta_ratio": ratio}
    if loss == "sigmoid":
        return {"loss": "cpo", "cpo_alpha": alpha}
    told = f"of sigmoid and simpo alone here, and the loss is {loss}, against a reference"
    given.notes.lacking.append(("cpo_alpha, simpo_gamma", told))
    return {}


def _adapters(given: Given) -> dict[str, object]:
    theirs = given.values
    few = "nf4" if theirs.get("load_in_4bit") else "int8" if theirs.get("load_in_8bit") else None
    if not theirs.get("use_peft"):
        if few:
            given.notes.lacking.append(("load_in_4bit, load_in_8bit", "of adapters: set use_peft"))
        return {}
    targets = theirs.get("lora_target_modules")
    found = hf_trainer.lora(theirs["lora_r"], theirs["lora_alpha"], targets)
    if not targets:
        told = "unset: all-linear here; PEFT's own default is fewer, q_proj,v_proj of a Llama"
        given.notes.differs.append(("lora_target_modules", told))
    for name, ours in (("use_rslora", "adapter.rslora"), ("use_dora", "adapter.dora")):
        found[ours] = bool(theirs.get(name))
    return found | ({"frozen": few} if few else {})


def _data(given: Given) -> dict[str, object]:
    """The data that is trained on, and held out."""
    theirs, evaluates = given.values, not is_off(
        given.values.get("evaluation_strategy") or given.values["eval_strategy"]
    )  # fmt: skip
    several = theirs.get("datasets") or theirs.get("dataset_mixture.datasets")
    mixed = {name.removeprefix("dataset_mixer."): weight for name, weight in theirs.items()
             if name.startswith("dataset_mixer.")}  # fmt: skip
    found: dict[str, object] = {}
    if several:
        found["train_data"] = trained_on([{"path": x} for one in several for x in paths(one)])
        _say_shares(given, {str(one.get("path") or one.get("id")): one.get("weight")
                            for one in several})  # fmt: skip
        for one in several:
            say_unread(given, "datasets", one, ("path", "id", "name", "config", "split", "weight",
                                                "data_files", "columns"))  # fmt: skip
    elif mixed:
        train, *test = theirs.get("dataset_splits") or ["train"]
        found["train_data"] = trained_on([{"path": hub_data(name, None, train)} for name in mixed])
        _say_shares(given, mixed)
        if test and evaluates:
            found["validation"] = held_out([hub_data(one, None, test[0]) for one in mixed], "test")
    elif name := theirs.get("dataset_name"):
        subset = theirs.get("dataset_config")
        found["train_data"] = hub_data(name, subset, theirs["dataset_train_split"])
        if evaluates and pathlib.Path(str(name)).is_file():
            told = (
                "a file has no other split: set validation_split_fraction, or name a held-out file"
            )
            given.notes.lacking.append(("dataset_test_split", told))
        elif evaluates:
            held = hub_data(name, subset, theirs["dataset_test_split"])
            found["validation"] = {"test": held}
    if theirs.get("test_split_size"):
        found["validation_split_fraction"] = float(theirs["test_split_size"])
    return found


def _say_shares(given: Given, shares: Values) -> None:
    """Notes the fraction of each dataset, from its beginning, that the alignment handbook takes."""
    for name, share in shares.items():
        if share is not None and float(share) != 1:
            told = f"{float(share):g} of its rows there, and all here: shorten the file"
            given.notes.lacking.append((name, told))


def say_unread(given: Given, where: str, one: Mapping[str, object], read: Collection[str]) -> None:
    """Notes the keys of an entry of several sources that have no counterpart."""
    for key, value in one.items():
        if key not in read and not is_off(value):
            name = one.get("path") or one.get("id")
            told = UNREAD.get(key, "not of a source here: change the file, or name another")
            given.notes.lacking.append((f"{where}: {name}: {key}: {value}", told))


def paths(one: Values) -> list[str]:
    """The sources that one of several entries names: its files, or a dataset."""
    if files := one.get("data_files"):
        named = [files] if isinstance(files, str) else list(map(str, files))
        name, at = str(one.get("path") or ""), f"@{one['revision']}" if one.get("revision") else ""
        if pathlib.Path(name).is_dir():
            return [str(pathlib.Path(name) / file) for file in named]
        if "/" in name and "://" not in named[0]:  # not a file type like json, but a repository
            return [f"hf://datasets/{name}{at}/{file}" for file in named]
        return named
    name, subset = one.get("path") or one["id"], one.get("name") or one.get("config")
    return [hub_data(name, subset, one.get("split"))]


TRL = Source(
    "TRL", "trl dpo --config", ROWS, DEFAULTS, _made, nulls=("max_length", "max_grad_norm")
)

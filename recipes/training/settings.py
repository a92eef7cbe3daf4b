"""Every setting of every recipe, described once.

From this table come the checks of a config and its flags (`checks`, `overrides`), `--help` and the
list in docs/dpo.md (`listing`), and what a resumed run must share (`identity`). Nothing here
is slow to import: a wrong flag is answered before jax is there.
"""

from collections.abc import Callable, Mapping
import math
from typing import NamedTuple

MUST = "must be named"  # as a default: a config without the setting is refused


class Bound(NamedTuple):
    """Which numbers a setting may be."""

    says: str  # "must be …"
    holds: Callable[[float], bool]


ABOVE_0 = Bound("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0 = Bound("at least 0", lambda x: 0 <= x < math.inf)
SHARE = Bound("between 0 and 1", lambda x: 0 <= x <= 1)
INNER_SHARE = Bound("above 0 and below 1", lambda x: 0 < x < 1)
DECAY = Bound("at least 0 and below 1", lambda x: 0 <= x < 1)
SMOOTHING = Bound("at least 0 and below 0.5 (half is no preference)", lambda x: 0 <= x < 0.5)
SEED = Bound("at least 0 and below 2**31", lambda x: 0 <= x < 2**31)
ROW = Bound("a multiple of 64 above 0", lambda x: x > 0 and x % 64 == 0)
EXPORT = Bound("a number of steps above 0, or -1 for never", lambda x: x == -1 or x >= 1)


class Setting(NamedTuple):
    """One setting. A config that does not name it means its `default`."""

    kind: type  # `object` is a source of data, or several by name
    says: str
    default: object
    unset: str | None = None  # what it means to be unset (None); without it, it may not be
    bound: Bound | None = None
    choices: tuple[str, ...] = ()
    free: bool = False  # may change when a run is resumed: it touches no number of its past


DTYPES = ("f32", "float32", "bf16", "bfloat16", "f16", "float16")

RUN = {
    "name": Setting(str, "what the run is called in Weights & Biases", MUST, free=True),
    "tags": Setting(tuple, "its tags in Weights & Biases", (), free=True),
    "directory": Setting(str, "where the run keeps everything", MUST, free=True),
    "seed": Setting(int, "decides the order of the data", MUST, bound=SEED),
}
MODEL = {
    "initialize_from_hf": Setting(
        str, "where the policy begins: a folder or hub id (owner/name@revision)", MUST
    ),
    "tokenizer": Setting(str, "a folder or hub id", None, unset="the one in initialize_from_hf"),
    "chat_template": Setting(str, "a file", None, unset="the tokenizer's own"),
}
REFERENCE = {
    "reference_model_path": Setting(
        str, "a folder or hub id", None, unset="the weights that the policy begins from"
    ),
    "reference_is_hf": Setting(
        bool,
        "false: reference_model_path is the directory of a run, and its newest checkpoint is meant",
        True,
    ),
    "reference_mode": Setting(
        str,
        "resident: asked in every step; cached: asked once for every pair, then dropped",
        "resident",
        choices=("resident", "cached"),
        free=True,
    ),
    "reference_cache": Setting(
        str,
        "a directory for what a cached reference said",
        None,
        unset="reference-cache beside the run's directory",
        free=True,
    ),
}
DATA = {
    "train_data": Setting(
        object,
        "files (a path, gs://, s3://, * for several), a hub dataset (owner/name:subset:split@"
        'revision), or several: dict(name=dict(path="…", weight=2.0), …)',
        MUST,
    ),
    "validation_split_fraction": Setting(
        float,
        "this share of the prompts is held out",
        None,
        unset="nothing is split off; `validation` names the held-out files",
        bound=INNER_SHARE,
    ),
    "validation": Setting(
        object, 'held-out sources: dict(name="…", …)', None, unset="no held-out files", free=True
    ),
    "data.layout": Setting(
        str, "which columns hold what: see docs/data.md", None, unset="recognised from the columns"
    ),
    "data.columns": Setting(
        dict, 'our name="theirs", where a dataset has other names', {}, unset="ours"
    ),
    "data.scored_turns": Setting(
        str,
        "which turns after the prompt are scored",
        "assistant",
        choices=("assistant", "last", "all"),
    ),
    "data.date": Setting(
        str,
        "2026-01-31, say, for chat templates that print today's date",
        None,
        unset="such templates print none",
    ),
    "data.end_of_turn": Setting(
        str,
        "a special token after the last answer, for chat templates that write none",
        None,
        unset="what the chat template writes after an answer",
    ),
    "data.over_length": Setting(
        str,
        "what becomes of texts longer than train_seq_len",
        "drop",
        choices=("drop", "cut_prompt", "cut_answer"),
    ),
    "data.max_malformed_fraction": Setting(
        float, "more malformed rows than this share end the start", 0.0, bound=SHARE
    ),
    "token_cache": Setting(
        str,
        "a directory for tokenised rows",
        "~/.cache/nnx-zoo/tokens",
        unset="every start tokenises afresh",
        free=True,
    ),
}
PACKING = {
    "train_seq_len": Setting(
        int, "tokens of a prompt and its answer, at most", MUST, bound=ABOVE_0
    ),
    "row_length": Setting(
        int,
        "positions of a packed row",
        None,
        unset="chosen from the lengths of the texts and the mesh",
        bound=ROW,
        free=True,
    ),
    "per_device_parallelism": Setting(
        int,
        "rows that a device computes at a time",
        None,
        unset="chosen from the memory of the devices",
        bound=ABOVE_0,
        free=True,
    ),
    "min_pack_fill": Setting(
        float, "a smaller share of filled positions ends the start", 0.5, bound=SHARE, free=True
    ),
}
PREFERENCE = {
    "loss": Setting(
        str,
        "sigmoid is DPO; dpop is DPO-Positive, which holds the chosen answers up",
        MUST,
        choices=("sigmoid", "dpop"),
    ),
    "beta": Setting(float, "how strongly the policy is held to the reference", MUST, bound=ABOVE_0),
    "label_smoothing": Setting(
        float, "the share of pairs believed to be labelled backwards", 0.0, bound=SMOOTHING
    ),
    "dpop_lambda": Setting(
        float,
        "of dpop: how much a chosen answer costs that became less likely; 5.0, say",
        None,
        unset="only for loss=dpop",
        bound=ABOVE_0,
    ),
}
OPTIMIZER = {
    "train_batch_size": Setting(
        int, "examples (pairs, or answers) in every update", MUST, bound=ABOVE_0
    ),
    "num_train_steps": Setting(
        int, "updates of the run", None, unset="num_epochs decides", bound=ABOVE_0
    ),
    "num_epochs": Setting(
        float,
        "times that every example is used",
        None,
        unset="num_train_steps decides",
        bound=ABOVE_0,
    ),
    "learning_rate": Setting(float, "the highest learning rate", MUST, bound=ABOVE_0),
    "lr_schedule": Setting(
        str,
        "how the rate falls over the cooldown",
        "linear",
        choices=("constant", "linear", "cosine"),
    ),
    "warmup": Setting(
        float,
        "steps, or below 1 a fraction of them, over which the rate rises",
        0.0,
        bound=AT_LEAST_0,
    ),
    "cooldown": Setting(
        float,
        "steps, or below 1 a fraction of them, over which the rate falls at the end",
        None,
        unset="all that the warm-up leaves",
        bound=AT_LEAST_0,
    ),
    "min_lr_ratio": Setting(float, "the last rate over the highest", 0.0, bound=SHARE),
    "weight_decay": Setting(float, "AdamW's, of matrices alone", 0.0, bound=AT_LEAST_0),
    "max_grad_norm": Setting(
        float, "gradients are clipped to this norm", None, unset="no clipping", bound=ABOVE_0
    ),
    "adam_beta1": Setting(float, "decay of the mean of gradients", 0.9, bound=DECAY),
    "adam_beta2": Setting(float, "decay of the mean of their squares", 0.95, bound=DECAY),
    "adam_epsilon": Setting(float, "added to the root of the latter", 1e-8, bound=ABOVE_0),
    "adam_mu_dtype": Setting(
        str,
        "dtype of the mean of gradients; bfloat16 saves 2 bytes a weight",
        "float32",
        choices=DTYPES[:4],
    ),
    "nonfinite": Setting(
        str,
        "at a loss or gradient that is not a number: stop the run, or skip the update",
        "stop",
        choices=("stop", "skip"),
        free=True,
    ),
}
COMPUTE = {
    "mp": Setting(
        str, "dtypes of the weights (p) and of the computation (c): p=f32,c=bfloat16", MUST
    ),
    "attention": Setting(
        str,
        "the attention backend",
        None,
        unset="the backend of the platform",
        choices=("dense", "blocks", "tokamax", "tokamax_chunked", "splash", "cudnn"),
        free=True,
    ),
    "remat": Setting(
        str,
        "gradient checkpointing: how much is computed again in the backward pass",
        "full",
        choices=("full", "attention", "products", "none"),
        free=True,
    ),
    "mesh.data": Setting(int, "devices that hold copies of the weights", 1, free=True),
    "mesh.fsdp": Setting(int, "devices that share the weights and the rows", -1, free=True),
    "mesh.tensor": Setting(int, "devices that share each row", 1, free=True),
    "distributed.enabled": Setting(
        bool, "true on every process of a run on several hosts", False, free=True
    ),
    "distributed.coordinator_address": Setting(
        str, "host:port of process 0", None, unset="TPU pods and Slurm know it", free=True
    ),
    "distributed.num_processes": Setting(
        int, "how many processes the run has", None, unset="TPU pods and Slurm know it", free=True
    ),
    "distributed.process_id": Setting(
        int, "which of them this one is", None, unset="TPU pods and Slurm know it", free=True
    ),
    "compile_cache": Setting(
        str,
        "a directory for compiled programs",
        "~/.cache/nnx-zoo/compiled",
        unset="every start compiles afresh",
        free=True,
    ),
}
ALONG_THE_WAY = {
    "steps_per_log": Setting(int, "steps between two records", 10, bound=ABOVE_0, free=True),
    "steps_per_eval": Setting(
        int,
        "steps between two evaluations of the held-out sets",
        None,
        unset="only after the last step",
        bound=ABOVE_0,
        free=True,
    ),
    "run_initial_eval": Setting(bool, "evaluate before the first step too", False, free=True),
    "max_eval_pairs": Setting(
        int,
        "examples of each held-out set that are used, evenly spread over it",
        None,
        unset="all of them",
        bound=ABOVE_0,
        free=True,
    ),
    "steps_per_checkpoint": Setting(
        int,
        "steps between two checkpoints",
        None,
        unset="only after the last step",
        bound=ABOVE_0,
        free=True,
    ),
    "keep_checkpoints": Setting(
        int, "how many of the newest checkpoints stay", 1, bound=ABOVE_0, free=True
    ),
    "keep_every": Setting(
        int,
        "the checkpoints of every n-th step stay as well",
        None,
        unset="the newest stay",
        bound=ABOVE_0,
        free=True,
    ),
    "keep_best": Setting(
        str,
        "the best checkpoint by this figure stays as well, like heldout/dpo_accuracy",
        None,
        unset="the newest stay",
        free=True,
    ),
    "save_retries": Setting(
        int, "failed saves in a row after which the run stops", 2, bound=AT_LEAST_0, free=True
    ),
    "steps_per_hf_export": Setting(
        int,
        "steps between two exports as a Hugging Face folder",
        None,
        unset="only after the last step",
        bound=EXPORT,
        free=True,
    ),
    "hf_save_dtype": Setting(
        str, "dtype of the weights that are exported", "bfloat16", choices=DTYPES, free=True
    ),
    "sample_tokens": Setting(
        int,
        "tokens of each answer to held-out prompts at the end; 0: none is generated",
        128,
        bound=AT_LEAST_0,
        free=True,
    ),
    "tensorboard": Setting(bool, "write TensorBoard files", True, free=True),
    "wandb_project": Setting(
        str, "a project of Weights & Biases", None, unset="no Weights & Biases", free=True
    ),
    "profile": Setting(
        str, "11-13, say: these steps are traced", None, unset="nothing is traced", free=True
    ),
}

Table = Mapping[str, Setting]
Groups = Mapping[str, Table]

# The settings of each recipe (sft.py has no reference, and one loss), in the order of `--help`.
DPO: Groups = {
    "The run": RUN,
    "Model": MODEL,
    "Reference": REFERENCE,
    "Data": DATA,
    "Packing": PACKING,
    "Loss": PREFERENCE,
    "Optimizer": OPTIMIZER,
    "Computation": COMPUTE,
    "Along the way": ALONG_THE_WAY,
}
SFT: Groups = {name: group for name, group in DPO.items() if name not in ("Reference", "Loss")}


def table_of(groups: Groups) -> dict[str, Setting]:
    """Setting by name, of all groups."""
    return {name: setting for group in groups.values() for name, setting in group.items()}


ALL = table_of(DPO)

# Under these the user chooses the names.
NAMED_BY_THE_USER = ("train_data", "validation", "data.columns")
CHOSEN_NAME = r"(?:train_data|validation|data\.columns)\.[^.]+"


def may_be_unset(name: str, table: Table) -> bool:
    """Does a setting mean something while it is unset? What the user has named does."""
    if name in table:
        return table[name].unset is not None
    return name.startswith(tuple(f"{chosen}." for chosen in NAMED_BY_THE_USER))


KIND_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "several texts, like a,b",
    dict: "written like \"{'chosen': 'better'}\"",
}

"""Every setting of every recipe, described once.

From this table come the checks of a config and its flags (`checks`, `overrides`), `--help` and the
list in docs/dpo.md (`listing`), and what a resumed run must share (`resume`). Nothing here is
slow to import, so that a wrong flag is answered before jax is loaded.
"""

from collections.abc import Callable, Container, Iterable, Mapping
import math
import re
from typing import NamedTuple

from checkpoints_io import compiled

MUST = "must be named"  # as a default: a config without the setting is refused


class Bound(NamedTuple):
    """Which numbers a setting may be."""

    says: str  # "must be …"
    holds: Callable[[float], bool]


ABOVE_0 = Bound("above 0", lambda x: 0 < x < math.inf)
AT_LEAST_0 = Bound("at least 0", lambda x: 0 <= x < math.inf)
SEVERAL = Bound("from 2 to 64", lambda x: 2 <= x <= 64)
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
    unset: str | None = None  # what unset (None) means; a setting without this may not be unset
    bound: Bound | None = None
    choices: tuple[str, ...] = ()
    of_optimizers: tuple[str, ...] = ()  # only these optimizers take it; empty: all do
    free: bool = False  # may change when a run is resumed: no past number depends on it


ADAM = ("adamw", "adamw8bit", "muon")  # muon is adamw for what is no matrix of a layer
DTYPES = ("f32", "float32", "bf16", "bfloat16", "f16", "float16")

RUN = {
    "name": Setting(
        str,
        "what the run is called in Weights & Biases and trackio",
        None,
        unset="the last part of directory",
        free=True,
    ),
    "tags": Setting(tuple, "its tags in Weights & Biases", (), free=True),
    "directory": Setting(
        str, "where the run keeps its files: a folder, or one in a bucket (gs://)", MUST, free=True
    ),
    "seed": Setting(
        int, "decides the order of the data, and the values of new adapters", 0, bound=SEED
    ),
}
MODEL = {
    "initialize_from_hf": Setting(
        str,
        "the weights to start from: a folder, here or at gs://, or a hub id (owner/name@revision)",
        MUST,
    ),
    "tokenizer": Setting(str, "a folder or hub id", None, unset="the one in initialize_from_hf"),
    "chat_template": Setting(str, "a file", None, unset="the tokenizer's own"),
}
REFERENCE = {
    "reference_model_path": Setting(
        str, "a folder or hub id", None, unset="the same as initialize_from_hf"
    ),
    "reference_is_hf": Setting(
        bool,
        "false: reference_model_path is the directory of a run; its newest checkpoint is used",
        True,
    ),
    "reference_mode": Setting(
        str,
        "resident: stays in memory; cached: computed once for every pair, then freed; base: the "
        "policy without its adapters, whatever they started from",
        "resident",
        choices=("resident", "cached", "base"),
        free=True,
    ),
    "reference_sync_steps": Setting(
        int,
        "TR-DPO: after every so many updates the reference moves towards the policy, like 512",
        None,
        unset="it never moves",
        bound=ABOVE_0,
    ),
    "reference_mixup_alpha": Setting(
        float,
        "how much of the way it then moves; 1: all of it",
        None,
        unset="0.6",
        bound=Bound("above 0 and at most 1", lambda x: 0 < x <= 1),
    ),
    "reference_cache": Setting(
        str,
        "a directory for the log-probabilities of a cached reference",
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
        "share of the prompts of train_data to hold out",
        None,
        unset="none; `validation` names held-out files",
        bound=INNER_SHARE,
    ),
    "validation": Setting(
        object, 'held-out sources: dict(name="…", …)', None, unset="no held-out files", free=True
    ),
    "data.layout": Setting(
        str, "which columns hold what: see docs/data.md", None, unset="recognised from the columns"
    ),
    "data.columns": Setting(
        dict, 'our name="its name", where a dataset has other column names', {}, unset="our names"
    ),
    "data.scored_turns": Setting(
        str,
        "which turns after the prompt are scored",
        "assistant",
        choices=("assistant", "last", "all"),
    ),
    "data.date": Setting(
        str,
        "the day for chat templates that print today's date, like 2026-01-31",
        None,
        unset="such templates are refused",
    ),
    "data.end_of_turn": Setting(
        str,
        "a special token after the last answer, for chat templates that write none",
        None,
        unset="what the chat template writes after an answer",
    ),
    "data.answers": Setting(
        int,
        "how many answers of a ranked row are trained on, at most: the best, the worst and those "
        "between",
        2,
        bound=SEVERAL,
    ),
    "data.over_length": Setting(
        str,
        "what to do with texts longer than train_seq_len",
        "drop",
        choices=("drop", "cut_prompt", "cut_answer"),
    ),
    "data.max_malformed_fraction": Setting(
        float, "the run stops if a larger share of rows is malformed", 0.0, bound=SHARE
    ),
    "token_cache": Setting(
        str,
        "a directory for tokenised rows",
        "~/.cache/nnx-zoo/tokens",
        unset="every start tokenises again",
        free=True,
    ),
}
PACKING = {
    "train_seq_len": Setting(
        int, "maximum tokens of a prompt with its answer", MUST, bound=ABOVE_0
    ),
    "row_length": Setting(
        int,
        "length of a packed row, in tokens",
        None,
        unset="chosen from the lengths of the texts and the mesh",
        bound=ROW,
        free=True,
    ),
    "per_device_parallelism": Setting(
        int,
        "rows per device in a micro-batch",
        None,
        unset="chosen to fit the memory of the devices",
        bound=ABOVE_0,
        free=True,
    ),
    "min_pack_fill": Setting(
        float, "the run stops if rows are filled to a smaller share", 0.5, bound=SHARE, free=True
    ),
}
PREFERENCE = {
    "loss": Setting(
        str,
        "sigmoid is DPO; docs/losses.md has the others. Several are added up by weights: "
        "sigmoid,sft=0.2",
        MUST,
    ),
    "beta": Setting(
        float, "how strongly the policy is kept near the reference", MUST, bound=ABOVE_0
    ),
    "label_smoothing": Setting(
        float, "share of pairs assumed to be mislabelled", 0.0, bound=SMOOTHING
    ),
    "ld_alpha": Setting(
        float,
        "LD-DPO: what scored tokens count that an answer has more than the other, like 0.5",
        None,
        unset="1, as all tokens",
        bound=DECAY,
    ),
    "use_weighting": Setting(
        bool,
        "WPO: a pair counts by how near its answers are to the policy's own",
        None,
        unset="all count the same",
    ),
    "list_pairs": Setting(
        str,
        "the pairs of a list of several answers (data.answers): all of them, or the best answer "
        "against each of the others",
        None,
        unset="all",
        choices=("all", "best"),
    ),
    "dpop_lambda": Setting(
        float,
        "for dpop: weight of the penalty on chosen answers that become less likely, like 5.0",
        None,
        unset="only for loss=dpop",
        bound=ABOVE_0,
    ),
    "length_alpha": Setting(
        float,
        "for r_dpo: what a token of length counts in the margin, like 0.01",
        None,
        unset="only for loss=r_dpo",
        bound=ABOVE_0,
    ),
    "gamma_beta_ratio": Setting(
        float,
        "for simpo: the margin that is asked for, in nats per token",
        None,
        unset="0.5",
        bound=AT_LEAST_0,
    ),
    "cpo_alpha": Setting(
        float, "for cpo: weight of its sft term", None, unset="1", bound=AT_LEAST_0
    ),
    "desirable_weight": Setting(
        float, "for kto: weight of wanted answers", None, unset="1", bound=ABOVE_0
    ),
    "undesirable_weight": Setting(
        float, "for kto: weight of unwanted answers", None, unset="1", bound=ABOVE_0
    ),
    "discopop_tau": Setting(
        float, "for discopop: its temperature", None, unset="0.05", bound=ABOVE_0
    ),
    "f_divergence_type": Setting(
        str,
        "the divergence that keeps the policy near the reference, for losses of margins",
        None,
        unset="reverse_kl",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ),
    "f_alpha_divergence_coef": Setting(
        float,
        "the alpha of alpha_divergence",
        None,
        unset="only for alpha_divergence",
        bound=ABOVE_0,
    ),
}
OPTIMIZER = {
    "trainable": Setting(
        str,
        "a regular expression over whole Hugging Face names: weights that match it are trained, "
        r"the others are frozen, like .*layers\.(2[0-9]|3[01])\..*",
        None,
        unset="all weights are trained, or adapters",
    ),
    "train_batch_size": Setting(
        int, "examples (pairs, or answers) per update", MUST, bound=ABOVE_0
    ),
    "num_train_steps": Setting(
        int, "number of updates", None, unset="num_epochs decides", bound=ABOVE_0
    ),
    "num_epochs": Setting(
        float,
        "passes over the training data",
        None,
        unset="num_train_steps decides",
        bound=ABOVE_0,
    ),
    "optimizer": Setting(
        str,
        "adamw keeps 8 bytes per weight; adamw8bit 2, both moments in 8 bits; lion 4; rmsprop, the "
        "DPO paper's, 4; muon 4 for the matrices of the layers, and is adamw for all else; "
        "adafactor the means of a matrix's rows and columns",
        "adamw",
        choices=("adamw", "adamw8bit", "lion", "rmsprop", "muon", "adafactor"),
    ),
    "learning_rate": Setting(float, "peak learning rate", MUST, bound=ABOVE_0),
    "lr_schedule": Setting(
        str,
        "how the learning rate decays over the cooldown; inverse_sqrt: as sqrt(warmup / step)",
        "linear",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    ),
    "warmup": Setting(
        float,
        "warm-up, in steps, or below 1 as a fraction of all steps",
        0.0,
        bound=AT_LEAST_0,
    ),
    "cooldown": Setting(
        float,
        "final decay, in steps, or below 1 as a fraction of all steps",
        None,
        unset="all steps after the warm-up",
        bound=AT_LEAST_0,
    ),
    "min_lr_ratio": Setting(
        float,
        "final learning rate, as a fraction of the peak; of inverse_sqrt the lowest it may come to",
        0.0,
        bound=SHARE,
    ),
    "weight_decay": Setting(
        float,
        "decay of the weights by the learning rate, as AdamW's, for matrices only",
        0.0,
        bound=AT_LEAST_0,
    ),
    "max_grad_norm": Setting(
        float, "gradients are clipped to this norm", None, unset="no clipping", bound=ABOVE_0
    ),
    "adam_beta1": Setting(
        float, "decay of AdamW's first moment", 0.9, bound=DECAY, of_optimizers=ADAM
    ),
    "adam_beta2": Setting(
        float, "decay of AdamW's second moment", 0.95, bound=DECAY, of_optimizers=ADAM
    ),
    "adam_epsilon": Setting(
        float,
        "added to the root of the second moment",
        1e-8,
        bound=ABOVE_0,
        of_optimizers=ADAM,
    ),
    "adam_mu_dtype": Setting(
        str,
        "dtype of the first moment, of Muon too; bfloat16 saves 2 bytes per weight",
        "float32",
        choices=DTYPES[:4],
        of_optimizers=("adamw", "muon"),
    ),
    "ema_decay": Setting(
        float,
        "decay of an exponential moving average of the weights, like 0.99, which is evaluated and "
        "exported in their place; it takes 4 bytes per weight",
        None,
        unset="no average",
        bound=INNER_SHARE,
    ),
    "nonfinite": Setting(
        str,
        "when a loss or gradient is NaN or infinite: stop the run, or skip the update",
        "stop",
        choices=("stop", "skip"),
        free=True,
    ),
}
COMPUTE = {
    "mp": Setting(
        str,
        "dtypes of the weights (p), always f32, and of the computation (c), f32 or bfloat16",
        "p=f32,c=bfloat16",
    ),
    "attention": Setting(
        str,
        "the attention backend",
        None,
        unset="the platform's default",
        choices=("dense", "blocks", "triton", "cudnn", "splash", "tokamax", "tokamax_chunked"),
        free=True,
    ),
    "remat": Setting(
        str,
        "gradient checkpointing, what the backward pass recomputes of a layer: all (full), all but "
        "attention, what lies between products, or nothing (none)",
        None,
        unset="on accelerators what fits their memory, layer by layer; on CPUs full",
        choices=("full", "attention", "products", "none"),
        free=True,
    ),
    "mesh.data": Setting(
        int,
        "data parallelism: copies of the weights, at least one in each slice of a TPU pod; -1: as "
        "many as the devices there are make, on any number of hosts",
        1,
        free=True,
    ),
    "mesh.fsdp": Setting(
        int, "FSDP: devices that split weights and rows; -1: all others", -1, free=True
    ),
    "mesh.context": Setting(
        int,
        "context parallelism, for long texts: devices that split the tokens of each row, and the "
        "weights as FSDP does",
        1,
        free=True,
    ),
    "mesh.tensor": Setting(
        int, "tensor parallelism: devices that split each row's work", 1, free=True
    ),
    "distributed.enabled": Setting(
        bool, "true on every process of a run on several hosts", False, free=True
    ),
    "distributed.coordinator_address": Setting(
        str, "host:port of process 0", None, unset="given by TPU pods and Slurm", free=True
    ),
    "distributed.num_processes": Setting(
        int, "number of processes of the run", None, unset="given by TPU pods and Slurm", free=True
    ),
    "distributed.process_id": Setting(
        int, "number of this process, from 0", None, unset="given by TPU pods and Slurm", free=True
    ),
    "require_accelerator": Setting(
        bool,
        "true: a process that finds neither GPU nor TPU is refused, and does not run on its CPU",
        False,
        free=True,
    ),
    "compile_cache": Setting(
        str,
        "a directory for compiled programs",
        compiled.DEFAULT,
        unset="every start compiles again",
        free=True,
    ),
}
ADAPTER = {
    "adapter.rank": Setting(
        int,
        "the rank of new LoRA adapters, like 16: they are trained, and the weights are frozen",
        None,
        unset="all weights are trained, unless adapter.path is set",
        bound=ABOVE_0,
    ),
    "adapter.alpha": Setting(
        float,
        "LoRA's alpha: what an adapter adds is multiplied by alpha / rank",
        None,
        unset="the rank",
        bound=ABOVE_0,
    ),
    "adapter.targets": Setting(
        tuple,
        "what gets adapters: all-linear, names like q_proj,v_proj, or one regular expression "
        "over whole names, as PEFT matches them",
        ("all-linear",),
    ),
    "adapter.exclude": Setting(tuple, "what gets none of them: names, or an expression", ()),
    "adapter.layers": Setting(
        str, "the layers that get adapters, from 0, like 0-7,12", None, unset="all layers"
    ),
    "adapter.rank_pattern": Setting(
        tuple, r"another rank by name or expression, like v_proj=8,.*layers\.0\..*=4", ()
    ),
    "adapter.alpha_pattern": Setting(tuple, "another alpha, likewise", ()),
    "adapter.rslora": Setting(bool, "multiply by alpha / sqrt(rank), not alpha / rank", False),
    "adapter.dora": Setting(
        bool, "DoRA: the norm of each output's weights is trained separately", False
    ),
    "adapter.zero": Setting(
        str,
        "which factor starts at zero: A learns more at low rates, B is PEFT's way",
        "A",
        choices=("A", "B"),
    ),
    "adapter.lora_plus": Setting(
        float,
        "LoRA+: B's learning rate as a multiple of A's, like 16",
        None,
        unset="one rate",
        bound=ABOVE_0,
    ),
    "adapter.path": Setting(
        str,
        "a PEFT folder or hub id whose adapters are trained on, as those of an SFT run",
        None,
        unset="new adapters",
    ),
    "adapter.export": Setting(
        str,
        "what an export holds: the adapters as a PEFT folder, or the merged model",
        "adapter",
        choices=("adapter", "merged"),
        free=True,
    ),
    "frozen": Setting(
        str,
        "how the weights beside adapters are kept; int8 and nf4 (as in QLoRA: 8 and 4.1 bits per "
        "weight) are for the matrices of the layers, which are dequantised one layer at a time",
        None,
        unset="the dtype of the computation",
        choices=("bfloat16", "float32", "int8", "nf4"),
    ),
}
ALONG_THE_WAY = {
    "steps_per_log": Setting(int, "steps between log records", 10, bound=ABOVE_0, free=True),
    "steps_per_eval": Setting(
        int,
        "steps between evaluations of the held-out sets",
        None,
        unset="only after the last step",
        bound=ABOVE_0,
        free=True,
    ),
    "eval_at": Setting(
        str,
        "evaluations after these steps too, like 1,5,25",
        None,
        unset="steps_per_eval alone",
        free=True,
    ),
    "stop_when": Setting(
        str,
        "the run ends when this held-out figure has not improved for stop_patience evaluations, "
        "like heldout/dpo_loss",
        None,
        unset="it takes all its steps",
        free=True,
    ),
    "stop_patience": Setting(
        int, "evaluations without an improvement, for stop_when", 3, bound=ABOVE_0, free=True
    ),
    "run_initial_eval": Setting(bool, "evaluate before the first step too", False, free=True),
    "max_eval_pairs": Setting(
        int,
        "maximum examples used of each held-out set, and of plain texts, evenly spread over it; of "
        "each task the first",
        None,
        unset="all of them",
        bound=ABOVE_0,
        free=True,
    ),
    "validation_texts": Setting(
        object,
        "plain texts that are evaluated too, by nats a token and bits per byte: "
        'dict(name="…", …) of .txt files, or of data whose rows have `text`',
        None,
        unset="no plain texts",
        free=True,
    ),
    "tasks": Setting(
        tuple, "tasks of lm-evaluation-harness that are evaluated too, like arc_easy", (), free=True
    ),
    "tasks_folder": Setting(
        str,
        "where the YAML files of further tasks are",
        None,
        unset="only those of the harness",
        free=True,
    ),
    "steps_per_checkpoint": Setting(
        int,
        "steps between checkpoints",
        None,
        unset="only after the last step",
        bound=ABOVE_0,
        free=True,
    ),
    "minutes_per_checkpoint": Setting(
        float,
        "a checkpoint is also due so many minutes after the one before it: what a kill may lose",
        None,
        unset="only by steps",
        bound=ABOVE_0,
        free=True,
    ),
    "keep_checkpoints": Setting(
        int, "how many of the newest checkpoints are kept", 1, bound=ABOVE_0, free=True
    ),
    "keep_every": Setting(
        int,
        "checkpoints at multiples of this step are kept as well",
        None,
        unset="only the newest are kept",
        bound=ABOVE_0,
        free=True,
    ),
    "keep_best": Setting(
        str,
        "the best checkpoint by this metric is kept as well, and exported at the end in place of "
        "the last, like heldout/dpo_accuracy",
        None,
        unset="only the newest are kept",
        free=True,
    ),
    "save_retries": Setting(
        int,
        "how often a failed save is tried again before the run stops",
        2,
        bound=AT_LEAST_0,
        free=True,
    ),
    "hang_minutes": Setting(
        float,
        "a run that has not moved for so many minutes ends with an error and the stack of every "
        "thread, for its launcher to start it again: more than the slowest of reading weights, "
        "compiling, a step, a save, an export, sending it and answering at the end takes",
        None,
        unset="it waits for ever",
        bound=ABOVE_0,
        free=True,
    ),
    "steps_per_hf_export": Setting(
        int,
        "steps between exports as a Hugging Face folder",
        None,
        unset="only after the last step",
        bound=EXPORT,
        free=True,
    ),
    "hf_save_dtype": Setting(
        str, "dtype of exported weights", "bfloat16", choices=DTYPES, free=True
    ),
    "hf_text_only": Setting(
        bool,
        "exports hold the text alone, and not what else `initialize_from_hf` holds: what sees "
        "images, and heads for tokens after the next",
        False,
        free=True,
    ),
    "push_to_hub": Setting(
        str,
        "a repository of the hub (owner/name) that the last export is sent to, with its card",
        None,
        unset="nothing is sent",
        free=True,
    ),
    "hub_strategy": Setting(
        str,
        "end: the last export alone is sent to the hub; every: each of them",
        "end",
        choices=("end", "every"),
        free=True,
    ),
    "hub_private": Setting(
        bool,
        "a new repository is private, and one that is open to all is refused",
        True,
        free=True,
    ),
    "sample_tokens": Setting(
        int,
        "tokens per sample answer; 0: no answers, at the end or before",
        128,
        bound=AT_LEAST_0,
        free=True,
    ),
    "steps_per_sample": Setting(
        int,
        "steps between samples of what policy and reference answer, kept in samples.jsonl",
        None,
        unset="answers at the end alone",
        bound=ABOVE_0,
        free=True,
    ),
    "sample_prompts": Setting(
        str,
        "a file of prompts for these samples: rows with `prompt` or `messages`",
        None,
        unset="held-out prompts, or of the training data where nothing is held out",
        free=True,
    ),
    "sample_count": Setting(
        int, "how many prompts, evenly spread over all there are", 4, bound=ABOVE_0, free=True
    ),
    "sample_temperature": Setting(
        float,
        "beside the greedy answer to each prompt, one drawn at this temperature, like 0.7",
        None,
        unset="greedy answers alone",
        bound=ABOVE_0,
        free=True,
    ),
    "tensorboard": Setting(bool, "write TensorBoard files", True, free=True),
    "wandb_project": Setting(
        str,
        "the project to log to in Weights & Biases",
        None,
        unset="no Weights & Biases",
        free=True,
    ),
    "trackio_project": Setting(
        str,
        "the project to log to in trackio, on this machine (`trackio show`) unless its "
        "TRACKIO_SPACE_ID names a Space of the hub",
        None,
        unset="no trackio",
        free=True,
    ),
    "profile": Setting(
        str, "steps to trace, like 11-13", None, unset="nothing is traced", free=True
    ),
}

# What may stand beside `adapter.path`: all else of ADAPTER the folder there has decided.
OF_FOLDER = ("adapter.rank", "adapter.path", "adapter.lora_plus", "adapter.export")

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
    "Adapters": ADAPTER,
    "Optimizer": OPTIMIZER,
    "Computation": COMPUTE,
    "Along the way": ALONG_THE_WAY,
}
SFT: Groups = {name: group for name, group in DPO.items() if name not in ("Reference", "Loss")}


def _some(group: Table, *names: str) -> Table:
    return {name: group[name] for name in names}


# Of score.py, which trains nothing: what decides log-probabilities, and where they go. Its configs
# are those of DPO, whose other settings it does not read (`unread`).
SCORE: Groups = {
    "The run": {
        "directory": RUN["directory"]._replace(says="where scores.jsonl is written, and no more")
    },
    "Model": {
        **MODEL,
        "initialize_from_hf": MODEL["initialize_from_hf"]._replace(
            says="the policy: a folder, here or at gs://, or a hub id (owner/name@revision)"
        ),
    },
    "Reference": {
        **_some(REFERENCE, "reference_model_path", "reference_is_hf"),
        "reference_model_path": REFERENCE["reference_model_path"]._replace(
            unset="the policy without its adapters"
        ),
    },
    "Data": DATA,
    "Packing": _some(PACKING, "train_seq_len", "row_length", "per_device_parallelism"),
    "Rewards": {"beta": PREFERENCE["beta"]._replace(says="a reward is beta times a log-ratio")},
    "Adapters": {
        "adapter.path": ADAPTER["adapter.path"]._replace(
            says="a PEFT folder or hub id: the policy is initialize_from_hf with these adapters",
            unset="the policy has none",
        ),
        "frozen": ADAPTER["frozen"],
    },
    "Computation": {name: x for name, x in COMPUTE.items() if name != "remat"},
}


def table_of(groups: Groups) -> dict[str, Setting]:
    """The settings of all groups, by name."""
    return {name: setting for group in groups.values() for name, setting in group.items()}


def recipe_of(names: Iterable[str]) -> Groups:
    """The settings of the recipe that is meant: a loss on pairs, or a reference, is dpo.py's."""
    return DPO if {*REFERENCE, *PREFERENCE}.intersection(names) else SFT


ALL = table_of(DPO)


def trains(table: Table) -> bool:
    """Whether these are the settings of a recipe that trains."""
    return "train_batch_size" in table


def trains_on_pairs(names: Container[str]) -> bool:
    """Whether these settings, or a config's, are those of a loss on pairs; otherwise answers."""
    return "beta" in names


def unread(table: Table) -> Table:
    """What a config may name beside these settings, without effect: it is one of a training run."""
    return {} if trains(table) else {name: x for name, x in ALL.items() if name not in table}


# Under these the user chooses the names.
NAMED_BY_THE_USER = ("train_data", "validation", "validation_texts", "data.columns")
CHOSEN_NAME = rf"(?:{'|'.join(map(re.escape, NAMED_BY_THE_USER))})\.[^.]+"


def may_be_unset(name: str, table: Table) -> bool:
    """Whether a setting may be unset; what the user has named always may."""
    if name in table:
        return table[name].unset is not None
    return name.startswith(tuple(f"{chosen}." for chosen in NAMED_BY_THE_USER))


KIND_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "several texts, like a,b",
    dict: "written like \"{'prompt': 'question'}\"",
}

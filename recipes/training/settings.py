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

MUST = "required"  # as a default: a config without the setting is refused


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
        int, "seed for the order of the data and the initial values of new adapters", 0, bound=SEED
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
        "TR-DPO: updates between moves of the reference towards the policy (e.g. 512)",
        None,
        unset="it never moves",
        bound=ABOVE_0,
    ),
    "reference_mixup_alpha": Setting(
        float,
        "TR-DPO: the fraction of the way that the reference moves; 1: all of it",
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
        "fraction of the prompts of train_data to hold out",
        None,
        unset="no split; `validation` names held-out files",
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
        "the date for chat templates that print today's date (e.g. 2026-01-31)",
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
        "maximum number of answers used of a ranked row: the best, the worst and some in between",
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
        float, "the run stops if a larger fraction of rows is malformed", 0.0, bound=SHARE
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
        float,
        "the run stops if a smaller fraction of the rows' positions is filled",
        0.5,
        bound=SHARE,
        free=True,
    ),
}
PREFERENCE = {
    "loss": Setting(
        str,
        "sigmoid is DPO; docs/losses.md has the others. A weighted sum is written like "
        "sigmoid,sft=0.2",
        MUST,
    ),
    "beta": Setting(
        float, "how strongly the policy is kept near the reference", MUST, bound=ABOVE_0
    ),
    "label_smoothing": Setting(
        float, "fraction of pairs assumed to be mislabelled", 0.0, bound=SMOOTHING
    ),
    "ld_alpha": Setting(
        float,
        "LD-DPO: weight of the scored tokens by which the longer answer exceeds the shorter "
        "(e.g. 0.5)",
        None,
        unset="1, like all other tokens",
        bound=DECAY,
    ),
    "use_weighting": Setting(
        bool,
        "WPO: pairs are weighted by how likely their answers are under the policy",
        None,
        unset="all pairs weigh the same",
    ),
    "list_pairs": Setting(
        str,
        "which pairs of a ranked list (data.answers) are compared: all of them, or the best answer "
        "with each of the others",
        None,
        unset="all",
        choices=("all", "best"),
    ),
    "dpop_lambda": Setting(
        float,
        "for dpop: weight of the penalty on chosen answers that become less likely (e.g. 5.0)",
        None,
        unset="only for loss=dpop",
        bound=ABOVE_0,
    ),
    "length_alpha": Setting(
        float,
        "for r_dpo: change of the margin per token of length difference (e.g. 0.01)",
        None,
        unset="only for loss=r_dpo",
        bound=ABOVE_0,
    ),
    "gamma_beta_ratio": Setting(
        float,
        "for simpo: the target margin, in nats per token",
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
        "the divergence that keeps the policy near the reference, for losses on margins",
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
        r"the others are frozen (e.g. .*layers\.(2[0-9]|3[01])\..*)",
        None,
        unset="all weights are trained, or adapters",
    ),
    "train_batch_size": Setting(
        int, "examples (pairs, or answers) per update", MUST, bound=ABOVE_0
    ),
    "num_train_steps": Setting(
        int, "number of updates", None, unset="the run length is num_epochs", bound=ABOVE_0
    ),
    "num_epochs": Setting(
        float,
        "passes over the training data",
        None,
        unset="the run length is num_train_steps",
        bound=ABOVE_0,
    ),
    "optimizer": Setting(
        str,
        "adamw keeps 8 bytes per weight; adamw8bit 2 (both moments in 8 bits); lion 4; rmsprop "
        "(the DPO paper's) 4; muon 4 for the matrices of the layers, with adamw for all other "
        "weights; adafactor only row and column means of each matrix",
        "adamw",
        choices=("adamw", "adamw8bit", "lion", "rmsprop", "muon", "adafactor"),
    ),
    "learning_rate": Setting(float, "peak learning rate", MUST, bound=ABOVE_0),
    "lr_schedule": Setting(
        str,
        "how the learning rate decays over the cooldown; inverse_sqrt: like sqrt(warmup / step)",
        "linear",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    ),
    "warmup": Setting(
        float,
        "length of the warm-up in steps or, if below 1, as a fraction of all steps",
        0.0,
        bound=AT_LEAST_0,
    ),
    "cooldown": Setting(
        float,
        "length of the final decay in steps or, if below 1, as a fraction of all steps",
        None,
        unset="all steps after the warm-up",
        bound=AT_LEAST_0,
    ),
    "min_lr_ratio": Setting(
        float,
        "final learning rate as a fraction of the peak; for inverse_sqrt a lower bound",
        0.0,
        bound=SHARE,
    ),
    "weight_decay": Setting(
        float,
        "decoupled weight decay as in AdamW, of matrices only",
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
        "added to the square root of AdamW's second moment",
        1e-8,
        bound=ABOVE_0,
        of_optimizers=ADAM,
    ),
    "adam_mu_dtype": Setting(
        str,
        "dtype of the first moment of AdamW and Muon; bfloat16 saves 2 bytes per weight",
        "float32",
        choices=DTYPES[:4],
        of_optimizers=("adamw", "muon"),
    ),
    "ema_decay": Setting(
        float,
        "decay of an exponential moving average of the weights (e.g. 0.99), which is evaluated and "
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
        "mixed precision: dtype of the weights (p), always f32, and of the computation (c), f32 or "
        "bfloat16",
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
        "gradient checkpointing: what the backward pass recomputes of a layer. full: everything; "
        "attention: everything but attention; products: everything but matrix products; none: "
        "nothing",
        None,
        unset="on accelerators as little as memory allows, layer by layer; on CPUs full",
        choices=("full", "attention", "products", "none"),
        free=True,
    ),
    "mesh.data": Setting(
        int,
        "data parallelism: copies of the weights, at least one per slice of a TPU pod; -1: as many "
        "as the available devices allow, on any number of hosts",
        1,
        free=True,
    ),
    "mesh.fsdp": Setting(
        int, "FSDP: devices that split weights and rows; -1: all others", -1, free=True
    ),
    "mesh.context": Setting(
        int,
        "context parallelism for long texts: devices that split the tokens of each row, and also "
        "the weights, as FSDP does",
        1,
        free=True,
    ),
    "mesh.tensor": Setting(
        int, "tensor parallelism: devices that share the work on each row", 1, free=True
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
        "true: exit with an error where there is no GPU or TPU, rather than run on the CPU",
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
        "rank of new LoRA adapters (e.g. 16): they are trained, and the weights are frozen",
        None,
        unset="all weights are trained, unless adapter.path is set",
        bound=ABOVE_0,
    ),
    "adapter.alpha": Setting(
        float,
        "LoRA's alpha: an adapter's output is multiplied by alpha / rank",
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
    "adapter.exclude": Setting(
        tuple, "what gets no adapters: names, or one regular expression", ()
    ),
    "adapter.layers": Setting(
        str, "the layers that get adapters, counted from 0 (e.g. 0-7,12)", None, unset="all layers"
    ),
    "adapter.rank_pattern": Setting(
        tuple, r"ranks by name or regular expression (e.g. v_proj=8,.*layers\.0\..*=4)", ()
    ),
    "adapter.alpha_pattern": Setting(tuple, "alphas by name or regular expression", ()),
    "adapter.rslora": Setting(
        bool, "rsLoRA: multiply by alpha / sqrt(rank) instead of alpha / rank", False
    ),
    "adapter.dora": Setting(
        bool, "DoRA: the norm of each output's weight vector is trained separately", False
    ),
    "adapter.zero": Setting(
        str,
        "which factor starts at zero: A learns more at low learning rates, B is PEFT's default",
        "A",
        choices=("A", "B"),
    ),
    "adapter.lora_plus": Setting(
        float,
        "LoRA+: B's learning rate as a multiple of A's (e.g. 16)",
        None,
        unset="the same rate for both",
        bound=ABOVE_0,
    ),
    "adapter.path": Setting(
        str,
        "a PEFT folder or hub id with adapters to continue training (e.g. those of an SFT run)",
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
        "dtype of the frozen weights under adapters; int8 and nf4 (as in QLoRA: 8 and 4.1 bits per "
        "weight) apply to the matrices of the layers, which are dequantised one layer at a time",
        None,
        unset="the dtype of the computation",
        choices=("bfloat16", "float32", "int8", "nf4"),
    ),
}
LOGGING_AND_SAVING = {
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
        "further steps to evaluate after (e.g. 1,5,25)",
        None,
        unset="only as steps_per_eval says",
        free=True,
    ),
    "stop_when": Setting(
        str,
        "the run ends when this held-out metric has not improved for stop_patience evaluations "
        "(e.g. heldout/dpo_loss)",
        None,
        unset="the run takes all its steps",
        free=True,
    ),
    "stop_patience": Setting(
        int,
        "for stop_when: number of evaluations without an improvement",
        3,
        bound=ABOVE_0,
        free=True,
    ),
    "run_initial_eval": Setting(bool, "evaluate before the first step too", False, free=True),
    "max_eval_pairs": Setting(
        int,
        "maximum number of examples of each held-out set and file of plain texts, evenly spread "
        "over it, and of each task, from its start",
        None,
        unset="all of them",
        bound=ABOVE_0,
        free=True,
    ),
    "validation_texts": Setting(
        object,
        "plain texts to evaluate as well, in nats per token and bits per byte: "
        'dict(name="…", …) of .txt files, or of data whose rows have `text`',
        None,
        unset="no plain texts",
        free=True,
    ),
    "tasks": Setting(
        tuple, "tasks of lm-evaluation-harness to evaluate as well (e.g. arc_easy)", (), free=True
    ),
    "tasks_folder": Setting(
        str,
        "a folder with YAML files of further tasks",
        None,
        unset="only the tasks of the harness",
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
        "save a checkpoint also after this many minutes since the last one: what a kill can lose",
        None,
        unset="only by steps",
        bound=ABOVE_0,
        free=True,
    ),
    "keep_checkpoints": Setting(
        int, "number of newest checkpoints to keep", 1, bound=ABOVE_0, free=True
    ),
    "keep_every": Setting(
        int,
        "also keep the checkpoints of steps that are multiples of this number",
        None,
        unset="only the newest are kept",
        bound=ABOVE_0,
        free=True,
    ),
    "keep_best": Setting(
        str,
        "also keep the best checkpoint by this metric (e.g. heldout/dpo_accuracy), and export it "
        "at the end in place of the last",
        None,
        unset="only the newest are kept",
        free=True,
    ),
    "save_retries": Setting(
        int,
        "number of times a failed save is retried before the run stops",
        2,
        bound=AT_LEAST_0,
        free=True,
    ),
    "hang_minutes": Setting(
        float,
        "exit with an error and all stack traces after this many minutes without progress, so that "
        "the launcher can restart the run; set it above the slowest single operation: reading "
        "weights, compiling, a step, a save, an export, an upload, or the answers at the end",
        None,
        unset="the run waits for ever",
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
        "exports hold only the text decoder, without what else `initialize_from_hf` has: vision "
        "tower and multi-token-prediction heads",
        False,
        free=True,
    ),
    "push_to_hub": Setting(
        str,
        "a hub repository (owner/name) to push the last export to, with its model card",
        None,
        unset="nothing is sent",
        free=True,
    ),
    "hub_strategy": Setting(
        str,
        "end: push only the last export to the hub; every: push each export",
        "end",
        choices=("end", "every"),
        free=True,
    ),
    "hub_private": Setting(
        bool,
        "create a private repository, and refuse an existing one that is public",
        True,
        free=True,
    ),
    "sample_tokens": Setting(
        int,
        "maximum tokens per sample answer; 0: no sample answers at all",
        128,
        bound=AT_LEAST_0,
        free=True,
    ),
    "steps_per_sample": Setting(
        int,
        "steps between sample answers of policy and reference, written to samples.jsonl",
        None,
        unset="answers only at the end",
        bound=ABOVE_0,
        free=True,
    ),
    "sample_prompts": Setting(
        str,
        "a file of prompts for the samples: rows with `prompt` or `messages`",
        None,
        unset="held-out prompts, or those of the training data if nothing is held out",
        free=True,
    ),
    "sample_count": Setting(
        int,
        "number of prompts for the samples, evenly spread over all there are",
        4,
        bound=ABOVE_0,
        free=True,
    ),
    "sample_temperature": Setting(
        float,
        "temperature of a second answer to each prompt, beside the greedy one (e.g. 0.7)",
        None,
        unset="only greedy answers",
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
        str,
        "steps to trace with jax.profiler (e.g. 11-13)",
        None,
        unset="nothing is traced",
        free=True,
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
    "Logging, evaluation and checkpoints": LOGGING_AND_SAVING,
}
SFT: Groups = {name: group for name, group in DPO.items() if name not in ("Reference", "Loss")}


def _some(group: Table, *names: str) -> Table:
    return {name: group[name] for name in names}


# Of score.py, which trains nothing: what decides log-probabilities, and where they go. Its configs
# are those of DPO, whose other settings it does not read (`unread`).
SCORE: Groups = {
    "The run": {
        "directory": RUN["directory"]._replace(
            says="where scores.jsonl is written; nothing else is"
        )
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
    "Rewards": {
        "beta": PREFERENCE["beta"]._replace(
            says="factor of the rewards: a reward is beta times a log-ratio"
        )
    },
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
    tuple: "several texts (e.g. a,b)",
    dict: "written like \"{'prompt': 'question'}\"",
}

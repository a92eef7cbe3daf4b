"""Trains the work with TRL; test_trl.py compares with the files that this writes.

One run of all weights, one of adapters, and a short one of every loss and trainer in `LOSSES`.

pip install torch==2.13.0 && pip install trl==1.16.0 peft==0.21.2
python tests/trl/make_trajectory.py
"""

import importlib.metadata
import json
import pathlib
import tempfile

from datasets import Dataset
import peft
from tokenizers import Tokenizer, models, pre_tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
import work

HERE = pathlib.Path(__file__).parent


class AsGiven:
    """A trainer of TRL on the work in its order, its exact losses kept."""

    def __init__(self, **arguments):
        self.losses = []
        super().__init__(**arguments)

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *given, **named):
        result = super().compute_loss(*given, **named)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(float(loss.detach()))
        return result


class DPO(AsGiven, DPOTrainer):
    """On tokens as they stand."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


class CPO(AsGiven, CPOTrainer):
    """On text, of which TRL makes the tokens of the work."""


class ORPO(AsGiven, ORPOTrainer):
    """On text, of which TRL makes the tokens of the work."""


class KTO(AsGiven, KTOTrainer):
    """On text too, so that TRL itself pairs prompts with the answers of others; its KL is kept."""

    def __init__(self, **arguments):
        self.kl = []
        super().__init__(**arguments)

    def compute_loss(self, *given, **named):
        result = super().compute_loss(*given, **named)
        self.kl.append(self._metrics["train"]["kl"][-1])
        return result


TRAINERS = {
    "DPO": (DPO, DPOConfig),
    "CPO": (CPO, CPOConfig),
    "ORPO": (ORPO, ORPOConfig),
    "KTO": (KTO, KTOConfig),
}

# Names of this project, and how TRL is asked for the same. No option has a value that does nothing.
LOSSES = {
    "sigmoid": ("DPO", {"loss_type": ["sigmoid"], "beta": 0.1}),
    "hinge": ("DPO", {"loss_type": ["hinge"], "beta": 0.1}),
    "ipo": ("DPO", {"loss_type": ["ipo"], "beta": 0.4}),
    "robust": ("DPO", {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1}),
    "sigmoid_norm": ("DPO", {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    "apo_zero": ("DPO", {"loss_type": ["apo_zero"], "beta": 0.1}),
    "discopop": ("DPO", {"loss_type": ["discopop"], "beta": 0.1, "discopop_tau": 0.5}),
    "bco_pair": ("DPO", {"loss_type": ["bco_pair"], "beta": 0.1}),
    "aot": ("DPO", {"loss_type": ["aot"], "beta": 0.1, "label_smoothing": 0.1}),
    "mpo": (
        "DPO",
        {
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.8, 0.2, 1.0],
            "beta": 0.1,
        },
    ),
    "simpo": ("CPO", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    "cpo": ("CPO", {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}),
    "orpo": ("ORPO", {"beta": 0.2}),
    # With more weight on unwanted answers the KL is below 0, where TRL takes 0.
    "kto": ("KTO", {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.8}),
    "kto_unwanted": ("KTO", {"beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 1.5}),
}


def main():
    """Runs TRL and stores its losses with its versions."""
    usual = {"beta": work.BETA}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        whole = trained(scratch, "DPO", usual, work.STEPS, work.LEARNING_RATE)
        store("trajectory.json", {"losses": whole.losses})
        small = trained(scratch, "DPO", usual, work.LORA_STEPS, work.LORA_RATE, adapters=True)
        store("trajectory_lora.json", {"losses": small.losses}, "peft")
        runs = {}
        for name, (trainer, options) in LOSSES.items():
            run = trained(scratch, trainer, options, work.LOSS_STEPS, work.LEARNING_RATE)
            runs[name] = {"trainer": trainer, "options": options, "losses": run.losses}
            if trainer == "KTO":
                runs[name]["kl"] = run.kl
        store("trajectory_losses.json", {"runs": runs})


def store(name: str, found: dict, *packages: str) -> None:
    """What was found, as a file, with the versions it was found with."""
    names = ("trl", "torch", "transformers", *packages)
    versions = {name: importlib.metadata.version(name) for name in names}
    (HERE / name).write_text(json.dumps({"versions": versions, **found}, indent=1) + "\n")


def trained(
    scratch: pathlib.Path,
    trainer: str,
    options: dict,
    steps: int,
    rate: float,
    *,
    adapters: bool = False,
) -> AsGiven:
    """A trainer that has made so many steps from the first weights."""
    kind, settings = TRAINERS[trainer]
    config = settings(
        output_dir=str(scratch / "out"), per_device_train_batch_size=work.BATCH, max_steps=steps,
        learning_rate=rate, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        max_grad_norm=0.0, max_length=512, bf16=False, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to=[], gradient_checkpointing=False,
        optim="adamw_torch", remove_unused_columns=False, disable_tqdm=True, **options,
    )  # fmt: skip
    folder = scratch / "model"
    work.write_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapters:
        work.write_adapter(scratch / "adapter", folder)
        model = peft.PeftModel.from_pretrained(model, str(scratch / "adapter"), is_trainable=True)
    run = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(data(trainer)),
        processing_class=words(),
        **({"ref_model": None} if trainer == "DPO" else {}),
    )
    assert [tokens(row) for row in run.train_dataset] == [tokens(row) for row in given(trainer)]
    run.train()
    assert len(run.losses) == steps
    return run


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are ids: it neither adds nor joins any.

    A special word is found within others too, so that none of those may contain it.
    """
    named = {text([i]): i for i in range(work.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(named, unk_token=text([3])))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=text([0]), eos_token=text([2])
    )


def given(trainer: str) -> list[dict]:
    """The work of a trainer, as tokens."""
    if trainer == "KTO":
        return work.rows()
    return work.short_prompts(work.pairs()) if trainer == "ORPO" else work.pairs()


def data(trainer: str) -> list[dict]:
    """The same as the trainer takes it: an answer's text goes on where its prompt's ends."""
    if trainer == "DPO":
        return given(trainer)
    return [
        {
            name.removesuffix("_ids"): ("" if name == "prompt_ids" else " ") + text(value)
            if name.endswith("_ids")
            else value
            for name, value in row.items()
        }
        for row in given(trainer)
    ]


def text(ids: list[int]) -> str:
    """Words that the tokenizer reads as these ids."""
    return " ".join(f"<{i}>" for i in ids)


def tokens(row: dict) -> list[list[int]]:
    """Of a row as a trainer has it: its prompt and answers, as far as they are told apart."""
    if "completion_ids" in row:
        return [row["prompt_ids"], row["completion_ids"]]
    if "chosen_ids" in row:
        return [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
    begun = row["chosen_labels"].count(-100)
    both = row["chosen_input_ids"], row["rejected_input_ids"]
    return [both[0][:begun], *(ids[begun:] for ids in both)]


if __name__ == "__main__":
    main()

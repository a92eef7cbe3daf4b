"""Trains the work with TRL and writes trajectory.json, which test_trl.py compares with.

pip install torch==2.13.0 && pip install trl==1.16.0
python tests/trl/make_trajectory.py
"""

import importlib.metadata
import json
import pathlib
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
import work

HERE = pathlib.Path(__file__).parent


class AsGiven(DPOTrainer):
    """TRL's trainer on tokens as they stand, in their order, its exact losses kept."""

    def __init__(self, **arguments):
        self.losses = []
        super().__init__(**arguments)

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _compute_loss(self, model, inputs, return_outputs=False):
        result = super()._compute_loss(model, inputs, return_outputs)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(float(loss.detach()))
        return result


def main():
    """Runs TRL and stores its losses with its versions."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "model")
        work.write_model(folder)
        words = {f"t{i}": i for i in range(work.VOCABULARY)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")),
            pad_token="t0",
            bos_token="t1",
            eos_token="t2",
        )
        config = DPOConfig(
            output_dir=scratch, per_device_train_batch_size=work.BATCH, max_steps=work.STEPS,
            learning_rate=work.LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
            max_grad_norm=0.0, beta=work.BETA, max_length=512, bf16=False, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to=[], gradient_checkpointing=False,
            optim="adamw_torch", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = AsGiven(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            ref_model=None,
            args=config,
            train_dataset=Dataset.from_list(work.pairs()),
            processing_class=tokenizer,
        )
        trainer.train()
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    facts = {"versions": versions, "losses": trainer.losses[: work.STEPS]}
    (HERE / "trajectory.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

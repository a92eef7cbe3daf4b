"""Trains the work with TRL, all weights and then adapters; test_trl.py compares with the files.

pip install torch==2.13.0 && pip install trl==1.16.0 peft==0.21.2
python tests/trl/make_trajectory.py
"""

import importlib.metadata
import json
import pathlib
import tempfile

from datasets import Dataset
import peft
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
    """Runs TRL twice and stores its losses with its versions."""
    store("trajectory.json", adapters=False)
    store("trajectory_lora.json", adapters=True)


def store(name: str, *, adapters: bool) -> None:
    """One run of TRL, as a file."""
    steps = work.LORA_STEPS if adapters else work.STEPS
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
            output_dir=scratch, per_device_train_batch_size=work.BATCH, max_steps=steps,
            learning_rate=work.LORA_RATE if adapters else work.LEARNING_RATE,
            lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
            max_grad_norm=0.0, beta=work.BETA, max_length=512, bf16=False, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to=[], gradient_checkpointing=False,
            optim="adamw_torch", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapters:
            begun = pathlib.Path(scratch, "adapter")
            work.write_adapter(begun, folder)
            model = peft.PeftModel.from_pretrained(model, str(begun), is_trainable=True)
        trainer = AsGiven(
            model=model,
            ref_model=None,
            args=config,
            train_dataset=Dataset.from_list(work.pairs()),
            processing_class=tokenizer,
        )
        trainer.train()
    names = ("trl", "torch", "transformers", *(["peft"] if adapters else []))
    versions = {name: importlib.metadata.version(name) for name in names}
    facts = {"versions": versions, "losses": trainer.losses[:steps]}
    (HERE / name).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

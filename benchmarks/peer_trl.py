"""TRL's DPOTrainer on the comparison's work; prints one JSON line. Runs in TRL's environment."""

import argparse
import pathlib
import tempfile
import time

from datasets import Dataset
import measure
from peft import LoraConfig
import published
from tokenizers import Tokenizer, models
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
import work

parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=pathlib.Path)
parser.add_argument("--size", default="A")
parser.add_argument("--shape", help="of published.py, drawn on the device, in place of --size")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--micro_batches", type=int, default=1)
parser.add_argument("--gpu", action="store_true", help="bfloat16, checkpointing, on the GPU")
parser.add_argument("--pairs", type=int, default=work.PAIRS, help="of an update")
parser.add_argument("--keep_all", action="store_true", help="no checkpointing")
parser.add_argument("--cached", action="store_true", help="the reference is asked before")
parser.add_argument("--rank", type=int, default=0, help="of PEFT's adapters; 0: all weights")
args = parser.parse_args()
work.PAIRS = args.pairs


class Trainer(DPOTrainer):
    """Takes pairs that are ids already, as they stand."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Steps(TrainerCallback):
    """Times each update."""

    clock = measure.Clock()

    def on_step_begin(self, *_, **__):
        self.clock.start()

    def on_step_end(self, *_, **__):
        if args.gpu:  # or the backward pass and the optimizer are not counted
            torch.cuda.synchronize()
        self.clock.stop()


def model_of(shape: str | None):
    """Weights of the folder, or drawn in the dtype in which PEFT would be given them."""
    if shape is None:
        path = args.folder / args.size
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = AutoConfig.for_model(**published.SHAPES[shape])
    with torch.device("cuda" if args.gpu else "cpu"):
        dtype = torch.bfloat16 if args.rank else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


model = model_of(args.shape)
vocabulary = model.config.vocab_size
if not (args.folder / "pairs.jsonl").exists():
    args.folder.mkdir(parents=True, exist_ok=True)
    work.write_pairs(args.folder / "pairs.jsonl", args.steps * work.PAIRS, vocabulary=vocabulary)
words = {f"t{i}": i for i in range(vocabulary)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")),
    pad_token="t0", bos_token="t1", eos_token="t2",
)  # fmt: skip
rows = work.read_pairs(args.folder / "pairs.jsonl")[: args.steps * work.PAIRS]
began = time.perf_counter()
with tempfile.TemporaryDirectory() as scratch:
    trainer = Trainer(
        model=model,
        args=DPOConfig(
            output_dir=scratch, per_device_train_batch_size=work.PAIRS // args.micro_batches,
            gradient_accumulation_steps=args.micro_batches, max_steps=args.steps,
            learning_rate=work.LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=0.0, adam_beta1=work.BETAS[0], adam_beta2=work.BETAS[1],
            adam_epsilon=work.EPSILON, max_grad_norm=0.0, beta=work.BETA, max_length=work.LONGEST,
            bf16=args.gpu, use_cpu=not args.gpu, logging_steps=1, save_strategy="no", report_to=[],
            gradient_checkpointing=args.gpu and not args.keep_all, optim="adamw_torch",
            precompute_ref_log_probs=args.cached, remove_unused_columns=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Steps()],
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM",
        ) if args.rank else None,
    )  # fmt: skip
    parts, inner = [], trainer._compute_loss

    def noting(model, inputs, return_outputs=False):
        """The log rounds losses to four digits."""
        given = inner(model, inputs, return_outputs)
        parts.append(float((given[0] if isinstance(given, tuple) else given).detach()))
        return given

    trainer._compute_loss = noting
    trainer.train()
n = args.micro_batches
measure.report(
    Steps.clock,
    [work.real_tokens(rows[i : i + work.PAIRS]) for i in range(0, len(rows), work.PAIRS)],
    [sum(parts[i : i + n]) / n for i in range(0, len(parts), n)],
    first=1,
    gpu_peak_mib=torch.cuda.max_memory_allocated() / 2**20 if args.gpu else None,
)

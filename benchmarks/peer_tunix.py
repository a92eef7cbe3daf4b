"""Tunix' DPOTrainer on the comparison's work; prints one JSON line. Runs in Tunix' environment.

Its Llama is given the rope base it forgets to pass on; without, it is another model.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
import work

parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=pathlib.Path)
parser.add_argument("--size", default="A")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--micro_batches", type=int, default=1)
args = parser.parse_args()

hf = json.loads((args.folder / args.size / "config.json").read_text())
llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=hf["rope_theta"])
config = llama.ModelConfig(
    num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"],
    hidden_dim=hf["intermediate_size"], num_heads=hf["num_attention_heads"],
    head_dim=hf["head_dim"], num_kv_heads=hf["num_key_value_heads"], rope_theta=hf["rope_theta"],
    norm_eps=hf["rms_norm_eps"], weight_tying=False,
)  # fmt: skip
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
load = functools.partial(
    params.create_model_from_safe_tensors, str(args.folder / args.size), config, mesh,
    dtype=jnp.float32,
)  # fmt: skip
rows = work.read_pairs(args.folder / "pairs.jsonl")[: args.steps * work.PAIRS]
longest = lambda *names: max(len(row[name]) for row in rows for name in names)
PROMPT, ANSWER = longest("prompt_ids"), longest("chosen_ids", "rejected_ids")


def padded(texts, length, left):
    """Ids and mask, [texts, length]."""
    ids, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.int32)
    for i, text in enumerate(texts):
        at = slice(length - len(text), length) if left else slice(len(text))
        ids[i, at], mask[i, at] = text, 1
    return ids, mask


def inputs():
    """The pairs as they stand, padded to the longest of all."""
    each = work.PAIRS // args.micro_batches
    for i in range(0, len(rows), each):
        some = rows[i : i + each]
        fields = {}
        for name, length in (("prompt", PROMPT), ("chosen", ANSWER), ("rejected", ANSWER)):
            texts = [row[f"{name}_ids"] for row in some]
            fields[f"{name}_ids"], fields[f"{name}_mask"] = padded(texts, length, name == "prompt")
        yield TrainingInput(**fields)


class Trainer(DPOTrainer):
    """Times each update."""

    clock, losses, taken = measure.Clock(), [], 0

    def _post_process_train_step(self, aux):
        super()._post_process_train_step(aux)
        self.losses.append(float(self._buffered_train_metrics.losses[-1]))
        Trainer.taken += 1
        if Trainer.taken % args.micro_batches == 0:
            self.clock.stop()
            self.clock.start()


trainer = Trainer(
    model=load(), ref_model=load(),
    optimizer=optax.adamw(work.LEARNING_RATE, *work.BETAS, eps=work.EPSILON, weight_decay=0.0),
    training_config=DPOTrainingConfig(
        eval_every_n_steps=10**6, max_steps=args.steps, beta=work.BETA,
        gradient_accumulation_steps=args.micro_batches if args.micro_batches > 1 else None,
    ),
)  # fmt: skip
Trainer.clock.start()
with mesh:
    trainer.train(inputs(), None)
n = args.micro_batches
parts = Trainer.losses
measure.report(
    Trainer.clock,
    [work.real_tokens(rows[i : i + work.PAIRS]) for i in range(0, len(rows), work.PAIRS)],
    [sum(parts[i : i + n]) / n for i in range(0, len(parts), n)],
    first=1,
)

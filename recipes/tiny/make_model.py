"""Trains the tiny Llama in recipes/tiny/model on both answers of train.jsonl's pairs, from nothing.

  python recipes/tiny/make_model.py --folder=recipes/tiny/model

It knows what is asked about and answers in either manner; to prefer one is left to DPO. Two minutes
on two cores. The same versions on the same kind of machine give the same bytes.
"""

import json
import pathlib
import tempfile
from typing import Any

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import tokenizers
import transformers

from recipes import command
from recipes.data import batches, mixture, pairs, tokenise, workers
from recipes.data.packing import Shape
from recipes.logps import answer_logps
import zoo
from zoo import llama, rope

HERE = pathlib.Path(__file__).parent
FOLDER = flags.DEFINE_string("folder", None, "Where to write the model.", required=True)

VOCABULARY, LENGTH, STEPS, BATCH = 1024, 256, 500, 16
SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


def make_tokenizer(rows: list[dict]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be written; the special tokens are Llama 3's."""
    texts = [m["content"] for row in rows for side in ("chosen", "rejected") for m in row[side]]
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(
        sorted(texts), VOCABULARY, min_frequency=2, special_tokens=SPECIAL, show_progress=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Tokenizer, training on both answers of every pair, and the folder."""
    pathlib.Path(FOLDER.value).mkdir(parents=True, exist_ok=True)  # or it fails now
    rows = [json.loads(line) for line in (HERE / "train.jsonl").read_text("utf-8").splitlines()]
    tokenizer = make_tokenizer(rows)
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch)
        tokenizer.save_pretrained(source)
        config = llama.Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5,
            tie_word_embeddings=True, rope_parameters=rope.Rope(rope_theta=10_000.0),
        )  # fmt: skip
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        own = config.to_hf() | ends | {"max_position_embeddings": LENGTH, "dtype": "bfloat16"}
        (source / "config.json").write_text(json.dumps(own, indent=2) + "\n")
        model = llama.Model(config, nnx.Rngs(0))
        model.source = source
        how = tokenise.How(str(source), None, "assistant", None, LENGTH, "drop", 0.0)
        nnx.update(model, trained(nnx.split(model), how))
        with workers.Crew(how) as crew:
            ends = workers.prepared(how, crew, None, plain=False).stop_ids
        zoo.save(model, FOLDER.value, dtype=jnp.bfloat16, stop_ids=ends)


def trained(split: tuple[nnx.GraphDef, nnx.State], how: tokenise.How) -> nnx.State:
    """Ordinary fine-tuning on both answers: their mean negative log-probability per token."""
    graph, state = split
    source = tokenise.Source(str(HERE / "train.jsonl"), "preference_chat")
    part = mixture.Part("train", 1.0, pairs.read(source, how).ids, 0)
    shape = Shape(rows=8, row_length=LENGTH, examples=BATCH, answers=2, few=8)
    data = batches.training(mixture.endless([part], seed=0), shape, shards=[0])
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 40, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    opt_state = optimizer.init(state)

    @jax.jit
    def step(state, opt_state, batch):
        def loss(state):
            logps = answer_logps(nnx.merge(graph, state), batch)
            return -logps.sum() / batch.counts.sum()

        value, gradient = jax.value_and_grad(loss)(state)
        changes, opt_state_ = optimizer.update(gradient, opt_state, state)
        return optax.apply_updates(state, changes), opt_state_, value

    value = jnp.nan
    for i in range(STEPS):
        update: Any = data[i]
        for batch in update.micro_batches:
            state, opt_state, value = step(state, opt_state, batch)
        if i % 100 == 99:
            print(f"step {i + 1:4d}  nats per token {float(value):.3f}", flush=True)
    return state


if __name__ == "__main__":
    command.main_without_config(main)

"""Trains the tiny Llama in recipes/tiny/model on both answers of train.jsonl's pairs, from nothing.

  python recipes/tiny/make_model.py --folder=recipes/tiny/model

It knows the facts and answers in either manner; preferring one is left to DPO. A few
minutes on two cores. The same versions on the same kind of machine give the same bytes.
"""

import json
import pathlib
import shutil
import tempfile

from absl import flags
from flax import nnx
import jax.numpy as jnp
import ml_collections
import tokenizers
import transformers

from recipes import sft
from recipes.configs import tiny_sft
from recipes.data.chats import layouts
from recipes.training import command
import zoo
from zoo import llama
from zoo.parts import rope

HERE = pathlib.Path(__file__).parent
FOLDER = flags.DEFINE_string("folder", None, "Where to write the model.", required=True)

VOCABULARY, LENGTH, STEPS, BATCH = 1024, 256, 300, 64
SEED = 1  # of 0, 1 and 5 the one from which DPO learns most
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


def make_untrained(folder: pathlib.Path, rows: list[dict]) -> None:
    """The model's folder with random weights."""
    tokenizer = make_tokenizer(rows)
    source = folder / "source"
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
    zoo.save(model, folder / "untrained", dtype=jnp.float32)


def both_answers(row: dict) -> list[dict[str, object]]:
    """The two answers of a pair as rows of their own, each with the prompt they share."""
    pair = layouts.preference_chat(row)
    return [{"prompt": pair.prompt, "answer": answer} for answer in pair.answers]


def config_of(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """Ordinary fine-tuning of all weights, by recipes/sft.py."""
    config = tiny_sft.get_config()
    config.directory = str(folder / "run")
    config.initialize_from_hf = str(folder / "untrained")
    config.train_data = str(folder / "answers.jsonl")
    config.validation, config.data = {}, dict(layout="prompt_answer")
    config.train_seq_len, config.train_batch_size = LENGTH, BATCH
    config.seed, config.ema_decay = SEED, 0.98
    config.num_train_steps, config.learning_rate, config.lr_schedule = STEPS, 3e-3, "cosine"
    config.warmup, config.weight_decay, config.steps_per_log = 40.0, 0.1, 100
    config.steps_per_eval = config.steps_per_checkpoint = None
    config.sample_tokens, config.token_cache, config.tensorboard = 0, None, False
    return config


def main() -> None:
    """Tokenizer, untrained weights, training on both answers of every pair, and the folder."""
    pathlib.Path(FOLDER.value).mkdir(parents=True, exist_ok=True)  # or it fails now
    rows = [json.loads(line) for line in (HERE / "train.jsonl").read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        make_untrained(folder, rows)
        answers = (json.dumps(answer) for row in rows for answer in both_answers(row))
        (folder / "answers.jsonl").write_text("\n".join(answers) + "\n")
        sft.train(config_of(folder))
        made, card = folder / "run" / "hf" / f"step-{STEPS}", lambda *_: {"README.md"}
        shutil.copytree(made, FOLDER.value, ignore=card, dirs_exist_ok=True)


if __name__ == "__main__":
    command.main_without_config(main)

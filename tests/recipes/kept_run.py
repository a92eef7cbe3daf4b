"""Checkpoints that earlier versions wrote, and how one more is kept.

  python -m tests.recipes.kept_run tests/recipes/kept/NAME

A folder has the model and the pairs of a run of four steps, its checkpoint of step 2, and the
records of all four. What the code of today makes of it is in test_kept.py. It is written with the
code of a version before that changes what a checkpoint holds.
"""

import json
import os
import pathlib
import shutil
import sys

import ml_collections
import numpy as np
from safetensors.numpy import save_file
import tokenizers

from recipes import dpo
from recipes.configs import tiny

SIZES = dict(
    vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip
TEMPLATE = (
    "<s>{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [("one and one", "two", "three"), ("a colour", "blue", "Monday"), ("a day", "Monday",
         "red"), ("two and two", "four", "a cat"), ("an animal", "a cat", "four")]  # fmt: skip


def config_of_run() -> ml_collections.ConfigDict:
    """Seen from the folder of the run."""
    config = tiny.get_config()
    config.initialize_from_hf, config.train_data, config.directory = "model", "train.jsonl", "."
    config.validation = ml_collections.ConfigDict()
    config.num_train_steps, config.steps_per_checkpoint, config.keep_checkpoints = 4, 2, 2
    config.train_batch_size, config.train_seq_len, config.steps_per_log = 2, 64, 1
    config.learning_rate, config.adam_mu_dtype = 1e-2, "bfloat16"
    config.sample_tokens, config.steps_per_hf_export, config.tensorboard = 0, -1, False
    config.run_initial_eval, config.min_pack_fill = False, 0.0
    config.compile_cache = config.token_cache = None
    return config


def write_model(folder: pathlib.Path) -> None:
    """A Llama of bytes, with weights from a generator."""
    folder.mkdir()
    config = SIZES | dict(
        model_type="llama", architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=128, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    D, F, N, K, H = 8, 8, 2, 1, 4
    shapes = {
        "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H), "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }  # fmt: skip
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (260, D), "model.norm.weight": (D,)}
    draw = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else draw.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    own.add_special_tokens(["<s>", "</s>", "<user>", "<assistant>"])
    own.save(str(folder / "tokenizer.json"), pretty=False)
    named = dict(bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write(folder: pathlib.Path) -> None:
    """The run, with the checkpoint of its last step taken away."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_model(pathlib.Path("model"))
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    pathlib.Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo.train(config_of_run())
    shutil.rmtree("checkpoints/4")
    for left in ("hf", "settings.json", "lock", "reference-cache"):
        shutil.rmtree(left) if pathlib.Path(left).is_dir() else pathlib.Path(left).unlink(True)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))

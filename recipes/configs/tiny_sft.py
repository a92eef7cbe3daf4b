"""Supervised fine-tuning on a laptop: the tiny Llama learns the polite answers of its pairs.

  python recipes/sft.py --config=recipes/configs/tiny_sft.py

Needs no network. What is not named here has the default of `python recipes/sft.py --help`.
"""

import ml_collections

from recipes import tiny


def get_config() -> ml_collections.ConfigDict:
    """The settings that this run is about."""
    config = ml_collections.ConfigDict(type_safe=False)
    config.name = "tiny_sft"
    config.directory = "runs/tiny_sft"
    config.seed = 0

    config.initialize_from_hf = tiny.path("model")
    config.train_data = tiny.path("train.jsonl")
    config.validation = dict(heldout=tiny.path("heldout.jsonl"))
    config.data = dict(columns=dict(messages="chosen"))  # of pairs, the chosen conversation
    config.train_seq_len = 256  # tokens of a prompt and its answer

    config.train_batch_size = 32  # answers per update
    config.num_train_steps = 40
    config.learning_rate = 3e-4
    config.warmup = 0.1
    config.max_grad_norm = 1.0
    config.mp = "p=f32,c=f32"

    config.steps_per_log = 5
    config.steps_per_eval = 10
    config.steps_per_checkpoint = 20
    config.sample_tokens = 48
    return config

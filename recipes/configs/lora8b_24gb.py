"""LoRA-DPO of Llama-3.1-8B-Instruct on one GPU of 24 GB.

  python recipes/dpo.py --config=recipes/configs/lora8b_24gb.py --config.directory=/runs/lora8b

The weights are frozen in bfloat16, 15 GiB, and are the reference too; adapters of rank 16 on every
matrix, with their gradient and optimizer, take 0.6 GiB. The environment variable
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX use most of the card. What is not named here is as in
llama8b.py.
"""

import ml_collections

from recipes.configs import llama8b


def get_config() -> ml_collections.ConfigDict:
    """The run of llama8b.py, with what adapters and a small card need."""
    config = llama8b.get_config()
    config.name = "lora8b_24gb"
    config.tags = ("dpo", "lora", "ultrafeedback", "llama3")
    config.adapter = dict(rank=16, alpha=32.0)
    config.learning_rate = 5e-6  # ten times that of all weights
    config.train_seq_len = 2048
    config.row_length = 2048  # one row at a time
    config.per_device_parallelism = 1
    config.train_batch_size = 32
    return config

"""LoRA-DPO of Llama-3.1-8B-Instruct on one GPU of 80 GB.

  python recipes/dpo.py --config=recipes/configs/lora8b_80gb.py --config.directory=/runs/lora8b

The weights are frozen in bfloat16, 15 GiB, and are the reference too; the rest takes whole pairs
of 4096 tokens, several rows at a time. For all weights of an 8B see llama8b.py, for a 70B
qlora70b_80gb.py. What is not named here is as in lora8b_24gb.py, and in llama8b.py.
"""

import ml_collections
from ml_collections import config_dict

from recipes.configs import lora8b_24gb


def get_config() -> ml_collections.ConfigDict:
    """The run of lora8b_24gb.py, with the lengths and the batch of the run of all weights."""
    config = lora8b_24gb.get_config()
    config.name = "lora8b_80gb"
    config.train_seq_len = 4096
    config.row_length = config_dict.placeholder(int)  # what fills best
    config.per_device_parallelism = config_dict.placeholder(int)  # what memory allows
    config.train_batch_size = 128
    return config

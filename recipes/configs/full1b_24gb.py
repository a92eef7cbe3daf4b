"""All weights of Llama-3.2-1B-Instruct on one GPU of 24 GB, on UltraFeedback.

  python recipes/dpo.py --config=recipes/configs/full1b_24gb.py --config.directory=/runs/full1b

A weight takes 4 bytes, its gradient 4, both moments of AdamW 2, the reference 2. With moments in
float32 (--config.optimizer=adamw) it takes 18 bytes in all, and nothing is left for activations.
"""

import ml_collections
from ml_collections import config_dict

from recipes.configs import llama8b


def get_config() -> ml_collections.ConfigDict:
    """The run of the 8B model, with what is otherwise for 1B on one GPU."""
    config = llama8b.get_config()
    config.name = "full1b_24gb"
    config.tags = ("dpo", "ultrafeedback", "llama3")
    config.initialize_from_hf = "meta-llama/Llama-3.2-1B-Instruct"
    config.optimizer = "adamw8bit"  # both moments in 8 bits; adamw: in float32
    # Or some of the weights, like r".*layers\.(1[0-5])\..*"; unset: all.
    config.trainable = config_dict.placeholder(str)
    config.train_seq_len = 2048
    config.learning_rate = 1e-6
    return config

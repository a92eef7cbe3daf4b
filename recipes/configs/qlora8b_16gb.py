"""LoRA-DPO of Llama-3.1-8B-Instruct on one GPU of 16 GB, its frozen weights in 4 bits (QLoRA).

  python recipes/dpo.py --config=recipes/configs/qlora8b_16gb.py --config.directory=/runs/qlora8b

The matrices of the layers take 3.6 GiB in nf4, embedding and head 2 GiB in bfloat16; one layer at a
time is made wide. The environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX use most
of the card. What is not named here is as in lora8b_24gb.py, and in llama8b.py.
"""

import ml_collections

from recipes.configs import lora8b_24gb


def get_config() -> ml_collections.ConfigDict:
    """The run of lora8b_24gb.py on narrower weights."""
    config = lora8b_24gb.get_config()
    config.name = "qlora8b_16gb"
    config.tags = ("dpo", "qlora", "ultrafeedback", "llama3")
    config.frozen = "nf4"
    return config

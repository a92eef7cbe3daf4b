"""LoRA-DPO of Llama-3.1-70B-Instruct on one GPU of 80 GB, its frozen weights in 4 bits (QLoRA).

  python recipes/dpo.py --config=recipes/configs/qlora70b_80gb.py --config.directory=/runs/qlora70b

The matrices of the layers take 33 GiB in nf4, embedding and head 4 GiB in bfloat16. What is not
named here is as in lora8b_24gb.py, and in llama8b.py.
"""

import ml_collections

from recipes.configs import lora8b_24gb


def get_config() -> ml_collections.ConfigDict:
    """The run of lora8b_24gb.py with a larger model, on narrower weights."""
    config = lora8b_24gb.get_config()
    config.name = "qlora70b_80gb"
    config.tags = ("dpo", "qlora", "ultrafeedback", "llama3")
    config.initialize_from_hf = "meta-llama/Llama-3.1-70B-Instruct"
    config.frozen = "nf4"
    config.learning_rate = 2e-6
    return config

"""The tiny run with adapters: LoRA on every matrix of the layers, the weights frozen.

  python recipes/dpo.py --config=recipes/configs/tiny_lora.py

The reference is the frozen weights themselves: it costs nothing. What is not named here is as in
tiny.py, or has the default of `python recipes/dpo.py --help`.
"""

import ml_collections

from recipes.configs import tiny


def get_config() -> ml_collections.ConfigDict:
    """The tiny run, with what adapters need."""
    config = tiny.get_config()
    config.name = "tiny_lora"
    config.directory = "runs/tiny_lora"
    config.adapter = dict(rank=8, alpha=16.0)
    config.learning_rate = 4e-4  # several times that of all weights
    return config

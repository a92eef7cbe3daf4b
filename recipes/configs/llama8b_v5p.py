"""The run of llama8b.py on a TPU pod slice: all weights of an 8B on a v5p-32, 16 chips of 4 hosts.

  python recipes/dpo.py --config=recipes/configs/llama8b_v5p.py --config.directory=gs://bucket/llama8b

on every host: TPU pods tell each its number. Runs and caches are in a bucket, which all hosts see.
`python recipes/forecast.py` with --chip=v5p --devices=16 says what it takes of each chip. What is
not named here is as in llama8b.py.
"""

import ml_collections

from recipes.configs import llama8b


def get_config() -> ml_collections.ConfigDict:
    """The run of llama8b.py, by several hosts."""
    config = llama8b.get_config()
    config.name = "llama8b_v5p"
    config.distributed.enabled = True
    config.require_accelerator = True  # a host that lost its chips ends the run, and says so
    config.minutes_per_checkpoint = 10.0  # spot machines go away without a word
    return config

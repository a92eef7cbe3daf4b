"""Small models of any architecture for whole runs: large random weights, the embedded tokenizer."""

import json
import pathlib

from flax import nnx
import jax.numpy as jnp

from tests.conftest import TINY, large_weights
from tests.zoo import twins
import zoo


def write(folder: pathlib.Path, family: str, shape: str = "plain", **other) -> zoo.Model:
    """A model of a twin's shape, written to a folder; `other` is what its config says besides."""
    said = json.loads(twins.config_of(family, shape).to_json_string(use_diff=True))
    arch = zoo.ARCHITECTURES[family]
    size = {"vocab_size": 1024}
    if family != "gpt2":
        size |= {"max_position_embeddings": 256}
    config = arch.Config.from_hf(said | size | other)
    model = large_weights(arch.Model(config, nnx.Rngs(0)), scale=0.3)
    zoo.save(model, folder, dtype=jnp.float32, tokenizer=TINY / "model")
    return model

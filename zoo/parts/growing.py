"""Queries scaled up with position beyond a model's original context length.

Agrees with `get_llama_4_attn_scale` in transformers/models/ministral3/modeling_ministral3.py.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from zoo.parts import rope_config, spans


def read(hf: Mapping[str, object], otherwise: Mapping[str, object]) -> dict[str, object]:
    """Reads the rope of a config.json and the query scaling inside it; both may be missing.

    Raises:
      ValueError: as in `rope_config.read`, or the length from which queries grow is missing.
    """
    ropes = hf.get("rope_parameters")
    ropes = otherwise if ropes is None else ropes
    if not isinstance(ropes, dict):
        return rope_config.read(hf)  # which says what is wrong
    beta = ropes.get("llama_4_scaling_beta") or None
    # transformers does not read max_position_embeddings there.
    apart = ("llama_4_scaling_beta", "max_position_embeddings")
    own = {key: value for key, value in ropes.items() if key not in apart}
    read = rope_config.read({**hf, "rope_parameters": own}) | {"llama_4_scaling_beta": beta}
    one: Any = read["rope_parameters"]
    if beta and not one.original_max_position_embeddings:
        raise BadInput(
            f"config.json: llama_4_scaling_beta is {beta}, and a {one.rope_type} rope has no "
            "original_max_position_embeddings, from which on it counts: give it, or take the "
            "other out"
        )
    return read


def written(said: Mapping[str, object]) -> dict[str, object]:
    """The inverse of `read`."""
    rest = dict(said)
    beta = rest.pop("llama_4_scaling_beta") or 0.0
    ropes: Any = rest["rope_parameters"]
    return rest | {"rope_parameters": ropes | {"llama_4_scaling_beta": beta}}


def lengths(config: Any, where: spans.Spans) -> Float[Array, "B T"]:
    """The scale of each query; 1 within the original context length."""
    if not config.llama_4_scaling_beta:
        return jnp.ones(where.positions.shape, jnp.float32)
    stretch = config.rope_parameters.original_max_position_embeddings
    places = (where.positions // stretch).astype(jnp.float32)
    return 1 + config.llama_4_scaling_beta * jnp.log1p(places)

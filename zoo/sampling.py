"""Sampling of the next token from a model's logits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from checkpoints_io.errors import BadInput


class Sampling(NamedTuple):
    """The sampling settings; a temperature of 0 always takes the likeliest token.

    Otherwise a token is drawn by its probability at that temperature from at most `top_k` tokens
    (0: all); of these, the likeliest that add up to `top_p`; and of these, those at least `min_p`
    times as probable as the likeliest, which always remains. As in transformers and vLLM.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()
COLDEST = 1e-30  # the lowest temperature used; lower ones would underflow in float32
# (logits [B, V], sampling, key) -> one token per row
Way = Callable[[Array, Sampling, Key[Array, ""]], Int[Array, " B"]]


def check(sampling: Sampling) -> None:
    """Refuses invalid sampling settings.

    Raises:
      ValueError: a number is out of bounds, or has no effect.
    """
    if not isinstance(sampling, Sampling):
        raise BadInput(f"sampling={sampling!r:.60} is none: write Sampling(temperature=0.7)")
    whole = isinstance(sampling.top_k, int | np.integer)
    if not whole or not all(isinstance(x, int | float | np.number) for x in sampling):
        raise BadInput(f"{sampling}: all are numbers, and top_k a whole one")
    right = sampling.temperature >= 0 and sampling.top_k >= 0
    right &= 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
    if not right:
        raise BadInput(
            f"{sampling}: temperature and top_k are 0 or more, top_p above 0 and at most 1, and "
            "min_p from 0 to 1"
        )
    if not sampling.temperature and sampling != GREEDY:
        raise BadInput(f"{sampling}: without a temperature the likeliest token is taken anyway")


def way(sampling: Sampling) -> Way:
    """The cheapest function for these settings: sorting V numbers, say, is slow."""
    if not sampling.temperature:
        return likeliest
    return by_probability if sampling[1:] == GREEDY[1:] else drawn


def likeliest(
    logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]
) -> Int[Array, " B"]:
    """The likeliest token of each row."""
    del sampling, key
    return logits.argmax(-1)


def by_probability(
    logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]
) -> Int[Array, " B"]:
    """One token per row, drawn from the whole vocabulary at the temperature."""
    return jax.random.categorical(key, _heated(logits, sampling))


def _heated(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Divides logits by the temperature, after shifting the maximum to 0, so it cannot overflow."""
    below = logits - logits.max(-1, keepdims=True)
    return below / jnp.maximum(sampling.temperature, COLDEST)


def drawn(logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]) -> Int[Array, " B"]:
    """One token per row, drawn as `sampling` says."""
    ids = jnp.argsort(logits, axis=-1, descending=True)
    sorted_ = jnp.take_along_axis(_heated(logits, sampling), ids, -1)
    rank = jnp.arange(logits.shape[-1])
    remains = (rank < sampling.top_k) | (sampling.top_k == 0)
    shares = jax.nn.softmax(jnp.where(remains, sorted_, -jnp.inf), axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    remains &= (before < sampling.top_p) & (shares >= sampling.min_p * shares[:, :1])
    remains |= rank == 0
    choice = jax.random.categorical(key, jnp.where(remains, sorted_, -jnp.inf))
    return jnp.take_along_axis(ids, choice[:, None], -1)[:, 0]

"""From the product with the head to logits."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class LastStep(NamedTuple):
    """What turns the product with the head into a logit: a scale, then a soft cap."""

    scale: float = 1.0
    softcap: float | None = None  # no logit is beyond it


def finished(product: Float[Array, "*B"], last: LastStep) -> Float[Array, "*B"]:
    """The logits."""
    return capped(product if last.scale == 1 else product * last.scale, last.softcap)


def slope(logits: Float[Array, "*B"], last: LastStep) -> Float[Array, "*B"] | float:
    """The derivative of the logits by the product."""
    return last.scale * (1 - (logits / last.softcap) ** 2) if last.softcap else last.scale


def capped(x: Float[Array, "*B"], softcap: float | None) -> Float[Array, "*B"]:
    """Soft-capped, so that nothing is beyond `softcap`; without one, `x` as it is."""
    return softcap * jnp.tanh(x / softcap) if softcap else x

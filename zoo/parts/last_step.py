"""The last step from the product with the head to the logits: scale and soft cap."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class LastStep(NamedTuple):
    """The step from the product with the head to a logit: a scale, then a soft cap."""

    scale: float = 1.0
    softcap: float | None = None  # bounds every logit


def finished(product: Float[Array, "*B"], last: LastStep) -> Float[Array, "*B"]:
    """The logits, from the product with the head."""
    return capped(product if last.scale == 1 else product * last.scale, last.softcap)


def slope(logits: Float[Array, "*B"], last: LastStep) -> Float[Array, "*B"] | float:
    """The derivative of the logits with respect to the product."""
    return last.scale * (1 - (logits / last.softcap) ** 2) if last.softcap else last.scale


def capped(x: Float[Array, "*B"], softcap: float | None) -> Float[Array, "*B"]:
    """Soft-caps `x` to within `softcap`; without one, `x` is unchanged."""
    return softcap * jnp.tanh(x / softcap) if softcap else x

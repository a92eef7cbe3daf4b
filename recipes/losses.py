"""Preference losses: two log-ratios per pair in, one loss per pair out.

A log-ratio is log policy(answer) - log reference(answer), in nats, summed over the answer's tokens.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Loss = Callable[..., Float[Array, " P"]]


def sigmoid(
    chosen: Float[Array, " P"],
    rejected: Float[Array, " P"],
    *,
    beta: float,
    label_smoothing: float,
) -> Float[Array, " P"]:
    """Direct preference optimization, softplus(-margin); Eq. 7 of https://arxiv.org/abs/2305.18290.

    `label_smoothing` is the share of pairs believed to be labelled backwards: conservative DPO,
    Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    margin = beta * (chosen - rejected)
    right, wrong = jax.nn.softplus(-margin), jax.nn.softplus(margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid}

"""Preference losses: two log-ratios per pair in, one loss per pair out.

A log-ratio is log policy(answer) - log reference(answer), in nats, summed over the answer's tokens.
"""

from collections.abc import Callable
import functools

import jax
from jaxtyping import Array, Float
import ml_collections

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


def dpop(
    chosen: Float[Array, " P"],
    rejected: Float[Array, " P"],
    *,
    beta: float,
    label_smoothing: float,
    dpop_lambda: float,
) -> Float[Array, " P"]:
    """DPO-Positive: a chosen answer less likely than under the reference costs `dpop_lambda` times.

    Eq. 3 of https://arxiv.org/abs/2402.13228: the margin loses lambda * max(0, -chosen).
    """
    held = chosen - dpop_lambda * jax.nn.relu(-chosen)
    return sigmoid(held, rejected, beta=beta, label_smoothing=label_smoothing)


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "dpop": dpop}
HERE = "sigmoid (DPO) and dpop (DPO-Positive)"
# Other names of these, without the signs between letters.
ALSO = {"dpo": "sigmoid", "cdpo": "sigmoid", "dpopositive": "dpop"}
# Losses known from elsewhere, and what they are called.
NOT_YET = {
    "simpo": "SimPO", "ipo": "IPO", "orpo": "ORPO", "kto": "KTO", "cpo": "CPO", "slic": "SLiC",
    "hinge": "SLiC's hinge loss", "robust": "robust DPO", "rdpo": "R-DPO", "exo": "EXO",
    "nca": "NCA", "bco": "BCO", "sppo": "SPPO", "sppohard": "SPPO", "aot": "AOT",
    "aotunpaired": "AOT", "apo": "APO", "apozero": "APO", "apodown": "APO", "rso": "RSO",
    "discopop": "DiscoPOP", "betadpo": "beta-DPO", "alphadpo": "alpha-DPO", "tdpo": "TDPO",
    "sft": "supervised fine-tuning",
}  # fmt: skip


def of(config: ml_collections.ConfigDict) -> Loss:
    """The loss of a run, with its settings."""
    given = {"beta": config.beta, "label_smoothing": config.label_smoothing}
    if config.loss == "dpop":
        given["dpop_lambda"] = config.dpop_lambda
    return functools.partial(LOSSES[config.loss], **given)

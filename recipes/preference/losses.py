"""Preference losses: what is known about every pair in, one loss per pair out.

A log-ratio is log policy(answer) - log reference(answer), in nats, summed over the answer's tokens.
To add a loss: a function here, its line in `LOSSES`, its name in the table of settings. Every
keyword-only parameter is a setting, and settings that a loss does not take name their losses there.
What else a loss may look at is in `Answers`: scored tokens, ratings.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from recipes.training.checks import Values
from recipes.training.update import Answers


class Loss(NamedTuple):
    """A loss, and what it must be before anything was learnt."""

    of: Callable[..., Float[Array, " P"]]  # its keyword-only parameters are settings
    first: Callable[[float], float]  # its value where policy and reference are equal, of beta


class Objective(NamedTuple):
    """The loss of a run, with its settings."""

    loss: Callable[[Answers], Float[Array, " P"]]
    first: float
    beta: float  # a reward is beta times a log-ratio


def sigmoid(answers: Answers, *, beta: float, label_smoothing: float) -> Float[Array, " P"]:
    """Direct preference optimization, softplus(-margin); Eq. 7 of https://arxiv.org/abs/2305.18290.

    `label_smoothing` is the share of pairs assumed to be mislabelled: conservative DPO,
    Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    chosen, rejected = log_ratios(answers)
    return _of_margin(beta * (chosen - rejected), label_smoothing)


def dpop(
    answers: Answers, *, beta: float, label_smoothing: float, dpop_lambda: float
) -> Float[Array, " P"]:
    """DPO-Positive: a chosen answer less likely than under the reference costs `dpop_lambda` times.

    Eq. 3 of https://arxiv.org/abs/2402.13228: the margin loses lambda * max(0, -chosen).
    """
    chosen, rejected = log_ratios(answers)
    held = chosen - dpop_lambda * jax.nn.relu(-chosen)
    return _of_margin(beta * (held - rejected), label_smoothing)


def log_ratios(answers: Answers) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """Of the chosen answers, and of the rejected ones."""
    chosen, rejected = (answers.policy - answers.reference).T
    return chosen, rejected


def _of_margin(margin: Float[Array, " P"], label_smoothing: float) -> Float[Array, " P"]:
    right, wrong = jax.nn.softplus(-margin), jax.nn.softplus(margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


LOSSES = {
    "sigmoid": Loss(sigmoid, first=lambda beta: math.log(2)),
    "dpop": Loss(dpop, first=lambda beta: math.log(2)),
}


def objective(given: Values) -> Objective:
    """The loss that the settings name. Its options are the settings that its parameters name."""
    loss = LOSSES[given["loss"]]
    options = inspect.signature(loss.of).parameters.values()
    named = {p.name: given[p.name] for p in options if p.kind is p.KEYWORD_ONLY}
    return Objective(functools.partial(loss.of, **named), loss.first(given["beta"]), given["beta"])

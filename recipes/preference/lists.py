"""Lists of ranked answers, compared two by two."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped
import numpy as np

from recipes.training.update import Answers

Loss = Callable[[Answers], Float[Array, " P"]]


class Compared(NamedTuple):
    """The pairs of every list, those of one list behind each other."""

    answers: Answers  # of as many pairs as the longest list has, for each list
    counted: Bool[Array, "P pairs"] | None  # those that a list has; none: they were pairs before


def compared(answers: Answers, which: str) -> Compared:
    """All pairs of answers of which one is ranked above the other, or of these the `best` answers'.

    A pair that a list does not have stands for two equal answers of one token.
    """
    count = answers.policy.shape[1]
    if count <= 2:
        return Compared(answers, None)
    first, second = np.triu_indices(count, 1)
    ranks, here = ranks_of(answers), answers.tokens > 0
    counted = here[:, second] & (ranks[:, first] < ranks[:, second])
    if which == "best":  # several may be
        counted &= ranks[:, first] == ranks[:, :1]

    def both(values: Array, absent: float | int) -> Array:
        pairs = jnp.stack([values[:, first], values[:, second]], axis=-1)
        return jnp.where(counted[..., None], pairs, absent).reshape(-1, 2)

    ratings = None if answers.ratings is None else both(answers.ratings, np.nan)
    policy, reference = both(answers.policy, 0), both(answers.reference, 0)
    return Compared(Answers(policy, reference, both(answers.tokens, 1), ratings), counted)


def mean(each: Shaped[Array, " every"], counted: Bool[Array, "P pairs"] | None) -> Array:
    """The mean over the pairs of every list, so that a long list weighs as much as a short one."""
    if counted is None:
        return each
    each = jnp.where(counted, each.reshape(counted.shape), 0)
    return each.sum(1) / jnp.maximum(counted.sum(1), 1)


def of_pairs(loss: Loss, which: str) -> Loss:
    """The loss of a list as the mean of a loss over its pairs."""

    def of_lists(answers: Answers) -> Float[Array, " P"]:
        pairs, counted = compared(answers, which)
        return mean(loss(pairs), counted)

    return of_lists


def ranks_of(answers: Answers) -> Int[Array, "P A"]:
    """The rank of each answer, where 0 is the best; a pair's answers are already in order."""
    if answers.ranks is not None:
        return answers.ranks
    return jnp.broadcast_to(jnp.arange(answers.tokens.shape[1]), answers.tokens.shape)

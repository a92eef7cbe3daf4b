"""Scores on held-out pairs, by the same forward pass for policy and reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from recipes import metrics
from recipes.data import batches
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds

# A model's forward pass: micro-batch -> log-probabilities [P, A]
Forward = Callable[[Any], jax.Array]


class HeldOut(NamedTuple):
    """A named set of held-out pairs."""

    name: str
    pairs: list[PairIds]


def logps(forward: Forward, pairs: list[PairIds], shape: Shape, rows: NamedSharding) -> np.ndarray:
    """Log-probabilities [pairs, A] of every pair, in nats."""
    here = batches.rows_here(shape.rows, rows)
    found = []
    for update in batches.in_order(pairs, shape, here):
        total = np.zeros((shape.pairs, 2), np.float32)
        for batch in update.micro_batches:
            total += np.asarray(forward(batches.put(batch, shape.rows, rows)))
        found.append(total[: len(update.rows)])
    return np.concatenate(found)


def evaluate(
    held_out: HeldOut,
    policy: Forward,
    reference: Forward,
    known: dict[str, np.ndarray],
    shape: Shape,
    rows: NamedSharding,
    **loss,
) -> dict[str, float]:
    """The metrics of a held-out set, each pair weighing the same. Padding never enters a mean.

    `known` keeps what the reference says, by the name of the set: it does not change within a run.
    """
    if held_out.name not in known:
        known[held_out.name] = logps(reference, held_out.pairs, shape, rows)
    ours = jnp.asarray(logps(policy, held_out.pairs, shape, rows))
    theirs = jnp.asarray(known[held_out.name])
    values = metrics.preference(ours, theirs, jnp.ones(len(ours), bool), **loss)
    figures = {name: float(value) for name, value in values.items()}
    figures |= metrics.lengths(held_out.pairs)
    return {f"eval/{held_out.name}/{name}": value for name, value in figures.items()}

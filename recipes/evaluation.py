"""Scores on held-out pairs, by the same forward pass for policy and reference."""

import jax.numpy as jnp
import numpy as np

from recipes import logps, metrics
from recipes.data import streams
from recipes.data.batches import Place
from recipes.data.reading import HeldOut


def evaluate(
    held_out: HeldOut,
    policy: logps.Forward,
    reference_logps: np.ndarray,
    place: Place,
    **loss,
) -> dict[str, float]:
    """The metrics of a held-out set, each pair weighing the same. Padding never enters a mean."""
    ours = jnp.asarray(logps.of_examples(policy, held_out.pairs, place))
    theirs = jnp.asarray(reference_logps)
    values = metrics.preference(ours, theirs, jnp.ones(len(ours), bool), **loss)
    figures = {name: float(value) for name, value in values.items()}
    figures |= metrics.lengths(np.array([*map(streams.scored_tokens, held_out.pairs)]))
    return {f"eval/{held_out.name}/{name}": value for name, value in figures.items()}

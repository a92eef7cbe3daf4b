"""Scores on held-out pairs, by the same forward pass for policy and reference."""

import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from recipes.data.packed import streams
from recipes.data.packed.batches import Place
from recipes.data.run_data import HeldOut
from recipes.preference.metrics import preference
from recipes.preference.objectives import Objective
from recipes.training import logps, records
from recipes.training.update import Answers


def evaluate(
    held_out: HeldOut,
    policy: logps.Forward,
    reference_logps: Float[np.ndarray, "pairs A"],
    place: Place,
    objective: Objective,
) -> dict[str, float]:
    """The metrics of a held-out set, each pair weighing the same. Padding never enters a mean."""
    scored = np.array([*map(streams.scored_tokens, held_out.examples)])
    unrated = (np.nan,) * place.shape.answers
    ratings = np.array([pair.ratings or unrated for pair in held_out.examples], np.float32)
    ours = jnp.asarray(logps.of_examples(policy, held_out.examples, place))
    answers = Answers(ours, jnp.asarray(reference_logps), jnp.asarray(scored), jnp.asarray(ratings))
    figures = {name: float(value) for name, value in preference(answers, objective).items()}
    figures |= records.lengths(scored)
    return {f"eval/{held_out.name}/{name}": value for name, value in figures.items()}

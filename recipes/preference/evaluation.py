"""Scores on held-out pairs, by the same forward pass for policy and reference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from recipes.data.packed import batches
from recipes.data.packed.batches import Place
from recipes.data.run_data import HeldOut
from recipes.preference.metrics import measured
from recipes.preference.objectives import Objective
from recipes.training import logps, metering
from recipes.training.update import Answers


def evaluate(
    held_out: HeldOut,
    policy: logps.Forward,
    reference_logps: Float[np.ndarray, "pairs A"],
    place: Place,
    objective: Objective,
) -> dict[str, float]:
    """The metrics of a held-out set; all pairs weigh the same except in a loss of weighted pairs.

    Padding never enters a mean.
    """
    fields = batches.example_fields(held_out.examples, place.shape.answers)
    ours = jnp.asarray(logps.of_examples(policy, held_out.examples, place))
    of: Callable[[str], Any] = lambda name: (
        None if fields[name] is None else jnp.asarray(fields[name])
    )
    of_data = map(of, ("scored", "ratings", "ranks", "weights", "margins"))
    answers = Answers(ours, jnp.asarray(reference_logps), *of_data)
    figures = {
        name: float(value) for name, value in jax.device_get(measured(answers, objective)).items()
    }
    figures |= metering.lengths(fields["scored"], fields["names"])
    return {f"eval/{held_out.name}/{name}": value for name, value in figures.items()}

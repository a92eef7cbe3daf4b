"""Losses that look at all pairs of an update at once, exactly, however it is split.

The log-probabilities of all pairs come first, and from them the gradient of the loss by each; then
the gradient of their weighted sum, a micro-batch at a time. That is one more forward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from recipes.data.packed import batches
from recipes.data.packed.batches import DataFields, Place, Update
from recipes.data.packed.packing import Packed
from recipes.preference.objectives import Objective
from recipes.training import logps
from recipes.training.update import Answers


def pull(
    objective: Objective,
    ask: logps.Forward,
    reference: Callable[[Packed, np.ndarray], Float[Array, "P A"]],
    pairs: Update,
    fields: DataFields,
    place: Place,
) -> tuple[Float[Array, "P A"], Float[Array, "P A"]]:
    """The gradient of the update's mean loss by each log-probability of the policy.

    And the log-probabilities that the reference has given.

    `ask` and `reference` give log-probabilities of a micro-batch, the second with source rows.
    """
    ours = theirs = jnp.zeros((place.shape.examples, place.shape.answers), jnp.float32)
    for packed in pairs.micro_batches:
        batch = batches.put(packed, place)
        ours += ask(batch)
        here = batch.is_here[:, None]
        theirs += jnp.where(here, reference(batch, pairs.source_rows), 0)
    mean = lambda policy: objective.loss(Answers(policy, theirs, *fields)).mean()
    return jax.grad(mean)(ours), theirs

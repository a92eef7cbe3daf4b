"""Losses that look at all pairs of an update at once, exactly, however it is split.

The log-probabilities of all pairs come first, and from them the gradient of the loss by each; then
the gradient of their weighted sum, a micro-batch at a time. That is one more forward pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recipes.data.packed import batches
from recipes.data.packed.batches import Place, Said, Update
from recipes.preference.objectives import Objective
from recipes.preference.reference import Reference
from recipes.training import logps
from recipes.training.update import Answers


def pull(
    objective: Objective,
    ask: logps.Forward,
    reference: Reference,
    pairs: Update,
    said: Said,
    place: Place,
) -> Float[Array, "P A"]:
    """The gradient of the update's mean loss by each log-probability of the policy, `ask`."""
    ours = theirs = jnp.zeros((place.shape.examples, place.shape.answers), jnp.float32)
    for packed in pairs.micro_batches:
        batch = batches.put(packed, place)
        ours += ask(batch)
        here = batch.is_here[:, None]
        theirs += jnp.where(here, reference.of_batch(batch, pairs.source_rows), 0)
    mean = lambda policy: objective.loss(Answers(policy, theirs, *said)).mean()
    return jax.grad(mean)(ours)

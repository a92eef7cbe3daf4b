"""Which weights of a model are trained, by which optimizer, and what that takes per device."""

from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import PyTree
import optax

from recipes.training import by_name, optimizer, plan, trained
from recipes.training.adapting import Adapting
from recipes.training.by_name import Values
from recipes.training.optimizer import OptimizerSettings
from recipes.training.run import Beside
from recipes.training.trained import Chosen, Trained
import zoo


class Learning(NamedTuple):
    """The trained weights and their optimizer, as shapes and shardings."""

    trained: Trained
    optimizer_settings: OptimizerSettings
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    opt_state: PyTree
    memory: dict[str, int]  # bytes per device that stay allocated, by what they hold


def learning(
    given: Values,
    model: zoo.Model,
    mesh: Mesh,
    steps: int,
    *,
    adapted: Adapting | None,
    chosen: Chosen | None,
    beside: Beside | None,
) -> Learning:
    """What is trained of a model: all weights, those `chosen`, or adapters; `beside` a reference.

    The model has no weights yet.

    Raises:
      ValueError: the schedule does not fit into the number of steps.
    """
    learnt = trained.of(model, adapted, chosen)
    settings = by_name.part(OptimizerSettings, given)
    schedule = optimizer.schedule_of(settings, steps)
    descent = optimizer.optimizer_of(settings, schedule, *learnt[1:])
    if beside and beside.follows:
        descent = optimizer.followed(descent, *beside.follows)
    opt_state = optimizer.layout(descent, learnt.like, mesh)
    resident, shared = (beside.stays, beside.of_policy) if beside else (False, False)
    memory = plan.memory(model, learnt.like, opt_state, chosen, resident=resident, shared=shared)
    return Learning(learnt, settings, schedule, descent, opt_state, memory)

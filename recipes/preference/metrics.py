"""Metrics of pairs: of an update, of a held-out set, of the parts of a mixture."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from recipes.data import mixture
from recipes.data.mixture import Part
from recipes.preference.objectives import Objective
from recipes.training.update import Answers


def preference(
    answers: Answers, objective: Objective, is_pair: Bool[Array, " P"] | None = None
) -> dict[str, Float[Array, ""]]:
    """Means over the pairs; log-probabilities and their differences in nats, rewards by the loss.

    The first six are those of Levanter's DPO. A tie counts as no win. Of a sum of losses each is
    there by its name. Only the pairs that `is_pair` names count, by default all.
    """
    counted = jnp.ones(len(answers.policy), bool) if is_pair is None else is_pair
    mean: Callable[..., Array] = lambda x: jnp.mean(x, where=counted)
    chosen, rejected = objective.rewards(answers).T
    policy, reference = answers.policy, answers.reference
    drift = policy - reference
    return {
        "dpo_loss": mean(objective.loss(answers)),
        "dpo_margin_policy": mean(policy[:, 0] - policy[:, 1]),
        "dpo_margin_ref": mean(reference[:, 0] - reference[:, 1]),
        "dpo_accuracy": mean(chosen > rejected),
        "dpo_chosen_reward": mean(chosen),
        "dpo_rejected_reward": mean(rejected),
        "dpo_reward_margin": mean(chosen - rejected),
        "logps_chosen": mean(policy[:, 0]),
        "logps_rejected": mean(policy[:, 1]),
        "drift_chosen": mean(drift[:, 0]),
        "drift_rejected": mean(drift[:, 1]),
    } | {f"loss_{name}": mean(each) for name, each in objective.of_terms(answers).items()}


def by_part(
    parts: Sequence[Part], rows: np.ndarray, answers: Answers, objective: Objective
) -> dict[str, int | float]:
    """The same for the pairs of each source, where there are several, and the number of pairs."""
    figures: dict[str, int | float] = {}
    if len(parts) == 1:
        return figures
    here = Answers(*(jnp.asarray(jax.device_get(x)) for x in answers))
    of = mixture.part_of(parts, rows)
    for i, part in enumerate(parts):
        figures[f"{part.name}/pairs"] = int((of == i).sum())
        if figures[f"{part.name}/pairs"]:
            values = preference(here, objective, jnp.asarray(of == i))
            figures |= {f"{part.name}/{name}": float(value) for name, value in values.items()}
    return figures

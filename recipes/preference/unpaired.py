"""Metrics of answers that are wanted or not, by the names that those of pairs have."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recipes.preference.divergences import kl_estimate
from recipes.preference.objectives import Objective
from recipes.training.update import Answers


def figures(
    answers: Answers, objective: Objective, counted: Bool[Array, " P"]
) -> dict[str, Float[Array, ""]]:
    """Means over the wanted answers ("chosen") and the unwanted ones ("rejected") that count.

    A mean over none is 0, and so is its difference to the other. `dpo_accuracy` is the share of
    answers on the right side of the reference point, above it if they are wanted; a tie is on none.
    `kl_mismatched` is that point, in nats, which is always that of all of the answers.
    """
    assert answers.ratings is not None
    wanted = answers.ratings[:, 0] > 0
    chosen, rejected = wanted & counted, ~wanted & counted

    def mean(values: Array, where: Array) -> Array:
        return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)

    policy, reference = answers.policy[:, 0], answers.reference[:, 0]
    rewards, drift = objective.rewards(answers)[:, 0], policy - reference
    point = jax.nn.relu(jnp.mean(answers.policy[:, 1] - answers.reference[:, 1]))
    above = jnp.where(wanted, drift - point, point - drift)
    both = {
        "reward": rewards,
        "policy": policy,
        "reference": reference,
        "drift": drift,
        "kl": kl_estimate(drift / answers.tokens[:, 0]),
    }
    c, r = ({name: mean(x, where) for name, x in both.items()} for where in (chosen, rejected))
    both_are_there = chosen.any() & rejected.any()
    lead = lambda name: jnp.where(both_are_there, c[name] - r[name], 0)
    return {
        "dpo_loss": mean(objective.loss(answers), counted),
        "dpo_margin_policy": lead("policy"),
        "dpo_margin_ref": lead("reference"),
        "dpo_accuracy": mean(above > 0, counted),
        "dpo_chosen_reward": c["reward"],
        "dpo_rejected_reward": r["reward"],
        "dpo_reward_margin": lead("reward"),
        "logps_chosen": c["policy"],
        "logps_rejected": r["policy"],
        "drift_chosen": c["drift"],
        "drift_rejected": r["drift"],
        "kl_chosen": c["kl"],
        "kl_mismatched": point,
    }

"""Metrics of pairs: of an update, of a held-out set, of the parts of a mixture."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from recipes.data import mixture
from recipes.data.mixture import Part
from recipes.preference import lists, unpaired
from recipes.preference.divergences import kl_estimate
from recipes.preference.objectives import Objective
from recipes.training.update import Answers, token_accuracy


def preference(
    answers: Answers, objective: Objective, is_pair: Bool[Array, " P"] | None = None
) -> dict[str, Float[Array, ""]]:
    """Means over the pairs; log-probabilities and their differences in nats, rewards by the loss.

    The first six are those of Levanter's DPO. A tie counts as no win. `kl_chosen` estimates the KL
    divergence between policy and reference from the chosen answers alone, in nats per token;
    `length_correlation` is that of reward margins with how much longer the chosen answer is. Of a
    sum of losses each is there by its name. Only the pairs that `is_pair` names count, by default
    all. Of lists it is the means over the pairs of each, those that the loss compares.
    """
    counted = jnp.ones(len(answers.policy), bool) if is_pair is None else is_pair
    mean_loss: Callable[..., Array] = lambda x: jnp.mean(x, where=counted)
    if objective.is_unpaired:
        return unpaired.figures(answers, objective, counted) | token_accuracy(answers, counted)
    pairs, of_each = lists.compared(answers, objective.list_pairs)
    mean: Callable[..., Array] = lambda x: mean_loss(lists.mean(x, of_each))
    chosen, rejected = objective.rewards(pairs).T
    policy, reference = pairs.policy, pairs.reference
    drift = policy - reference
    found = {
        "dpo_loss": mean_loss(objective.loss(answers)),
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
        "length_correlation": _correlation(
            chosen - rejected,
            pairs.tokens[:, 0] - pairs.tokens[:, 1],
            counted if of_each is None else (counted[:, None] & of_each).reshape(-1),
        ),
    }
    found |= token_accuracy(answers, counted)
    if objective.has_reference:
        found["kl_chosen"] = mean(kl_estimate(drift[:, 0] / pairs.tokens[:, 0]))
    of_terms = objective.of_terms(answers).items()
    return found | {f"loss_{name}": mean_loss(each) for name, each in of_terms}


# The same as one program, for whoever has the answers at hand.
measured = jax.jit(preference, static_argnames="objective")


def _correlation(x: Array, y: Array, counted: Bool[Array, " P"]) -> Float[Array, ""]:
    """Pearson's correlation; 0 if one of the two is constant."""
    off = lambda values: jnp.where(counted, values - jnp.mean(values, where=counted), 0)
    x, y = off(x), off(y)
    lengths = jnp.sqrt(jnp.sum(x * x)) * jnp.sqrt(jnp.sum(y * y))
    return jnp.where(lengths > 0, jnp.sum(x * y) / jnp.where(lengths > 0, lengths, 1), 0.0)


def by_part(
    parts: Sequence[Part], rows: np.ndarray, answers: Answers, objective: Objective
) -> dict[str, int | float]:
    """The metrics of the pairs of each source, if there are several, and the number of pairs.

    Losses that depend on all pairs of an update are left out.
    """
    figures: dict[str, int | float] = {}
    if len(parts) == 1:
        return figures
    here = jax.tree.map(lambda x: jnp.asarray(jax.device_get(x)), answers)
    of = mixture.part_of(parts, rows)
    for i, part in enumerate(parts):
        figures[f"{part.name}/pairs"] = int((of == i).sum())
        if figures[f"{part.name}/pairs"]:
            values = jax.device_get(measured(here, objective, jnp.asarray(of == i)))
            for name in objective.of_an_update():
                values.pop(name, None)
            figures |= {f"{part.name}/{name}": float(value) for name, value in values.items()}
    return figures

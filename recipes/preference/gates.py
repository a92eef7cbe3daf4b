"""Gates: policy and reference of equal weights must agree before anything is learnt."""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import RunFailed
from recipes.data.packed import batches
from recipes.preference import reference_cache
from recipes.preference.objectives import Objective
from recipes.preference.reference import Reference
from recipes.training import logps
from recipes.training.policy import Policy, State, eval_weights
from recipes.training.run import Run, say
from recipes.training.update import Answers
from zoo import adapters


def check_logps(
    ask: logps.Forward, policy: Policy, state: State, reference: Reference, run: Run
) -> bool:
    """Equal policy and reference must give equal log-probabilities before the first step.

    Equal weights in one program give equal bits. Cached values of the reference were packed
    differently, and must agree within rounding.

    Raises:
      RuntimeError: they differ, or are not finite.
    """
    dtype = policy.blank.dtype
    if state.step or _known(policy, state) != reference.fingerprint_now():
        return False
    within = (
        "to the last bit" if reference.model else "up to rounding, because the reference is cached"
    )
    say(f"policy and reference have the same weights: their log-probabilities must agree {within}")
    update = next(batches.in_order(run.examples, run.place))
    batch = batches.put(update.micro_batches[0], run.place)
    here = update.micro_batches[0].is_here
    ours = np.asarray(ask(batch))[here]
    theirs = np.asarray(reference.of_batch(batch, update.source_rows))[here]
    if not np.isfinite(ours).all():
        raise RunFailed(_not_finite("log-probabilities of the first pairs are", dtype))
    bound = 0 if reference.model else reference_cache.bound(theirs, dtype)
    if not (np.abs(ours - theirs) <= bound).all():
        raise RunFailed(
            "policy and reference have equal weights and give different log-probabilities (by up "
            f"to {np.abs(ours - theirs).max():.3g} nats): "
            "training would be incorrect; this is a bug, please report it"
        )
    return True


def _known(policy: Policy, state: State) -> str:
    """The fingerprint of the policy's weights, as a reference has one."""
    return fingerprint(adapters.bare(eval_weights(policy, state)))


def check_first_loss(
    values: Mapping[str, jax.Array],
    objective: Objective,
    run: Run,
    answers: Answers,
) -> None:
    """The first loss, before any learning, must be the value that each term promises.

    `values` are the figures of the first update. What depends on its `answers`, or on margins of
    the data, is computed from them, as if the policy gave the log-probabilities of the reference.

    Raises:
      RuntimeError: it is not.
    """
    dtype = run.computing.precision.compute
    if not math.isfinite(float(values["dpo_loss"])):
        raise RunFailed(_not_finite("loss of the first update is", dtype))
    here = jax.tree.map(lambda x: jnp.asarray(jax.device_get(x)), answers)
    asks_for_margins = here.margins is not None and bool(here.margins.any())
    for term in objective.terms:
        if not term.has_reference:
            continue
        each = jnp.full(len(here.policy), term.first)
        if math.isnan(term.first) or asks_for_margins:
            each = term.of(here._replace(policy=here.reference))
        first = float(objective.counted(each, here).mean())
        found = float(values.get(f"loss_{term.name}", values["dpo_loss"] / term.weight))
        # With remat the training program may round differently from the reference's; beta scales
        # it, and floats are rounded in proportion.
        bound = (1e-5 if dtype == jnp.float32 else 5e-3) * max(1.0, 10 * objective.beta)
        bound *= max(1.0, first)
        if not abs(found - first) <= bound:
            raise RunFailed(
                f"the first loss ({term.name}) is {found:.6f} and should be {first:.6f} within "
                f"{bound:.1g}: the training program and the reference disagree, or FIRST in "
                "losses.py does not match the loss; please report it"
            )


def _not_finite(what: str, dtype: jax.typing.DTypeLike) -> str:
    """The sentence for a model whose weights are finite: `zoo.check_finite` has checked them."""
    wider = "" if dtype == jnp.float32 else " Or compute in float32: --config.mp=p=f32,c=f32"
    return (
        f"the {what} not finite (NaN or infinity), though every weight is: the model overflows in "
        f"{np.dtype(dtype).name}. Is it the right checkpoint (python -m zoo FOLDER)?{wider}"
    )

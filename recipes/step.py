"""One update: gradients of micro-batches added up, one step of the optimizer, compiled."""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from recipes import logps, metrics
from recipes.data.packing import Packed
from recipes.losses import Loss
from zoo import stack

Params = dict[str, Any]  # the weights of a model, by name


class Sums(NamedTuple):
    """What the micro-batches of an update add up to, in float32."""

    gradient: Params
    policy_logps: Float[Array, "P A"]
    reference_logps: Float[Array, "P A"]


def add_micro_batch(
    sums: Sums,
    policy: Params,
    reference_logps: Float[Array, "P A"],
    batch: Packed,
    *,
    graph: nnx.GraphDef,
    loss: Loss,
) -> Sums:
    """Adds the log-probabilities of one micro-batch and its part of the mean loss's gradient."""
    # The reference may be known for the whole update; here only these pairs count.
    reference_logps = jnp.where(batch.is_pair[:, None], reference_logps, 0)

    others, _ = stack.split(policy)
    of_others, of_stacks = stack.split(sums.gradient)

    def mean_loss(others: Params, so_far: Params) -> tuple[Array, Array]:
        policy_logps = logps.of_params(graph, policy | others, batch, so_far)
        chosen, rejected = (policy_logps - reference_logps).T
        # The mean is over the slots of the whole update: pairs that are elsewhere add 0.
        return jnp.mean(jnp.where(batch.is_pair, loss(chosen, rejected), 0)), policy_logps

    # The gradient of the stacks comes as the sum already: see `stack.run`.
    differentiate = jax.grad(mean_loss, argnums=(0, 1), has_aux=True)
    (fresh, of_stacks), policy_logps = differentiate(others, of_stacks)
    return Sums(
        stack.join(jax.tree.map(jnp.add, of_others, fresh), of_stacks),
        sums.policy_logps + policy_logps,
        sums.reference_logps + reference_logps,
    )


def apply(
    sums: Sums,
    policy: Params,
    opt_state: Any,
    *,
    adamw: optax.GradientTransformation,
    loss: Loss,
    beta: float,
) -> tuple[Params, Any, dict[str, Array]]:
    """One step of the optimizer, and the metrics of the pairs behind it.

    Where loss or gradient is not finite nothing is changed, and `skipped` is 1.
    """
    is_pair = jnp.ones(len(sums.policy_logps), bool)
    values = metrics.preference(
        sums.policy_logps, sums.reference_logps, is_pair, loss=loss, beta=beta
    )
    values["gradient_norm"] = optax.tree.norm(sums.gradient)
    sound = jnp.isfinite(values["dpo_loss"]) & jnp.isfinite(values["gradient_norm"])
    values["skipped"] = jnp.where(sound, 0.0, 1.0)

    def take(policy: Params, opt_state: Any) -> tuple[Params, Any]:
        changes, opt_state = adamw.update(sums.gradient, opt_state, policy)
        moved: Any = optax.apply_updates(policy, changes)
        return moved, opt_state

    # A branch works in place; a choice between two results would hold both.
    moved, opt_state = jax.lax.cond(sound, take, lambda *state: state, policy, opt_state)
    return moved, opt_state, values


class Programs(NamedTuple):
    """The compiled functions of a run. Their results are laid out as their arguments are."""

    zero: jax.stages.Wrapped  # () -> Sums
    add: jax.stages.Wrapped  # (Sums, Params, reference_logps [P, A], Packed) -> Sums
    apply: jax.stages.Wrapped  # (Sums, Params, opt_state) -> (Params, opt_state, metrics)


def compiled(
    policy: Params,
    opt_state: Any,
    *,
    graph: nnx.GraphDef,
    adamw: optax.GradientTransformation,
    loss: Loss,
    beta: float,
    pairs: int,
) -> Programs:
    """The functions above for one policy, its sums and state donated from step to step."""
    place = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    mesh = jax.tree.leaves(policy)[0].sharding.mesh
    everywhere = jax.NamedSharding(mesh, jax.P())
    sums_place: Any = (place(policy), everywhere, everywhere)

    def zero() -> Sums:
        none = jnp.zeros((pairs, 2), jnp.float32)
        return Sums(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), policy), none, none)

    return Programs(
        zero=jax.jit(zero, out_shardings=Sums(*sums_place)),
        add=jax.jit(
            functools.partial(add_micro_batch, graph=graph, loss=loss),
            donate_argnums=0,
            out_shardings=Sums(*sums_place),
        ),
        apply=jax.jit(
            functools.partial(apply, adamw=adamw, loss=loss, beta=beta),
            donate_argnums=(1, 2),
            out_shardings=(place(policy), place(opt_state), everywhere),
        ),
    )

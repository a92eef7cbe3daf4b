"""One update: gradients of micro-batches added up, one step of the optimizer, compiled.

What is trained and what is frozen are two trees. Gradients, their sum, the optimizer and the check
that all is finite know the trained one alone.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import optax

from recipes.data.packed.batches import DataFields
from recipes.data.packed.packing import Packed, Shape
from recipes.training import apart, logps
from zoo.parts import adapted, sharding, stack

Params = dict[str, PyTree]  # weights by name, in dicts as modules nest


class Answers(NamedTuple):
    """What a loss sees of the examples of an update: in a pair, the chosen answer comes first.

    Of a list, first the best answer; where one has fewer than another, the rest is zeros.
    """

    policy: Float[Array, "P A"]  # log-probability of each answer, in nats
    reference: Float[Array, "P A"]  # 0 where there is no reference
    tokens: Int[Array, "P A"]  # scored tokens of each answer
    ratings: Float[Array, "P A"] | None = None  # by the data; not a number where it says nothing
    ranks: Int[Array, "P A"] | None = None  # of lists, of each answer: 0 the best
    weights: Float[Array, " P"] | None = None  # by the data: what the loss of each counts
    margins: Float[Array, " P"] | None = None  # by how much the chosen reward must exceed the other
    # Sums over the scored tokens under the policy, in training: log of the sum of p² over the
    # vocabulary, and how many of them are the most likely ones.
    log_p2: Float[Array, "P A"] | None = None
    is_best: Float[Array, "P A"] | None = None


def token_accuracy(
    answers: Answers, counted: Bool[Array, " P"] | bool = True
) -> dict[str, Float[Array, ""]]:
    """The share of scored tokens of each first answer that are the policy's most likely ones.

    Nothing where the policy was not asked for it: outside of training.
    """
    if answers.is_best is None:
        return {}
    of = lambda values: jnp.where(counted, values[:, 0], 0).sum()
    return {"token_accuracy": of(answers.is_best) / of(answers.tokens)}


Loss = Callable[[Answers], Float[Array, " P"]]  # one value per example
Figures = Callable[[Answers], dict[str, Float[Array, ""]]]


class Sums(NamedTuple):
    """What the micro-batches of an update add up to, in float32."""

    gradient: Params  # of the trained tree; or its parts along `data`: see `apart`
    policy: logps.Scores
    reference: Float[Array, "P A"]

    def answers(self, fields: DataFields) -> Answers:
        """What a loss sees of all examples."""
        return answers(self.policy, self.reference, fields)


def answers(policy: logps.Scores, reference: Float[Array, "P A"], fields: DataFields) -> Answers:
    """What a loss sees of examples that the policy has scored."""
    own = policy.logps, reference
    return Answers(*own, *fields, log_p2=policy.log_p2, is_best=policy.is_best)


def add_micro_batch(
    sums: Sums,
    trained: Params,
    frozen: Params,
    reference: Float[Array, "P A"],
    fields: DataFields,
    batch: Packed,
    pull: Float[Array, "P A"] | None = None,
    *,
    graph: nnx.GraphDef,
    loss: Loss,
    sum_parts: Callable[[logps.Scores], logps.Scores] = lambda scores: scores,
) -> Sums:
    """Adds the log-probabilities of one micro-batch and its part of the mean loss's gradient.

    `pull` is the mean loss's gradient by the log-probabilities, where a loss must see all examples
    of the update to know it. `sum_parts` adds what other parts of the micro-batch have scored.
    """
    # The reference may be known for the whole update; here only these examples count.
    reference = jnp.where(batch.is_here[:, None], reference, 0)

    others, _ = stack.split(trained)
    of_others, of_stacks = stack.split(sums.gradient)

    def mean_loss(others: Params, so_far: Params | None) -> tuple[Array, logps.Scores]:
        model = nnx.merge(graph, nnx.State(adapted.joined(trained | others, frozen)))
        policy = sum_parts(logps.answer_scores(model, batch, so_far))
        if pull is None:
            each = loss(answers(policy, reference, fields))
        else:
            each = len(pull) * (pull * policy.logps).sum(-1)
        # The mean is over the slots of the whole update: examples that are elsewhere add 0.
        return jnp.mean(jnp.where(batch.is_here, each, 0)), policy

    # The gradient of the stacks comes as the sum already: see `stack.run`.
    differentiate = jax.grad(mean_loss, argnums=(0, 1), has_aux=True)
    (fresh, of_stacks), policy = differentiate(others, of_stacks)
    gradient = stack.join(jax.tree.map(jnp.add, of_others, fresh), of_stacks)
    policy = jax.tree.map(jnp.add, sums.policy, policy)
    return Sums(gradient, policy, sums.reference + reference)


def apply(
    sums: Sums,
    trained: Params,
    opt_state: PyTree,
    fields: DataFields,
    *,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    figures: Figures,
    whole: Callable[[Params], Params] = lambda gradient: gradient,
) -> tuple[Params, PyTree, dict[str, Array]]:
    """One step of the optimizer, and the figures of the examples it was taken on.

    `whole` adds up a gradient that is in parts. Where loss or gradient is not finite nothing is
    changed, and `skipped` is 1.
    """
    sums = sums._replace(gradient=whole(sums.gradient))
    values = figures(sums.answers(fields))
    values["gradient_norm"] = optax.tree.norm(sums.gradient)
    mean_loss = jnp.mean(loss(sums.answers(fields)))
    sound = jnp.isfinite(mean_loss) & jnp.isfinite(values["gradient_norm"])
    values["skipped"] = jnp.where(sound, 0.0, 1.0)

    def take(trained: Params, opt_state: PyTree) -> tuple[Params, PyTree]:
        changes, opt_state = optimizer.update(sums.gradient, opt_state, trained)
        moved: PyTree = optax.apply_updates(trained, changes)
        return moved, opt_state

    # On GPUs a branch would copy what it is given; elsewhere a choice would hold both results.
    state = trained, opt_state
    if sharding.platform() == "gpu":
        state = jax.tree.map(functools.partial(jnp.where, sound), take(*state), state)
    else:
        state = jax.lax.cond(sound, take, lambda *state: state, *state)
    return *state, values


class Programs(NamedTuple):
    """The compiled functions of a run. Their results are laid out as their arguments are."""

    zero: jax.stages.Wrapped  # () -> Sums
    # (Sums, trained, frozen, reference [P, A], DataFields, Packed, pull) -> Sums
    add: jax.stages.Wrapped
    # (Sums, trained, opt_state, DataFields) -> (trained, opt_state, figures)
    apply: jax.stages.Wrapped


def compiled(
    trained: Params,
    opt_state: PyTree,
    *,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    figures: Figures,
    shape: Shape,
) -> Programs:
    """The functions above for one policy, its sums and state donated from step to step.

    Where `data` goes over several slices, gradients stay apart until an update has all of them.
    """
    place = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    mesh = jax.tree.leaves(trained)[0].sharding.mesh
    replicated = jax.NamedSharding(mesh, jax.P())
    add: Callable = functools.partial(add_micro_batch, graph=graph, loss=loss)
    step: Callable = functools.partial(apply, optimizer=optimizer, loss=loss, figures=figures)
    of_gradient, parts = place(trained), ()
    if sharding.slices_over(mesh.devices) > 1:
        of_gradient, parts = jax.tree.map(apart.place, of_gradient), (mesh.shape[apart.AXIS],)
        add = apart.by_part(add, mesh)
        step = functools.partial(step, whole=functools.partial(apart.met, like=place(trained)))
    sums_place: PyTree = (of_gradient, replicated, replicated)

    def zero() -> Sums:
        none = jnp.zeros((shape.examples, shape.answers), jnp.float32)
        gradient = jax.tree.map(lambda x: jnp.zeros((*parts, *x.shape), jnp.float32), trained)
        return Sums(gradient, logps.Scores(none, none, none), none)

    return Programs(
        zero=jax.jit(zero, out_shardings=Sums(*sums_place)),
        add=jax.jit(add, donate_argnums=0, out_shardings=Sums(*sums_place)),
        apply=jax.jit(
            step,
            donate_argnums=(1, 2),
            out_shardings=(place(trained), place(opt_state), replicated),
        ),
    )

"""The optimizers, their learning-rate schedule, and where their state lives."""

from typing import NamedTuple

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree
import numpy as np
import optax

from checkpoints_io.errors import BadInput
from recipes.training import adamw8bit, by_matrix, written
from zoo.parts import layers

# Steps after which inverse_sqrt has fallen to sqrt(1 / 2), if there is no warm-up.
TIMESCALE = 10_000
# These work layer by layer; clipping beforehand would make a copy of all gradients.
CLIP_THEMSELVES = ("adamw8bit", "muon", "adafactor")


class OptimizerSettings(NamedTuple):
    """Settings of the optimizer and of its learning rate, under their names."""

    optimizer: str
    learning_rate: float
    lr_schedule: str
    warmup: float
    cooldown: float | None
    min_lr_ratio: float
    weight_decay: float
    max_grad_norm: float | None
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    adam_mu_dtype: str
    ema_decay: float | None


class Averaged(NamedTuple):
    """The state of an optimizer that also keeps an average of the weights."""

    average: PyTree  # of what is trained, in float32
    inner: PyTree  # the optimizer's own


class Followed(NamedTuple):
    """The state of an optimizer that also keeps a reference, which follows the weights."""

    reference: PyTree  # like what is trained, in float32
    count: Int[Array, ""]  # number of updates
    inner: PyTree  # the optimizer's own


def as_steps(amount: int | float, total: int) -> int:
    """A number of steps, given as a fraction of `total` (below 1) or as steps (1 and above)."""
    return round(amount * total) if amount < 1 else round(amount)


def phases(given: OptimizerSettings, total: int) -> tuple[int, int]:
    """The numbers of steps of warm-up and of the decay at the end."""
    warmup = as_steps(given.warmup, total)
    if given.cooldown is None:
        return warmup, max(total - warmup, 0)
    return warmup, as_steps(given.cooldown, total)


def inverse_sqrt(
    count: Int[Array, ""] | int, warmup: int, low: float = 0.0
) -> Float[Array, ""] | float:
    """The fraction of the peak rate after `count` steps of decay, never below `low`.

    It is sqrt(warmup / step) from the end of the warm-up on; without warm-up it is as if 10,000
    steps of it had gone before the first.

    Source: `get_inverse_sqrt_schedule` in transformers (src/transformers/optimization.py).
    """
    steps = jnp.maximum(count, 0)  # optax also calls it before the decay begins
    return jnp.maximum(1 / jnp.sqrt(1 + steps / (warmup or TIMESCALE)), low)


def schedule_of(given: OptimizerSettings, total: int) -> optax.Schedule:
    """Warm-up from 0, a plateau, then decay to `min_lr_ratio` of the peak over the last `cooldown`.

    With `cooldown` unset the decay takes all steps after the warm-up. inverse_sqrt falls as far as
    its steps take it, but not below `min_lr_ratio`.

    Raises:
      ValueError: the two do not fit into the steps, the steps are too many to be counted, or the
        rate is 0 at every step.
    """
    peak, low = given.learning_rate, given.learning_rate * given.min_lr_ratio
    warmup, decay = phases(given, total)
    if max(total, warmup, decay) >= 2**31:
        raise BadInput(
            f"a run must have fewer than 2**31 steps, not {total:.3g} ({warmup:.3g} of warm-up); "
            "lower --config.num_train_steps or --config.num_epochs, or --config.warmup"
        )
    if given.cooldown is not None and warmup + decay > total:
        raise BadInput(
            f"--config.warmup ({warmup} steps) and --config.cooldown ({decay} steps) do not fit "
            f"into {total} steps"
        )
    if warmup and total == 1:
        raise BadInput(
            "nothing would be learnt: the learning rate starts at 0, and with "
            f"--config.warmup={given.warmup} the only step of the run is taken there; set "
            "--config.warmup=0, or raise --config.num_train_steps"
        )
    if not np.float32(peak):
        raise BadInput(f"--config.learning_rate={peak} is 0 in float32: nothing would be learnt")
    falls = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, low, max(decay, 1)),
        "cosine": optax.cosine_decay_schedule(peak, max(decay, 1), given.min_lr_ratio),
        "inverse_sqrt": lambda count: peak * inverse_sqrt(count, warmup, given.min_lr_ratio),
    }
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.constant_schedule(peak),
            falls[given.lr_schedule],
        ],
        [warmup, max(warmup, total - decay)],
    )


def optimizer_of(
    given: OptimizerSettings,
    schedule: optax.Schedule,
    decayed: PyTree,
    rates: PyTree = None,
    sides: PyTree = None,
) -> optax.GradientTransformation:
    """The optimizer after a clip of the global norm. `decayed` is a tree of bools: matrices.

    `rates` multiply the learning rate of each weight, if it is not the same for all; `sides` say
    how each weight is made of matrices (`by_matrix`), for Adafactor and Muon. All decay weights as
    AdamW does: scaled by the learning rate and decoupled from the gradient.

    Raises:
      ValueError: Muon has no matrix to orthogonalise.
    """
    clip, norm = optax.identity(), given.max_grad_norm
    if norm is not None and given.optimizer not in CLIP_THEMSELVES:
        clip = optax.clip_by_global_norm(norm)
    stepped = optax.chain(  # as `optax.adamw` has it
        _scaled(given, decayed, sides),
        optax.add_decayed_weights(given.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )
    descent = optax.chain(clip, stepped)
    if rates is not None:
        descent = _at_rates(descent, rates)
    return descent if given.ema_decay is None else averaging(descent, given.ema_decay)


def _at_rates(
    optimizer: optax.GradientTransformation, rates: PyTree
) -> optax.GradientTransformation:
    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        changes, state = optimizer.update(updates, state, params)
        return jax.tree.map(jnp.multiply, changes, rates), state

    # Not a further link of the chain: Orbax restores a chain without an empty state at its end.
    return optax.GradientTransformation(optimizer.init, update)


def averaging(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """An optimizer that keeps an exponential moving average of the weights in its state.

    After each update it is decay x average + (1 - decay) x weights. It starts as a copy of the
    weights, so there is no bias to correct.

    Source: https://arxiv.org/abs/2411.18704, with the weights of every step.
    """

    def init(params: PyTree) -> Averaged:
        # A copy: a step gives the memory of both away.
        return Averaged(jax.tree.map(jnp.copy, params), optimizer.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        changes, inner = optimizer.update(updates, state.inner, params)
        nearer = lambda average, x, change: average + (1 - decay) * (x + change - average)
        return changes, Averaged(jax.tree.map(nearer, state.average, params, changes), inner)

    return optax.GradientTransformation(init, update)


def average_of(opt_state: PyTree) -> PyTree | None:
    """The average of the weights, or None if none is kept."""
    within = opt_state.inner if isinstance(opt_state, Followed) else opt_state
    return within.average if isinstance(within, Averaged) else None


def followed(
    optimizer: optax.GradientTransformation, every: int, share: float
) -> optax.GradientTransformation:
    """An optimizer that keeps a reference in its state, which follows the weights.

    It starts as a copy of the weights, and each `every` updates moves `share` of the way to them:
    a soft update, or a hard one with 1. Skipped updates do not count.

    Source: TR-DPO, Eq. 2 and 3 of https://arxiv.org/abs/2404.09656; TRL's sync_ref_model.
    """

    def init(params: PyTree) -> Followed:
        # A copy: a step gives the memory of both away.
        start = jnp.zeros((), jnp.int32)
        return Followed(jax.tree.map(jnp.copy, params), start, optimizer.init(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        changes, inner = optimizer.update(updates, state.inner, params)
        count = state.count + 1
        by = jnp.where(count % every == 0, share, 0.0)
        nearer = lambda theirs, x, change: jnp.where(
            by == 1, x + change, theirs + by * (x + change - theirs)
        )
        reference = jax.tree.map(nearer, state.reference, params, changes)
        return changes, Followed(reference, count, inner)

    return optax.GradientTransformation(init, update)


def reference_of(opt_state: PyTree) -> PyTree | None:
    """The reference that follows the weights, or None if there is none."""
    return opt_state.reference if isinstance(opt_state, Followed) else None


def _scaled(
    given: OptimizerSettings, decayed: PyTree, sides: PyTree
) -> optax.GradientTransformation:
    """The transformation that turns gradients into steps of about size 1."""
    betas = given.adam_beta1, given.adam_beta2, given.adam_epsilon
    mu_dtype, norm = written.DTYPES[given.adam_mu_dtype], given.max_grad_norm
    of_matrices = jax.tree.leaves(sides, is_leaf=by_matrix.is_sides)
    match given.optimizer:
        case "adamw8bit":
            return adamw8bit.scale_by_adam(*betas, max_norm=norm, matrices=decayed)
        case "lion":  # https://arxiv.org/abs/2302.06675, Algorithm 2, with its betas
            return optax.scale_by_lion(b1=0.9, b2=0.99)
        case "rmsprop":  # torch's, which https://arxiv.org/abs/2305.18290 trains with (appendix B)
            return optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False)
        case "adafactor":
            return by_matrix.scale_by_adafactor(sides, max_norm=norm)
        case "adamw":
            return optax.scale_by_adam(*betas, mu_dtype=mu_dtype)
        case "muon" if not any(side.hidden for side in of_matrices):
            raise BadInput(
                "--config.optimizer=muon only applies to matrices of the layers, and "
                "--config.trainable selects none: use --config.optimizer=adamw, which Muon uses "
                "for all other weights"
            )
        case "muon":  # AdamW updates its other weights
            adam = optax.scale_by_adam(*betas, mu_dtype=mu_dtype)
            return by_matrix.scale_by_muon(sides, adam, mu_dtype, max_norm=norm)
        case other:
            raise NotImplementedError(
                f"settings.py lists an optimizer {other} that is not implemented here"
            )


def matrices(params: nnx.State) -> dict[str, object]:
    """Which weights decay: matrices, which multiply the width, not norm scales, biases or sinks."""
    flat = nnx.to_flat_state(params)
    return traverse_util.unflatten_dict(
        {path: layers.is_matrix(param.axes) for path, param in flat}
    )


def layout(
    optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh | AbstractMesh
) -> PyTree:
    """Shapes, dtypes and shardings of the optimizer's state: split as the parameters are."""
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def beside(moment: PyTree, param: PyTree) -> PyTree:
        of_blocks = adamw8bit.is_blocks(moment)
        alike = lambda shape: of_blocks or shape == param.shape  # not Adafactor's rows, columns
        where = lambda x: _split_as(param.sharding, x.shape) if alike(x.shape) else replicated
        return jax.tree.map(lambda x: placed(x, where(x)), moment)

    return optax.tree_utils.tree_map_params(
        optimizer.init,
        beside,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: placed(x, replicated),
        is_leaf=lambda x: x is None or adamw8bit.is_blocks(x),  # None: not Muon's
    )


def _split_as(where: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """A weight's sharding for a part of its moment; scales that do not divide are replicated."""
    try:
        where.shard_shape(shape)
    except ValueError:
        assert isinstance(where, NamedSharding)
        return NamedSharding(where.mesh, PartitionSpec(*where.spec[: len(shape) - 1]))
    return where


def init(optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh) -> PyTree:
    """The optimizer's initial state, sharded; jit alone would keep all of it on every device."""
    shardings = jax.tree.map(lambda x: x.sharding, layout(optimizer, params, mesh))
    return jax.jit(optimizer.init, out_shardings=shardings)(params)

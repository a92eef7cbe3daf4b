"""The optimizers, their learning-rate schedule, and where their state lives."""

from typing import Any, NamedTuple

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

# Steps after which inverse_sqrt has come down to sqrt(1 / 2), where there is no warm-up.
TIMESCALE = 10_000
# They work layer by layer, where a clip beforehand would be a copy of all gradients.
CLIP_THEMSELVES = ("adamw8bit", "muon", "adafactor")


class OptimizerSettings(NamedTuple):
    """Settings of the optimizer and of its learning rate, by their names."""

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
    """The state of an optimizer beside which an average of the weights is kept."""

    average: PyTree  # of what is trained, in float32
    inner: PyTree  # the optimizer's own


class Followed(NamedTuple):
    """The state of an optimizer beside which a reference is kept that follows the weights."""

    reference: PyTree  # like what is trained, in float32
    count: Int[Array, ""]  # of updates
    inner: PyTree  # the optimizer's own


def as_steps(amount: int | float, total: int) -> int:
    """A fraction of `total` (below 1), or steps (1 and above)."""
    return round(amount * total) if amount < 1 else round(amount)


def phases(given: OptimizerSettings, total: int) -> tuple[int, int]:
    """Steps of warm-up, and of the decay at the end."""
    warmup = as_steps(given.warmup, total)
    if given.cooldown is None:
        return warmup, max(total - warmup, 0)
    return warmup, as_steps(given.cooldown, total)


def inverse_sqrt(
    count: Int[Array, ""] | int, warmup: int, low: float = 0.0
) -> Float[Array, ""] | float:
    """The share of the peak after so many steps of its decay, never below `low`.

    sqrt(warmup / step), where it begins with the end of the warm-up; without one, as with 10,000
    steps of it before the first.

    Source: `get_inverse_sqrt_schedule` in transformers (src/transformers/optimization.py).
    """
    steps = jnp.maximum(count, 0)  # optax asks before the decay begins, too
    return jnp.maximum(1 / jnp.sqrt(1 + steps / (warmup or TIMESCALE)), low)


def schedule_of(given: OptimizerSettings, total: int) -> optax.Schedule:
    """Warm-up from 0, a plateau, then decay to `min_lr_ratio` of the peak over the last `cooldown`.

    With `cooldown` unset the decay takes all that the warm-up leaves. inverse_sqrt goes as far down
    as its steps take it, and not below `min_lr_ratio`.

    Raises:
      ValueError: the two do not fit into the steps, the steps are too many to be counted, or the
        rate is 0 at each of them.
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

    `rates` are what the learning rate of each weight is multiplied by, if it is not one for all;
    `sides` how each weight is matrices (`by_matrix`), for Adafactor and Muon. All decay weights as
    AdamW does, by the learning rate and apart from the gradient.

    Raises:
      ValueError: Muon has no matrix to turn.
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

    # No further link of the chain: Orbax gives a chain back without an empty state at its end.
    return optax.GradientTransformation(optimizer.init, update)


def averaging(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """An optimizer that keeps an exponential moving average of the weights in its state.

    After each update, decay x average + (1 - decay) x weights; it begins as the weights do, so that
    no bias is to be corrected.

    Source: https://arxiv.org/abs/2411.18704, with the weights of every step.
    """

    def init(params: PyTree) -> Averaged:
        # A copy: a step gives the memory of both away.
        return Averaged(jax.tree.map(jnp.copy, params), optimizer.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        changes, inner = optimizer.update(updates, state.inner, params)
        nearer = lambda average, x, change: average + (1 - decay) * (x + change - average)
        return changes, Averaged(jax.tree.map(nearer, state.average, params, changes), inner)

    return optax.GradientTransformation(init, update)


def average_of(opt_state: PyTree) -> PyTree | None:
    """The average of the weights, if one is kept."""
    within = opt_state.inner if isinstance(opt_state, Followed) else opt_state
    return within.average if isinstance(within, Averaged) else None


def followed(
    optimizer: optax.GradientTransformation, every: int, share: float
) -> optax.GradientTransformation:
    """An optimizer that keeps a reference in its state, which follows the weights.

    It begins as the weights do. After every so many updates it moves `share` of the way to them:
    softly, or all of it with 1. What is skipped is no update.

    Source: TR-DPO, Eq. 2 and 3 of https://arxiv.org/abs/2404.09656; TRL's sync_ref_model.
    """

    def init(params: PyTree) -> Followed:
        # A copy: a step gives the memory of both away.
        start = jnp.zeros((), jnp.int32)
        return Followed(jax.tree.map(jnp.copy, params), start, optimizer.init(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
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
    """The reference that follows the weights, if there is one."""
    return opt_state.reference if isinstance(opt_state, Followed) else None


def _scaled(
    given: OptimizerSettings, decayed: PyTree, sides: PyTree
) -> optax.GradientTransformation:
    """What makes steps of about the size 1 of gradients."""
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
        case "muon":  # whose other weights are AdamW's
            adam = optax.scale_by_adam(*betas, mu_dtype=mu_dtype)
            return by_matrix.scale_by_muon(sides, adam, mu_dtype, max_norm=norm)
        case other:
            raise NotImplementedError(
                f"settings.py lists an optimizer {other} that is not implemented here"
            )


def matrices(params: nnx.State) -> dict[str, object]:
    """Which weights decay: those that multiply the width. Norm scales, biases and sinks do not."""
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

    def beside(moment: PyTree, param: Any) -> PyTree:
        of_blocks = adamw8bit.is_blocks(moment)
        alike = lambda shape: of_blocks or shape == param.shape  # not Adafactor's rows and columns
        where = lambda x: _split_as(param.sharding, x.shape) if alike(x.shape) else replicated
        return jax.tree.map(lambda x: placed(x, where(x)), moment)

    return optax.tree_utils.tree_map_params(
        optimizer.init,
        beside,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: placed(x, replicated),
        is_leaf=lambda x: x is None or adamw8bit.is_blocks(x),  # None: Muon's of another kind
    )


def _split_as(where: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """A weight's sharding, for a part of its moment; scales that it does not divide are whole."""
    try:
        where.shard_shape(shape)
    except ValueError:
        assert isinstance(where, NamedSharding)
        return NamedSharding(where.mesh, PartitionSpec(*where.spec[: len(shape) - 1]))
    return where


def init(optimizer: optax.GradientTransformation, params: PyTree, mesh: Mesh) -> PyTree:
    """The optimizer's first state. Left to itself, jit would keep all of it on every device."""
    shardings = jax.tree.map(lambda x: x.sharding, layout(optimizer, params, mesh))
    return jax.jit(optimizer.init, out_shardings=shardings)(params)

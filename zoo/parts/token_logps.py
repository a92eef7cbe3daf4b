"""Log-probabilities of the scored tokens, computed from one chunk of logits at a time.

Every device loops over its own list of scored tokens and stops after the last one, however many its
rows hold. The backward pass recomputes the logits; the head's gradient accumulates in float32 on
each device, and is summed between devices once per micro-batch.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from zoo.parts import last_step, layers, sharding

# Bytes of float32 logits that a device holds at a time: on CPUs limited by caches; elsewhere large
# enough that a chunk outweighs the cost of adding to the head's gradient.
LOGITS_BYTES = {"cpu": 2**26, "gpu": 2**29, "tpu": 2**29}
# A chunk may always have this many tokens: with fewer, reading the head and adding to its gradient
# takes as long as the products. (This matters on CPUs with more than 65,536 words.)
FEWEST = 256


def logits_bytes(vocabulary: int) -> int:
    """The number of bytes that a chunk's logits may take on this platform."""
    return max(LOGITS_BYTES.get(sharding.platform(), 2**29), 4 * vocabulary * FEWEST)


class Beside(NamedTuple):
    """Statistics of each target's distribution, without a gradient."""

    log_p2: Float[Array, "Z C"]  # log of the sum of p² over the vocabulary
    is_best: Float[Array, "Z C"]  # 1 where no other token is more likely


def token_logps(
    hidden: Float[Array, "Z C D"],
    head: Float[Array, "V D"],
    target: Int[Array, "Z C"],
    scores: Int[Array, " Z"],
    dtype: jax.typing.DTypeLike,
    last: last_step.LastStep = last_step.LastStep(),  # noqa: B008, never changed
) -> Float[Array, "Z C"]:
    """Log-probability of each target, in nats, float32, by products in `dtype`.

    `scores` says how many entries of each list count; values after them are undefined. `last` is
    the model's step from the product with its head to logits.
    """
    return _scored(hidden, head, target, scores, dtype, last, False)[0]


def with_beside(
    hidden: Float[Array, "Z C D"],
    head: Float[Array, "V D"],
    target: Int[Array, "Z C"],
    scores: Int[Array, " Z"],
    dtype: jax.typing.DTypeLike,
    last: last_step.LastStep = last_step.LastStep(),  # noqa: B008, never changed
) -> tuple[Float[Array, "Z C"], Beside]:
    """The same as `token_logps`, together with the `Beside` statistics of the same logits."""
    logps, beside = _scored(hidden, head, target, scores, dtype, last, True)
    assert beside is not None
    return logps, jax.lax.stop_gradient(beside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _scored(
    hidden: Array,
    head: Array,
    target: Array,
    scores: Array,
    dtype: jax.typing.DTypeLike,
    last: last_step.LastStep,
    more: bool,
) -> tuple[Array, Beside | None]:
    """Log-probabilities, with `Beside` statistics if `more`."""
    return _computed(hidden, head, target, scores, dtype, last, more)[:2]


def _computed(
    hidden: Array,
    head: Array,
    target: Array,
    scores: Array,
    dtype: jax.typing.DTypeLike,
    last: last_step.LastStep,
    more: bool,
) -> tuple[Array, Beside | None, Array, Array]:
    """Log-probabilities, `Beside` statistics, log-sum-exps, and the head in the compute dtype."""
    narrow = sharding.gather(head.astype(dtype), "V D")
    devices = _devices(hidden, narrow)
    split = sharding.on_each_device if devices.axes else _alone
    logps, logsum, *beside = split(
        functools.partial(_logps_here, devices, last, more),
        in_specs=(devices.rows, devices.head, devices.rows, devices.rows),
        out_specs=(devices.rows,) * (4 if more else 2),
    )(hidden, narrow, target, scores)
    return logps, Beside(*beside) if more else None, logsum, narrow


def _forward(
    hidden: PyTree,
    head: PyTree,
    target: PyTree,
    scores: PyTree,
    dtype: jax.typing.DTypeLike,
    last: last_step.LastStep,
    more: bool,
) -> tuple:
    """Saves None for a frozen head, so that its V x D gradient is not computed."""
    given = (hidden.value, head.value, target.value, scores.value)
    logps, beside, logsum, narrow = _computed(*given, dtype, last, more)
    trained = head.value if head.perturbed else None
    return (logps, beside), (hidden.value, trained, narrow, target.value, scores.value, logsum)


def _backward(
    dtype: jax.typing.DTypeLike, last: last_step.LastStep, more: bool, kept: tuple, gradients: tuple
) -> tuple:
    del dtype, more
    hidden, head, narrow, target, scores, logsum = kept
    gradient, _ = gradients
    devices = _devices(hidden, narrow)
    split = sharding.on_each_device if devices.axes else _alone
    of_hidden, of_head = split(
        functools.partial(_gradients_here, devices, last, head is not None),
        in_specs=(devices.rows, devices.head, *[devices.rows] * 4),
        out_specs=(devices.rows, None if head is None else devices.stored),
    )(hidden, narrow, target, scores, logsum, gradient)
    if of_head is not None and head is not None:
        of_head = of_head.astype(head.dtype)
    return of_hidden, of_head, None, None


_scored.defvjp(_forward, _backward, symbolic_zeros=True)


class Devices(NamedTuple):
    """How the work is split: the vocabulary over `tensor`, lists over all other axes."""

    axes: Mapping[str, int]  # of the mesh, and their sizes; empty without one
    rows: PartitionSpec
    head: PartitionSpec  # as gathered
    stored: PartitionSpec  # as its gradient is kept

    @property
    def vocabulary(self) -> str | None:
        """The axis that splits the vocabulary."""
        return "tensor" if self.splits("tensor") and self.head[0] else None

    @property
    def width(self) -> tuple[str, ...]:
        """The axes that split the width of the stored head."""
        return tuple(filter(self.splits, sharding.names(self.stored[1]))) if self.axes else ()

    def splits(self, axis: str) -> bool:
        """Whether there is more than one device along this axis."""
        return self.axes.get(axis, 1) > 1


def _devices(hidden: Array, head: Array) -> Devices:
    sizes = sharding.axes_here()
    if not sizes:
        return Devices({}, *[PartitionSpec()] * 3)
    spec = functools.partial(sharding.spec, sizes=sizes)
    return Devices(
        sizes,
        spec("Z", hidden.shape[:1]),
        spec("V D", head.shape, rules=sharding.GATHERED),
        spec("V D", head.shape),
    )


def _alone(f: Callable, **_) -> Callable:
    return f


def _logps_here(
    devices: Devices,
    last: last_step.LastStep,
    more: bool,
    hidden: Array,
    head: Array,
    target: Array,
    scores: Array,
) -> tuple[Array, ...]:
    chunk = _chunk(hidden, head)
    over_vocabulary = devices.vocabulary

    def add(i: Array, sofar: tuple) -> tuple:
        part = functools.partial(_part, i=i, chunk=chunk)
        logits = last_step.finished(_logits(part(hidden), head), last)
        top = logits.max(-1)
        if over_vocabulary:
            top = jax.lax.pmax(top, over_vocabulary)
        shares = jnp.exp(logits - top[..., None])
        total, squares = shares.sum(-1), (shares * shares).sum(-1) if more else None
        own = part(target) - _first_id(head, over_vocabulary)
        is_here = (own >= 0) & (own < len(head))
        at_target = jnp.take_along_axis(logits, jnp.clip(own, 0, len(head) - 1)[..., None], -1)
        at_target = jnp.where(is_here, at_target[..., 0], 0)
        if over_vocabulary:
            total, at_target, squares = jax.lax.psum((total, at_target, squares), over_vocabulary)
        logsum = top + jnp.log(total)
        fresh = at_target - logsum, logsum
        if squares is not None:
            fresh += jnp.log(squares) - 2 * jnp.log(total), (at_target >= top).astype(jnp.float32)
        put = lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, i * chunk, 1)
        return tuple(map(put, sofar, fresh))

    none = jnp.zeros(target.shape, jnp.float32)
    sofar = (none,) * (4 if more else 2)
    return jax.lax.fori_loop(0, -(-scores.max() // chunk), add, sofar)


def _gradients_here(
    devices: Devices,
    last: last_step.LastStep,
    trained: bool,
    hidden: Array,
    head: Array,
    target: Array,
    scores: Array,
    logsum: Array,
    gradient: Array,
) -> tuple[Array, Array | None]:
    """The gradients on one device; that of the head only if it is trained."""
    chunk = _chunk(hidden, head)
    over_vocabulary = devices.vocabulary

    def add(i: Array, sofar: tuple) -> tuple:
        of_hidden, of_head = sofar
        part = functools.partial(_part, i=i, chunk=chunk)
        logits = last_step.finished(_logits(part(hidden), head), last)
        shares = jnp.exp(logits - part(logsum)[..., None])
        own = part(target) - _first_id(head, over_vocabulary)
        is_target = own[..., None] == jnp.arange(len(head))
        of_logits = (is_target - shares) * part(gradient)[..., None]
        if last != last_step.LastStep():
            of_logits *= last_step.slope(logits, last)
        # Cast once for both products; the narrow operand is transposed, not the one as wide as V.
        of_logits = jax.lax.optimization_barrier(of_logits.astype(hidden.dtype))
        turned = jax.lax.optimization_barrier(part(hidden).reshape(-1, hidden.shape[2]).T)
        fresh = layers.dot("ZCV,VD->ZCD", of_logits, head, out=jnp.float32)
        of_logits = of_logits.reshape(-1, len(head))
        of_hidden = jax.lax.dynamic_update_slice_in_dim(of_hidden, fresh, i * chunk, 1)
        if not trained:
            return of_hidden, None
        return of_hidden, of_head + layers.dot("DC,CV->DV", turned, of_logits, jnp.float32)

    no_head = jnp.zeros(head.shape[::-1], jnp.float32) if trained else None
    count = -(-scores.max() // chunk)
    none = jnp.zeros(hidden.shape, jnp.float32), no_head
    of_hidden, of_head = jax.lax.fori_loop(0, count, add, none)
    if over_vocabulary:
        of_hidden = jax.lax.psum(of_hidden, over_vocabulary)
    if of_head is None:
        return of_hidden.astype(hidden.dtype), None
    of_head = of_head.T
    if devices.width:
        of_head = jax.lax.psum_scatter(of_head, devices.width, scatter_dimension=1, tiled=True)
    for axis in ("fsdp", "context", "data"):
        if devices.splits(axis) and axis not in devices.width:
            of_head = jax.lax.psum(of_head, axis)
    return of_hidden.astype(hidden.dtype), of_head


def _part(x: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _logits(hidden: Float[Array, "Z c D"], head: Float[Array, "V D"]) -> Float[Array, "Z c V"]:
    return layers.dot("ZCD,VD->ZCV", hidden, head, out=jnp.float32)


def _first_id(head: Array, axis: str | None) -> Array | int:
    """The first id of the part of a split vocabulary that this device holds."""
    return jax.lax.axis_index(axis) * len(head) if axis else 0


def _chunk(hidden: Float[Array, "Z C D"], head: Float[Array, "V D"]) -> int:
    """The number of tokens per chunk: the largest that divides the list and fits."""
    Z, C, _ = hidden.shape
    most = logits_bytes(len(head)) // (4 * Z * len(head))
    return max(n for n in range(1, C + 1) if C % n == 0 and n <= max(most, 1))

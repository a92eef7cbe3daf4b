"""A stack of blocks: one body, scanned over weights with a leading L, and the way back.

One scanned body compiles in the same time for 2 layers and for 80.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo import attention, sharding, spans

# What of a block is kept for the backward pass, beside the residual stream before it; the rest is
# computed again. Less kept is less memory and more time.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}

Weights = dict[str, Any]  # arrays by name, each with a leading L

# (model, x, where, *shared, each=) -> x after the last block. `run`, or one that keeps the keys.
Run = Callable[..., Array]


def run(
    model: Any,
    x: Float[Array, "B T D"],
    where: spans.Spans,
    *shared: Any,
    each: Any = None,
    so_far: Weights | None = None,
) -> Float[Array, "B T D"]:
    """Applies the blocks of a model layer by layer: `x = block(x, attend, *shared)`.

    `shared` are pytrees that take no gradient; `each` is one with a leading L: what differs from
    layer to layer, and then the last argument of `block`. `so_far` is a gradient that fresh
    gradients are added to: differentiate by it, not by the weights, and what comes is their sum.
    With full remat it is added to in its place, layer by layer, so that a gradient of all layers
    exists once and not twice.
    """
    graph, state = nnx.split(model.blocks)
    weights = nnx.to_pure_dict(state)
    shared = (attention.over(where, model.attention), *shared)
    if so_far is not None and model.remat == "full":
        return _added_in_place(graph, x, weights, so_far, shared, each)
    if so_far is not None:
        weights = _attached(weights, so_far)
    layer = lambda x, one: (block_of(graph, x, one[0], one[1], shared), None)
    policy = REMAT[model.remat]
    scanned = (weights, each)
    x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False, policy=policy), x, scanned)
    return x


def keeping(kept: list[Array]) -> Run:
    """A way through the blocks that puts into `kept` what enters each of them, [L, B, T, D]."""

    def run(
        model: Any, x: Float[Array, "B T D"], where: spans.Spans, *shared: Any, each: Any = None
    ) -> Float[Array, "B T D"]:
        graph, state = nnx.split(model.blocks)
        shared = (attention.over(where, model.attention), *shared)
        layer = lambda x, one: (block_of(graph, x, one[0], one[1], shared), x)
        x, entering = jax.lax.scan(layer, x, (nnx.to_pure_dict(state), each))
        kept.append(entering)
        return x

    return run


def block_of(graph: nnx.GraphDef, x: Array, weights: Weights, own: Any, shared: tuple) -> Array:
    """One layer: its weights, and what it has of its own, if anything."""
    block: Callable[..., Array] = nnx.merge(graph, nnx.State(weights))
    more = shared if own is None else (*shared, own)
    return sharding.constrain(block(x, *more), "B T D")


@jax.custom_vjp
def _attached(weights: Weights, so_far: Weights) -> Weights:
    return weights


_attached.defvjp(
    lambda weights, so_far: (weights, so_far),
    lambda so_far, gradient: (None, jax.tree.map(jnp.add, so_far, gradient)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _added_in_place(
    graph: nnx.GraphDef, x: Array, weights: Weights, so_far: Weights, shared: tuple, each: Any
) -> Array:
    return _forward(graph, x, weights, so_far, shared, each)[0]


def _forward(
    graph: nnx.GraphDef, x: Array, weights: Weights, so_far: Weights, shared: tuple, each: Any
) -> tuple:
    layer = lambda x, one: (block_of(graph, x, one[0], one[1], shared), x)
    x, inputs = jax.lax.scan(layer, x, (weights, each))
    return x, (inputs, weights, so_far, shared, each)


def _backward(graph: nnx.GraphDef, kept: tuple, gradient: Array) -> tuple:
    inputs, weights, so_far, shared, each = kept

    def layer(carry: tuple, i: Array) -> tuple:
        gradient, sums = carry
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        own = jax.tree.map(at, each)
        again = lambda x, weights: block_of(graph, x, weights, own, shared)
        _, pull = jax.vjp(again, at(inputs), jax.tree.map(at, weights))
        gradient, fresh = pull(gradient)
        add = lambda sum_, new: jax.lax.dynamic_update_index_in_dim(sum_, at(sum_) + new, i, 0)
        return (gradient, jax.tree.map(add, sums, fresh)), None

    steps = jnp.arange(len(inputs))
    (gradient, sums), _ = jax.lax.scan(layer, (gradient, so_far), steps, reverse=True)
    return gradient, None, sums, None, None


_added_in_place.defvjp(_forward, _backward)

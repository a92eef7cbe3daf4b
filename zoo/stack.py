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

from zoo import sharding

# What of a block is kept for the backward pass, beside the residual stream before it; the rest is
# computed again. Less kept is less memory and more time.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}

Weights = dict[str, Any]  # arrays by name, each with a leading L


def run(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    *shared: Any,
    remat: str = "full",
    so_far: Weights | None = None,
) -> Float[Array, "B T D"]:
    """Applies a block with stacked weights layer by layer: `x = block(x, *shared)`.

    `shared` are pytrees that take no gradient; `remat` is one of REMAT. `so_far` is a gradient that
    fresh gradients are added to: differentiate by it, not by the weights, and what comes is their
    sum. With full remat it is added to in its place, layer by layer, so that a gradient of all
    layers exists once and not twice.
    """
    graph, state = nnx.split(blocks)
    weights = nnx.to_pure_dict(state)
    if so_far is not None and remat == "full":
        return _added_in_place(graph, x, weights, so_far, shared)
    if so_far is not None:
        weights = _attached(weights, so_far)
    layer = lambda x, weights: (_layer(graph, x, weights, shared), None)
    x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat]), x, weights)
    return x


def _layer(graph: nnx.GraphDef, x: Array, weights: Weights, shared: tuple) -> Array:
    block: Callable[..., Array] = nnx.merge(graph, nnx.State(weights))
    return sharding.constrain(block(x, *shared), "B T D")


@jax.custom_vjp
def _attached(weights: Weights, so_far: Weights) -> Weights:
    return weights


_attached.defvjp(
    lambda weights, so_far: (weights, so_far),
    lambda so_far, gradient: (None, jax.tree.map(jnp.add, so_far, gradient)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _added_in_place(
    graph: nnx.GraphDef, x: Array, weights: Weights, so_far: Weights, shared: tuple
) -> Array:
    return _forward(graph, x, weights, so_far, shared)[0]


def _forward(
    graph: nnx.GraphDef, x: Array, weights: Weights, so_far: Weights, shared: tuple
) -> tuple:
    layer = lambda x, weights: (_layer(graph, x, weights, shared), x)
    x, inputs = jax.lax.scan(layer, x, weights)
    return x, (inputs, weights, so_far, shared)


def _backward(graph: nnx.GraphDef, kept: tuple, gradient: Array) -> tuple:
    inputs, weights, so_far, shared = kept

    def layer(carry: tuple, i: Array) -> tuple:
        gradient, sums = carry
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        again = lambda x, weights: _layer(graph, x, weights, shared)
        _, pull = jax.vjp(again, at(inputs), jax.tree.map(at, weights))
        gradient, fresh = pull(gradient)
        add = lambda sum_, new: jax.lax.dynamic_update_index_in_dim(sum_, at(sum_) + new, i, 0)
        return (gradient, jax.tree.map(add, sums, fresh)), None

    steps = jnp.arange(len(inputs))
    (gradient, sums), _ = jax.lax.scan(layer, (gradient, so_far), steps, reverse=True)
    return gradient, None, sums, None


_added_in_place.defvjp(_forward, _backward)

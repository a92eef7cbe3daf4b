"""A stacked weight of which only some layers are trained; frozen layers are in the compute dtype.

The value of a parameter may be a `Partly` in place of an array of all layers; trained layers are in
float32. `stack.run` takes one layer's weight at a time, and no architecture needs to know.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=("frozen", "slot", "trained"),
                   meta_fields=())  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Partly:
    """Layer n is `trained[slot[n]]`, or `frozen[-1 - slot[n]]` where the slot is below 0."""

    frozen: PyTree  # arrays, or what jax has in their place
    slot: PyTree  # int32 [L]
    trained: PyTree = None  # None in a tree of frozen weights

    def layer(self, n: Array) -> Array:
        """The weight of one layer, in the dtype of the trained layers."""
        slot = self.slot[n]
        at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        mine, other = at(self.trained, jnp.maximum(slot, 0)), at(self.frozen, jnp.maximum(~slot, 0))
        return jnp.where(slot >= 0, mine, other.astype(mine.dtype))

    def added(self, sums: Float[Array, "..."], new: Float[Array, "..."], n: Array) -> Array:
        """Adds the gradient of layer n to a gradient like `trained`, if layer n is trained."""
        slot = jnp.maximum(self.slot[n], 0)
        before = jax.lax.dynamic_index_in_dim(sums, slot, keepdims=False)
        after = before + jnp.where(self.slot[n] >= 0, new, 0)
        return jax.lax.dynamic_update_index_in_dim(sums, after, slot, 0)

    def whole(self) -> Array:
        """The weight of all layers, in the dtype of the trained ones."""
        order = jnp.where(self.slot >= 0, len(self.frozen) + self.slot, ~self.slot)
        return _together(self.trained.sharding)(self.frozen, self.trained, order)

    def like(self, whole: Array) -> "Partly":
        """Splits another weight of all layers into trained and frozen ones as in this one."""
        slot, at = np.asarray(self.slot), _layers(self.frozen.sharding)
        frozen, trained = at(whole, np.flatnonzero(slot < 0)), at(whole, np.flatnonzero(slot >= 0))
        return Partly(frozen, self.slot, trained)


@functools.cache
def _together(where: jax.sharding.Sharding) -> Callable[..., Array]:
    together = lambda some, others, order: jnp.concatenate([some.astype(others.dtype), others])[
        order
    ]
    return jax.jit(together, out_shardings=where)


@functools.cache
def _layers(where: jax.sharding.Sharding) -> Callable[..., Array]:
    return jax.jit(lambda whole, layers: whole[layers], out_shardings=where)


def is_partly(value: object) -> bool:
    """Whether the value of a weight is a `Partly`."""
    return isinstance(value, Partly)


def slots(layers: tuple[int, ...], count: int) -> Int[np.ndarray, " L"]:
    """The slots of `count` layers, of which `layers` are trained."""
    others = [n for n in range(count) if n not in layers]
    slot = np.empty(count, np.int32)
    slot[[*layers]], slot[others] = np.arange(len(layers)), ~np.arange(len(others))
    return slot


def any_in(tree: PyTree) -> bool:
    """Whether a tree has a `Partly` weight."""
    return any(map(is_partly, jax.tree.leaves(tree, is_leaf=is_partly)))


def whole(tree: PyTree) -> PyTree:
    """Replaces every `Partly` of a tree by an array of all layers."""
    return jax.tree.map(lambda x: x.whole() if is_partly(x) else x, tree, is_leaf=is_partly)


def like(weights: PyTree, frozen: PyTree) -> PyTree:
    """Splits weights, in dicts, wherever `frozen` has a `Partly`."""
    if isinstance(weights, dict):
        return {name: like(value, (frozen or {}).get(name)) for name, value in weights.items()}
    return frozen.like(weights) if is_partly(frozen) else weights

"""Attaches adapters to frozen weights, initialises them, and measures what merging rounds away.

A model with adapters is two trees: `trained`, the adapters, and `frozen`, all other weights.
`joined` combines them into the weights of the model.
"""

from collections.abc import Callable
import dataclasses
import math

from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from zoo.models import Model
from zoo.parts import adapted, quantised, sharding
from zoo.parts.adapted import RANK, Adapted, Adapter, lettered
from zoo.targets import Site, linear


def attached(
    params: PyTree, found: list[Site], put: Callable[[np.ndarray], object] = jnp.asarray
) -> PyTree:
    """Prepares a tree of weights for adapters at these sites; `put` places their scales."""
    flat: dict[str, PyTree] = traverse_util.flatten_dict(params, sep=".")
    for site in found:
        own = site.axes.removeprefix("L ")
        scale = put(np.array(site.scales, np.float32))
        flat[site.path] = Adapted(
            flat[site.path], scale, None, site.ranks, own, site.into, site.out
        )
    return traverse_util.unflatten_dict(flat, sep=".")


def layout(model: Model, found: list[Site], *, dora: bool = False) -> dict:
    """The shapes and shardings of the trainable adapters at these sites, in float32."""
    weights, flat = linear(model), {}
    for site in found:
        param, _ = weights[site.path]
        sizes = dict(zip(site.axes.split(), param.shape, strict=True)) | {RANK: max(site.ranks)}
        like, lead = param.get_value().sharding, site.lead
        placed = lambda axes, sizes=sizes, like=like: sharding.placed_as(
            like, axes, tuple(sizes[letter] for letter in axes.split()), jnp.float32
        )
        flat[site.path] = Adapter(
            placed(f"{lead} {site.into} {RANK}"),
            placed(f"{lead} {RANK} {site.out}"),
            placed(f"{lead} {site.out}") if dora else None,
        )
    return traverse_util.unflatten_dict(flat, sep=".")


def fresh(frozen: PyTree, like: PyTree, *, zero: str, seed: int) -> dict:
    """New adapters with the shapes and shardings of `like`, which leave the model unchanged.

    The factor that is not 0 is uniform within 1 / sqrt(fan-in), as A is in PEFT; a magnitude is the
    norm of its weights. A seed gives the same values on any devices.
    """

    def drawn(frozen: PyTree) -> dict:
        weights: dict[tuple, PyTree] = traverse_util.flatten_dict(frozen)
        shapes: dict[tuple, PyTree] = traverse_util.flatten_dict(like)
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        flat = {}
        for (path, (a, b, magnitude)), key in zip(shapes.items(), keys, strict=True):
            weight = weights[path]
            ranks, most = np.array(weight.ranks), max(weight.ranks)
            lead = b.ndim - 1 - len(weight.out.split())  # axes before R: L, and E of experts
            # Where a layer's rank is smaller, the rest of both factors is 0 and stays 0.
            here = (np.arange(most) < ranks[:, None]).astype(np.float32)  # [L, R]
            of_a = np.expand_dims(here, (*range(1, a.ndim - 1),))
            of_b = np.expand_dims(here, (*range(1, lead), *range(lead + 1, b.ndim)))
            noise = lambda like, key=key: jax.random.uniform(key, like.shape, minval=-1, maxval=1)
            summed = math.prod(a.shape[lead:-1])
            share = np.expand_dims(1 / np.sqrt(np.maximum(ranks, 1)), (*range(1, b.ndim),))
            flat[path] = Adapter(
                jnp.zeros(a.shape) if zero == "A" else noise(a) * of_a / math.sqrt(summed),
                jnp.zeros(b.shape) if zero == "B" else noise(b) * of_b * share,
                None if magnitude is None else lengths(weight),
            )
        return traverse_util.unflatten_dict(flat)

    places = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(drawn, out_shardings=places)(frozen)


def alike(params: PyTree, frozen: PyTree) -> PyTree:
    """Other weights of the same model, prepared for adapters where `frozen` is."""
    put = lambda there, mine: (
        dataclasses.replace(there, base=mine) if adapted.is_adapted(there) else mine
    )
    is_weight = lambda x: adapted.is_adapted(x) or quantised.is_quantised(x)
    return jax.tree.map(put, frozen, params, is_leaf=is_weight)


def nothing(begun: PyTree, frozen: PyTree) -> PyTree:
    """Adapters shaped like `begun` that add nothing to the frozen weights."""
    flat, idle = traverse_util.flatten_dict(frozen), {}
    new: dict[tuple, PyTree] = traverse_util.flatten_dict(begun)
    for path, one in new.items():
        magnitude = None if one.magnitude is None else lengths(flat[path])
        idle[path] = Adapter(jnp.zeros_like(one.a), jnp.zeros_like(one.b), magnitude)
    return traverse_util.unflatten_dict(idle)


def lost_in(model: Model, dtype: jax.typing.DTypeLike) -> float:
    """The error of rounding merged weights to `dtype`, relative to what the adapters add.

    Over all weights: the norm of (rounded - merged) divided by the norm of (merged - base).
    """
    narrow = jnp.finfo(dtype)

    @jax.jit
    def lengths_of(weight: Adapted) -> tuple[Array, Array]:
        merged, base = weight.astype(jnp.float32), weight.base.astype(jnp.float32)
        # XLA would remove a cast there and back, as it may compute more precisely.
        off = jax.lax.reduce_precision(merged, narrow.nexp, narrow.nmant) - merged
        return jnp.sum(off**2), jnp.sum((merged - base) ** 2)

    found = []  # all are dispatched before the first is waited for
    for param, _ in linear(model).values():
        weight = param.get_value()
        for layer in range(len(weight.ranks)) if adapted.is_adapted(weight) else ():
            found.append(lengths_of(jax.tree.map(lambda x, i=layer: x[i], weight)))
    off, added = map(math.fsum, zip(*jax.device_get(found), strict=True))
    return math.sqrt(off / added) if added else 0.0


def lost_told(share: float, dtype: jax.typing.DTypeLike) -> str:
    """A sentence that reports the result of `lost_in`."""
    name = np.dtype(dtype).name
    if share < 1e-4:
        return f"{name} holds all of what the adapters add"
    remedy = "" if share < 0.1 else ": serve the adapters beside their base, or write float32"
    return f"rounding to {name} is off by {share:.1%} of what the adapters add{remedy}"


def base_of(params: PyTree) -> PyTree:
    """The frozen weights without their adapters."""
    return jax.tree.map(lambda w: w.base if adapted.is_adapted(w) else w, params,
                        is_leaf=adapted.is_adapted)  # fmt: skip


def bare(params: PyTree) -> PyTree:
    """Drops adapters that add nothing, so that equal models have equal weights."""
    adds = lambda w: w.adapter.a.any() & w.adapter.b.any() if adapted.is_adapted(w) else None
    found = jax.device_get(jax.tree.map(adds, params, is_leaf=adapted.is_adapted))

    def one(weight: PyTree, adds: PyTree) -> PyTree:
        if not adapted.is_adapted(weight) or adds:
            return weight
        magnitude = weight.adapter.magnitude
        return weight.base if magnitude is None else (weight.base, magnitude)

    is_weight = lambda x: adapted.is_adapted(x) or quantised.is_quantised(x) or x is None
    return jax.tree.map(one, params, found, is_leaf=is_weight)


@jax.jit
def lengths(weight: Adapted) -> Float[Array, "..."]:
    """The norm of the weights of each output in every layer: DoRA's initial magnitude."""
    lead = adapted.lead_of(weight.axes, weight.into, weight.out)
    axes, kept = lettered(weight.axes), lettered(lead + weight.out)

    def of_layer(base: PyTree) -> Array:
        wide = base.astype(jnp.float32)
        return jnp.sqrt(jnp.einsum(f"{axes},{axes}->{kept}", wide, wide, precision="highest"))

    return jax.lax.map(of_layer, weight.base)

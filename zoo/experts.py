"""Mixtures of experts without capacity: every token meets its top k, however many want the same.

Tokens are sorted by expert, and each expert multiplies its own in one ragged product; no token is
dropped, so packing changes nothing. The balance of the experts never touches what is returned.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo import sharding


class Route(NamedTuple):
    """Which experts each token meets, and their shares of the sum."""

    experts: Int[Array, "B T k"]
    shares: Float[Array, "B T k"]


def softmax_then_top(logits: Float[Array, "B T E"], k: int, *, to_one: bool) -> Route:
    """Shares of a softmax over all experts; `to_one` makes those of the chosen sum to one."""
    shares, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), k)
    if to_one:
        shares = shares / shares.sum(-1, keepdims=True)
    return Route(experts, shares)


def top_then_softmax(logits: Float[Array, "B T E"], k: int) -> Route:
    """Shares of a softmax over the chosen experts."""
    top, experts = jax.lax.top_k(logits, k)
    return Route(experts, jax.nn.softmax(top.astype(jnp.float32), axis=-1))


# One expert's work: (tokens sorted by expert, the products with its weights) -> what it makes.
Products = Mapping[str, Callable[[Array], Array]]
Work = Callable[[Array, Products], Array]


def mixed(
    x: Float[Array, "B T D"], route: Route, weights: Mapping[str, tuple[Array, str]], work: Work
) -> Float[Array, "B T D"]:
    """The sum of what each token's experts make of it, by their shares.

    `work` is one expert's, with a product for each of `weights`, given with their axes: a matrix
    "E D F" or "E F D" multiplies, a bias "E F" or "E D" is added.
    """
    ready = {name: sharding.gather(w.astype(x.dtype), axes) for name, (w, axes) in weights.items()}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _here(x, route, ready, work=work, whole=frozenset(), over=None)
    # XLA cannot split a sort: each device sorts its own tokens, and has its own part of F.
    rows = sharding.spec("B", x.shape[:1], mesh.shape)
    split = {
        name: sharding.spec(axes, w.shape, mesh.shape, sharding.GATHERED)
        for name, (w, axes) in weights.items()
    }
    tensor = any("tensor" in (axes or ()) for spec in split.values() for axes in spec)
    over = "tensor" if tensor and mesh.shape["tensor"] > 1 else None
    # A bias of the whole sum is added once, not by each device that has a part of it.
    whole = frozenset(name for name, (_, axes) in weights.items() if axes == "E D")
    of_route: Any = (rows, rows)
    return jax.shard_map(
        functools.partial(_here, work=work, whole=whole, over=over),
        in_specs=(rows, Route(*of_route), split),
        out_specs=rows,
        check_vma=False,
    )(x, route, ready)


def _here(
    x: Array,
    route: Route,
    weights: Mapping[str, Array],
    *,
    work: Work,
    whole: frozenset[str],
    over: str | None,
) -> Array:
    B, T, D = x.shape
    k = route.experts.shape[-1]
    chosen = route.experts.reshape(-1)
    order = jnp.argsort(chosen)
    counts = jnp.bincount(chosen, length=len(next(iter(weights.values()))))
    # Each token k times, then sorted: going back, k gradients of a token are summed side by side.
    copies = jnp.broadcast_to(x.reshape(-1, 1, D), (B * T, k, D)).reshape(-1, D)
    bound = {
        name: functools.partial(_product, w, counts, chosen[order], over if name in whole else None)
        for name, w in weights.items()
    }
    made = work(copies[order], bound)
    made = made * route.shares.reshape(-1)[order][:, None].astype(made.dtype)
    back = jnp.zeros_like(made).at[order].set(made, unique_indices=True)
    total = back.reshape(B, T, k, D).astype(jnp.float32).sum(2).astype(x.dtype)
    return jax.lax.psum(total, over) if over else total


def _product(
    weight: Array,
    counts: Int[Array, " E"],
    owner: Int[Array, " M"],
    once_over: str | None,
    x: Array,
) -> Array:
    if weight.ndim == 3:
        exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.ragged_dot(x, weight, counts, precision=exact)
    bias = weight[owner]
    if once_over:
        bias = jnp.where(jax.lax.axis_index(once_over) > 0, 0, bias)
    return x + bias

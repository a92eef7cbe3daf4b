"""Computes experts tile by tile: tokens are sorted by expert into tiles of one expert each.

No token is multiplied by an expert that it is not routed to. An expert's last tile is padded with
zeros; docs/models.md says how many products that adds.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from zoo.parts import grouped, layers, sharding

# Tokens per tile: a power of two, no less than an expert's share of them, within these bounds.
# Smaller tiles need less padding, but read an expert's weights and update its gradient more often.
SMALLEST, LARGEST = 8, 512
# The tile sizes of the kernels in `grouped`, and where those run: GPUs are slow in float32.
AT_ONCE, BY_KERNELS = (grouped.SMALLEST, grouped.LARGEST), {("gpu", "bfloat16")}

Weights = Mapping[str, PyTree]  # arrays, or those with adapters
# One expert's work: (its tokens, its own weights) -> its outputs.
Work = Callable[[Float[Array, "tile D"], Weights], Float[Array, "tile D"]]


class Route(NamedTuple):
    """Which experts each token goes to, and their shares of the sum."""

    experts: Int[Array, "B T k"]
    shares: Float[Array, "B T k"]


class Part(NamedTuple):
    """The experts of one device along a mesh axis."""

    axis: str
    count: int


def gathered(
    x: Float[Array, "B T D"],
    route: Route,
    weights: Weights,
    *,
    work: Work,
    before: bool,
    part: Part | None = None,
) -> Float[Array, "B T D"]:
    """The weighted sum of the experts' outputs for one device's tokens.

    It is over all experts of the route, or only those in the device's `part`.
    """
    B, T, D = x.shape
    E, k = jax.tree.leaves(weights)[0].shape[0], route.experts.shape[-1]
    M = B * T * k  # (token, expert) pairs
    each = M // (E * part.count if part else E)
    at_once = (sharding.platform(), x.dtype.name) in BY_KERNELS
    smallest, largest = AT_ONCE if at_once else (SMALLEST, LARGEST)
    tile = min(max(1 << max(each - 1, 0).bit_length(), smallest), largest)
    chosen = route.experts.reshape(-1)
    if part:  # experts of other devices sort last and are not counted
        chosen = chosen - jax.lax.axis_index(part.axis) * E
        chosen = jnp.where((chosen >= 0) & (chosen < E), chosen, E)
    counts = jnp.bincount(chosen, length=E)
    tiles = -(-counts // tile)
    first_tile, first_meeting = jnp.cumsum(tiles) - tiles, jnp.cumsum(counts) - counts
    order = jnp.argsort(chosen)  # pairs sorted by expert
    owner = chosen[order]
    slot = first_tile[owner] * tile + jnp.arange(M) - first_meeting[owner]
    # The largest possible number of tiles, and the actual number.
    most, count = -(-M // tile) + min(E, M), tiles.sum()
    if part:
        slot = jnp.where(owner < E, slot, most * tile)
    experts = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(most), side="right")
    meeting = jnp.full(most * tile, M).at[slot].set(order, mode="drop")  # M marks padding

    # Each token k times, so that the backward pass sums its k gradients over an axis.
    copies = jnp.broadcast_to(x.reshape(-1, 1, D), (B * T, k, D)).reshape(-1, D)
    shares = route.shares.reshape(-1)
    if before:
        copies, shares = copies * shares[:, None].astype(x.dtype), jnp.ones_like(shares)
    back = jnp.zeros(M, slot.dtype).at[order].set(slot)
    copies = _permuted(copies, meeting, back)
    shares = _permuted(shares.astype(x.dtype), meeting, back)
    experts = jnp.minimum(experts, E - 1)
    if at_once:
        every = grouped.Tiles(experts, first_tile, tiles, count)
        how = every, tile, sharding.platform() == "cpu"  # kernels are interpreted on CPUs
        of_all = lambda w: grouped.Grouped(w, *how) if w.ndim else w
        made = _weighted(work, copies, shares, jax.tree.map(of_all, dict(weights)))
    else:
        made = _tile_by_tile(
            work, copies.reshape(most, tile, D), shares.reshape(most, tile), dict(weights),
            experts, count,
        ).reshape(-1, D)  # fmt: skip
    made = _permuted(made, back, meeting)
    return made.reshape(B, T, k, D).astype(jnp.float32).sum(2).astype(x.dtype)


@jax.custom_vjp
def _permuted(x: Array, to: Int[Array, " T"], back: Int[Array, " M"]) -> Array:
    """Gathers `x` at `to`, with zeros for indices past the end; `back` is the inverse map.

    With it the gradient is a gather too: GPUs scatter-add one number at a time.
    """
    return x.at[to].get(mode="fill", fill_value=0)


_permuted.defvjp(
    lambda x, to, back: (_permuted(x, to, back), back),
    lambda back, gradient: (gradient.at[back].get(mode="fill", fill_value=0), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tile_by_tile(
    work: Work,
    x: Float[Array, "I tile D"],
    shares: Float[Array, "I tile"],
    weights: dict[str, layers.Weight],
    experts: Int[Array, " I"],
    count: Int[Array, ""],
) -> Float[Array, "I tile D"]:
    """The output of each tile's expert, weighted by the tokens' shares; 0 from tile `count` on."""

    def one(i: Array | int, made: Array) -> Array:
        own = _of_expert(weights, experts[i])
        return made.at[i].set(_weighted(work, x[i], shares[i], own))

    return jax.lax.fori_loop(0, count, one, jnp.zeros_like(x))


def _of_expert(weights: PyTree, expert: Array) -> PyTree:
    """The weights of one expert; scalars are shared by all."""
    return jax.tree.map(lambda w: w[expert] if w.ndim else w, weights)


def _weighted(work: Work, x: Array, shares: Array, own: Weights) -> Array:
    return work(x, own) * shares[:, None]


def _forward(work: Work, *given: PyTree) -> tuple:
    """Separates weights that need no gradient, which the backward loop would sum in vain."""
    x, shares, weights, experts, count = jax.tree.map(lambda x: x.value, given)
    asked = jax.tree.map(lambda w: w.value if w.perturbed else None, given[2])
    others = jax.tree.map(lambda w: None if w.perturbed else w.value, given[2])
    made = _tile_by_tile(work, x, shares, weights, experts, count)
    return made, (x, shares, asked, others, experts, count)


def _backward(work: Work, kept: tuple, gradient: Array) -> tuple:
    """Loops over the tiles again, and adds to each expert's gradient in place, in float32."""
    x, shares, asked, others, experts, count = kept
    whole = lambda asked, others: jax.tree.map(
        lambda one, other: other if one is None else one, asked, others,
        is_leaf=lambda x: x is None,
    )  # fmt: skip

    def one(i: Array | int, sums: tuple) -> tuple:
        of_x, of_shares, of_weights = sums
        own, rest = (_of_expert(tree, experts[i]) for tree in (asked, others))
        again = lambda x, shares, own: _weighted(work, x, shares, whole(own, rest))
        _, pull = jax.vjp(again, x[i], shares[i], own)
        dx, dshares, down = pull(gradient[i])
        add = lambda total, new: total.at[experts[i]].add(new.astype(jnp.float32))
        added = jax.tree.map(add, of_weights, down)
        return of_x.at[i].set(dx), of_shares.at[i].set(dshares), added

    none = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), asked)
    start = jnp.zeros_like(x), jnp.zeros_like(shares), none
    of_x, of_shares, of_weights = jax.lax.fori_loop(0, count, one, start)
    narrow = jax.tree.map(lambda g, w: g.astype(w.dtype), of_weights, asked)
    return of_x, of_shares, narrow, None, None


_tile_by_tile.defvjp(_forward, _backward, symbolic_zeros=True)

"""Mixtures of experts without capacity: every token goes to its top k, however crowded they are.

Tokens are sorted by expert into tiles of one expert each, and an expert works on a tile at a time:
no token is dropped, so packing changes nothing, and nothing is multiplied by an expert that it has
not chosen. An expert's last tile is filled up with zeros; docs/models.md says how many products
that adds. The balance of the experts never changes what is returned.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from zoo.parts import adapted, layers, mlp, sharding

# Tokens of a tile: the power of two above an expert's share of them, within these bounds. Smaller
# ones would be filled up less, and read an expert's weights and add to its gradient more often.
SMALLEST, LARGEST = 8, 512

Weights = Mapping[str, Any]  # arrays, or those with adapters
# One expert's work: (its tokens, its own weights) -> its outputs.
Work = Callable[[Float[Array, "tile D"], Weights], Float[Array, "tile D"]]


# What a softmax or a sigmoid makes of a router's logits.
Scores = Callable[[Float[Array, "B T E"]], Float[Array, "B T E"]]

# How transformers 5 keeps the experts of a layer: a tensor, what it holds side by side of each, and
# which of its axes is as wide as the model.
IN_ONE_TENSOR = (
    ("mlp.experts.gate_up_proj",
     ("mlp.experts.{E}.gate_proj.weight", "mlp.experts.{E}.up_proj.weight"), 2),
    ("mlp.experts.down_proj", ("mlp.experts.{E}.down_proj.weight",), 1),
)  # fmt: skip


class Route(NamedTuple):
    """Which experts each token goes to, and their shares of the sum."""

    experts: Int[Array, "B T k"]
    shares: Float[Array, "B T k"]


class Choice(NamedTuple):
    """How a token chooses `each` of its experts, and what their shares are."""

    each: int
    to_one: bool  # the shares of the chosen sum to one, before the scale
    scores: Scores = jax.nn.softmax  # of the router's logits; shares are scores
    scale: float = 1.0
    added: float = 0.0  # to the sum that is brought to one
    # It chooses among the `kept` best of so many groups, as good as their `best` experts together.
    groups: int = 1
    kept: int = 1
    best: int = 2


def chosen(
    logits: Float[Array, "B T E"], choice: Choice, correction: Float[Array, " E"] | None = None
) -> Route:
    """The best experts of each token; a correction of the scores has a say in the choice alone.

    Source of groups and corrections: https://arxiv.org/abs/2412.19437, Eq. 13 to 16.
    """
    scores = choice.scores(logits.astype(jnp.float32))
    wanted = scores if correction is None else scores + correction
    if choice.kept < choice.groups:
        wanted = _of_best_groups(wanted, choice)
    _, experts = jax.lax.top_k(wanted, choice.each)
    shares = jnp.take_along_axis(scores, experts, axis=-1)
    if choice.to_one:
        shares = shares / (shares.sum(-1, keepdims=True) + choice.added)
    return Route(experts, shares * choice.scale)


def _of_best_groups(wanted: Float[Array, "B T E"], choice: Choice) -> Float[Array, "B T E"]:
    by_group = wanted.reshape(*wanted.shape[:2], choice.groups, -1)
    as_good_as = jax.lax.top_k(by_group, min(choice.best, by_group.shape[-1]))[0].sum(-1)
    _, kept = jax.lax.top_k(as_good_as, choice.kept)
    is_kept = (kept[..., None] == jnp.arange(choice.groups)).any(-2)
    return jnp.where(is_kept[..., None], by_group, -jnp.inf).reshape(wanted.shape)


def top_then_softmax(logits: Float[Array, "B T E"], k: int) -> Route:
    """Shares of a softmax over the chosen experts."""
    top, experts = jax.lax.top_k(logits, k)
    return Route(experts, jax.nn.softmax(top.astype(jnp.float32), axis=-1))


def logits(x: Float[Array, "B T D"], router: nnx.Param) -> Float[Array, "B T E"]:
    """A router's logits in float32, so that two passes in bfloat16 choose the same experts."""
    return layers.einsum("BTD,DE->BTE", x, router, out=jnp.float32)


class GatedExperts(nnx.Module):
    """Experts that are gated MLPs, and the router by which a token chooses among them.

    The correction of a router is a constant of the checkpoint. Checkpoints that hold all experts of
    a layer in one tensor hold gate and up together.
    """

    def __init__(
        self, sizes: Mapping[str, int], rngs: nnx.Rngs, choice: Choice,
        *, corrected: bool = False, together: bool = False,
    ):  # fmt: skip
        self.router = layers.weight("L D E", sizes, rngs)
        self.correction = layers.constant("L E", sizes) if corrected else None
        if together:
            self.gate_up = layers.weight("L E J D F", sizes, rngs)
        else:
            self.gate = layers.weight("L E D F", sizes, rngs)
            self.up = layers.weight("L E D F", sizes, rngs)
        self.down = layers.weight("L E F D", sizes, rngs)
        self.choice, self.together = choice, together

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        correction = None if self.correction is None else self.correction[...]
        route = chosen(logits(x, self.router), self.choice, correction)
        down = self.down[...], "E F D"
        if self.together:
            weights = {"gate_up": (self.gate_up[...], "E J D F"), "down": down}
            return mixed(x, route, weights, gated_together)
        weights = {"gate": (self.gate[...], "E D F"), "up": (self.up[...], "E D F"), "down": down}
        return mixed(x, route, weights, _gated)


class Shared(nnx.Module):
    """An expert that every token goes to, by a share that each token decides."""

    def __init__(self, sizes: Mapping[str, int], rngs: nnx.Rngs):
        self.mlp = mlp.GatedMlp(sizes, rngs)
        self.share = layers.weight("L D", sizes, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        share = jax.nn.sigmoid(layers.einsum("BTD,D->BT", x, self.share))
        return self.mlp(x) * share[..., None]


def _gated(x: Array, own: Weights) -> Array:
    bent = jax.nn.silu(layers.times("tD,DF->tF", x, own["gate"]))
    return layers.times("tF,FD->tD", bent * layers.times("tD,DF->tF", x, own["up"]), own["down"])


def gated_together(
    x: Float[Array, "tile D"], own: Weights, bent: Callable[[Array], Array] = jax.nn.silu
) -> Float[Array, "tile D"]:
    """One expert's work where gate and up are one weight."""
    gate, up = layers.times("tD,JDF->tJF", x, own["gate_up"]).swapaxes(0, 1)
    return layers.times("tF,FD->tD", bent(gate) * up, own["down"])


def mixed(
    x: Float[Array, "B T D"],
    route: Route,
    weights: Mapping[str, tuple[layers.Weight, str]],
    work: Work,
) -> Float[Array, "B T D"]:
    """The sum of the outputs of each token's experts, weighted by their shares.

    `weights` are given with their axes, which begin with E; `work` is given one expert's. Over
    `tensor` each device has a part of F: `work` must be a sum over F, and what is added to it (axes
    "E D") is added once.
    """
    ready = {name: layers.ready(w, axes, x.dtype) for name, (w, axes) in weights.items()}
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _here(x, route, ready, work=work)
    # XLA cannot split a sort: each device sorts its own tokens, and has its own part of F.
    rows = sharding.spec("B", x.shape[:1], mesh.shape)
    spec = lambda w, axes: sharding.spec(axes, w.shape, mesh.shape, sharding.GATHERED)
    split = {
        name: jax.tree.map(spec, ready[name], adapted.axes_of(w, axes))
        for name, (w, axes) in weights.items()
    }
    is_spec = lambda x: isinstance(x, jax.P)
    specs = jax.tree.leaves(split, is_leaf=is_spec)
    in_parts = any("tensor" in (axes or ()) for spec in specs for axes in spec)
    over = "tensor" if in_parts and mesh.shape["tensor"] > 1 else None

    def part(x: Array, route: Route, ready: Weights) -> Array:
        if not over:
            return _here(x, route, ready, work=work)
        first = jax.lax.axis_index(over) == 0
        once = {n: w * first if weights[n][1] == "E D" else w for n, w in ready.items()}
        return jax.lax.psum(_here(x, route, once, work=work), over)

    of_route: Any = (rows, rows)
    return jax.shard_map(
        part, in_specs=(rows, Route(*of_route), split), out_specs=rows, check_vma=False
    )(x, route, ready)


def _here(x: Array, route: Route, weights: Weights, *, work: Work) -> Array:
    """One device's tokens."""
    B, T, D = x.shape
    E, k = jax.tree.leaves(weights)[0].shape[0], route.experts.shape[-1]
    M = B * T * k  # meetings of a token with an expert
    tile = min(max(1 << (M // E).bit_length(), SMALLEST), LARGEST)
    chosen = route.experts.reshape(-1)
    counts = jnp.bincount(chosen, length=E)
    tiles = -(-counts // tile)
    first_tile, first_meeting = jnp.cumsum(tiles) - tiles, jnp.cumsum(counts) - counts
    order = jnp.argsort(chosen)  # meetings by expert
    owner = chosen[order]
    slot = first_tile[owner] * tile + jnp.arange(M) - first_meeting[owner]
    # As many tiles as there may be, and how many there are.
    most, count = -(-M // tile) + min(E, M), tiles.sum()
    experts = jnp.searchsorted(jnp.cumsum(tiles), jnp.arange(most), side="right")
    meeting = jnp.full(most * tile, M).at[slot].set(order)  # M: nobody's

    # Each token k times: in the backward pass its k gradients are summed side by side.
    copies = jnp.broadcast_to(x.reshape(-1, 1, D), (B * T, k, D)).reshape(-1, D)
    copies = jnp.concatenate([copies, jnp.zeros((1, D), x.dtype)])[meeting]
    shares = jnp.append(route.shares.reshape(-1), 0).astype(x.dtype)[meeting]
    made = _tile_by_tile(
        work, copies.reshape(most, tile, D), shares.reshape(most, tile), dict(weights),
        jnp.minimum(experts, E - 1), count,
    ).reshape(-1, D)  # fmt: skip
    back = made[jnp.zeros(M, slot.dtype).at[order].set(slot)]
    return back.reshape(B, T, k, D).astype(jnp.float32).sum(2).astype(x.dtype)


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
    """Its own weights; what has no axis is that of all."""
    return jax.tree.map(lambda w: w[expert] if w.ndim else w, weights)


def _weighted(work: Work, x: Array, shares: Array, own: Weights) -> Array:
    return work(x, own) * shares[:, None]


def _forward(work: Work, *given: PyTree) -> tuple:
    """Weights whose gradient nobody asks for are kept apart: their loop would add it up in vain."""
    x, shares, weights, experts, count = jax.tree.map(lambda x: x.value, given)
    asked = jax.tree.map(lambda w: w.value if w.perturbed else None, given[2])
    others = jax.tree.map(lambda w: None if w.perturbed else w.value, given[2])
    made = _tile_by_tile(work, x, shares, weights, experts, count)
    return made, (x, shares, asked, others, experts, count)


def _backward(work: Work, kept: tuple, gradient: Array) -> tuple:
    """Tile by tile again; the gradient of an expert is added to in its place, in float32."""
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

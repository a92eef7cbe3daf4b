"""Mixture of experts without a capacity limit: every token is routed to its top k experts.

No token is dropped, so neither packing nor the balance of the experts changes the outputs.
`tiles.py` computes the experts.
"""

from collections.abc import Callable, Mapping
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from zoo.parts import adapted, layers, mlp, sharding, tiles
from zoo.parts.tiles import Route, Weights, Work

# The function from router logits to scores: a softmax or a sigmoid.
Scores = Callable[[Float[Array, "B T E"]], Float[Array, "B T E"]]

# How transformers 5 stores the experts of a layer: the fused tensor, the per-expert weights that it
# concatenates, and which of its axes is D.
IN_ONE_TENSOR = (
    ("mlp.experts.gate_up_proj",
     ("mlp.experts.{E}.gate_proj.weight", "mlp.experts.{E}.up_proj.weight"), 2),
    ("mlp.experts.down_proj", ("mlp.experts.{E}.down_proj.weight",), 1),
)  # fmt: skip


def sigmoid(logits: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """The sigmoid as a plain `Scores` function: jitted ones cannot be pickled."""
    return jax.nn.sigmoid(logits)


class Choice(NamedTuple):
    """How a token chooses its experts, `each` in number, and how their outputs are weighted."""

    each: int
    to_one: bool  # normalise the shares of the chosen experts to sum to one, before the scale
    scores: Scores = jax.nn.softmax  # applied to the router's logits; gives the shares
    scale: float = 1.0
    added: float = 0.0  # added to the sum in that normalisation
    of_what_is_read: bool = False  # shares scale the experts' inputs instead of their outputs
    # Experts come from the `kept` best of `groups` groups, ranked by the sum of `best` experts.
    groups: int = 1
    kept: int = 1
    best: int = 2


def chosen(
    logits: Float[Array, "B T E"], choice: Choice, correction: Float[Array, " E"] | None = None
) -> Route:
    """Routes each token to its best experts; a correction affects the choice, not the shares.

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
    """Routes each token to its top k experts, with a softmax over only these as shares."""
    top, experts = jax.lax.top_k(logits, k)
    return Route(experts, jax.nn.softmax(top.astype(jnp.float32), axis=-1))


def logits(
    x: Float[Array, "B T D"], router: nnx.Param, *, wide: bool = False
) -> Float[Array, "B T E"]:
    """A router's logits in float32, so that two passes in bfloat16 choose the same experts.

    With `wide`, the router and its product are in float32 too.
    """
    x = x.astype(jnp.float32) if wide else x
    return layers.einsum("BTD,DE->BTE", x, router, out=jnp.float32)


class GatedExperts(nnx.Module):
    """Gated-MLP experts and their router.

    `corrected` routers have a correction, a constant of the checkpoint. `together` is for
    checkpoints that fuse gate and up, with all experts of a layer in one tensor. A `wide_router` is
    kept in float32, as transformers keeps modules of its `_keep_in_fp32_modules_strict`.
    """

    def __init__(
        self, sizes: Mapping[str, int], rngs: nnx.Rngs, choice: Choice,
        *, corrected: bool = False, together: bool = False, wide_router: bool = False,
    ):  # fmt: skip
        self.router = layers.router(sizes, rngs, wide=wide_router)
        self.correction = layers.constant("L E", sizes) if corrected else None
        if together:
            self.gate_up = layers.weight("L E J D F", sizes, rngs)
        else:
            self.gate = layers.weight("L E D F", sizes, rngs)
            self.up = layers.weight("L E D F", sizes, rngs)
        self.down = layers.weight("L E F D", sizes, rngs)
        self.choice, self.together, self.wide_router = choice, together, wide_router

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        correction = None if self.correction is None else self.correction[...]
        found = logits(x, self.router, wide=self.wide_router)
        route = chosen(found, self.choice, correction)
        mix = functools.partial(mixed, x, route, before=self.choice.of_what_is_read)
        down = self.down[...], "E F D"
        if self.together:
            weights = {"gate_up": (self.gate_up[...], "E J D F"), "down": down}
            return mix(weights, gated_together)
        weights = {"gate": (self.gate[...], "E D F"), "up": (self.up[...], "E D F"), "down": down}
        return mix(weights, _gated)


class Shared(nnx.Module):
    """A shared expert, which every token goes to, scaled by a learned sigmoid gate per token."""

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
    """Computes one gated expert whose gate and up projections are fused into one weight."""
    gate, up = layers.times("tD,JDF->tJF", x, own["gate_up"]).swapaxes(0, 1)
    return layers.times("tF,FD->tD", bent(gate) * up, own["down"])


def mixed(
    x: Float[Array, "B T D"],
    route: Route,
    weights: Mapping[str, tuple[layers.Weight, str]],
    work: Work,
    *,
    before: bool = False,
) -> Float[Array, "B T D"]:
    """The sum of the outputs of each token's experts, weighted by their shares.

    With `before`, shares scale the experts' inputs instead of their outputs. `weights` come with
    their axes, which begin with E; `work` gets those of one expert. The mesh axis `tensor` splits
    the experts, and each device computes the tokens routed to its own. If their number does not
    divide, it splits F of all experts instead: then `work` must be a sum over F, and biases of the
    output (axes "E D") are added on one device only.
    """
    ready = {name: layers.ready(w, axes, x.dtype) for name, (w, axes) in weights.items()}
    sizes = sharding.axes_here()
    here = functools.partial(tiles.gathered, work=work, before=before)
    if not sizes:
        return here(x, route, ready)
    # XLA cannot partition a sort, so each device sorts its own tokens.
    rows = sharding.spec("B T", x.shape[:2], sizes)
    spec = lambda w, axes: sharding.spec(axes, w.shape, sizes, sharding.GATHERED)
    split = {
        name: jax.tree.map(spec, ready[name], adapted.axes_of(w, axes))
        for name, (w, axes) in weights.items()
    }
    is_spec = lambda x: isinstance(x, jax.P)
    specs = jax.tree.leaves(split, is_leaf=is_spec)
    is_split = lambda axes: "tensor" in (axes or ()) and sizes["tensor"] > 1
    by_expert = any(is_split(spec[0]) for spec in specs if spec)
    by_width = any(is_split(axes) for spec in specs for axes in spec[1:])

    def part(x: Array, route: Route, ready: Weights) -> Array:
        if by_expert:
            own = functools.partial(here, part=tiles.Part("tensor", sizes["tensor"]))
            return jax.lax.psum(own(x, route, ready), "tensor")
        if by_width:
            first = jax.lax.axis_index("tensor") == 0
            once = {n: w * first if weights[n][1] == "E D" else w for n, w in ready.items()}
            return jax.lax.psum(here(x, route, once), "tensor")
        return here(x, route, ready)

    of_route: PyTree = (rows, rows)
    return sharding.on_each_device(part, (rows, Route(*of_route), split), rows)(x, route, ready)

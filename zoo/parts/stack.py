"""Stacks of blocks: the weights of like layers with a leading L, scanned, and the backward pass.

Layers are all alike, or of several kinds that follow each other in a pattern, each kind a stack of
its own. A scan goes over the repetitions of the pattern: what is compiled are the blocks of one
repetition, and it takes the same time for 2 of them and for 80.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from zoo.parts import adapted, hf_config, mixing, partly, pattern, sharding, spans

# What of a block is kept for the backward pass, beside the residual stream before it; the rest is
# recomputed. Less kept is less memory and more time.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}

Weights = dict[str, PyTree]  # arrays by name, each with a leading L
ByKind = dict[str, PyTree]  # something for each kind of layer

# (model, x, where, *shared, each=) -> x after the last block. `run`, or one that keeps the keys.
Run = Callable[..., Array]

STACKS = "blocks"  # the part of a model, and of its weights, that `run` goes through
ALIKE = ""  # the kind of every layer of a model whose layers are all alike


@runtime_checkable
class Stacked(Protocol):
    """What `run` asks of a model, as every CausalLM has it."""

    blocks: nnx.Module
    config: hf_config.Config
    attention: str | None
    remat: str


class Layout(NamedTuple):
    """What the blocks of each kind are, and in which order layers follow."""

    graphs: tuple[tuple[str, nnx.GraphDef], ...]
    parts: tuple[pattern.Part, ...]


def run(
    model: Stacked,
    x: Float[Array, "B T D"],
    where: spans.Spans,
    *shared: PyTree,
    each: PyTree = None,
    so_far: Weights | None = None,
) -> Float[Array, "B T D"]:
    """Applies the blocks of a model layer by layer: `x = block(x, attend, *shared)`.

    `shared` are pytrees that take no gradient; `each` is one with a leading L: what differs from
    layer to layer, and then the last argument of `block`. Where layers are of several kinds (see
    `Config.kinds`), it is by kind, for those that have something. `so_far` is a gradient, of all
    weights or of those that are trained, that fresh gradients are added to: differentiate by it,
    not by the weights, and what comes is their sum.
    With full remat it is added to in its place, layer by layer, so that a gradient of all layers
    exists once and not twice.
    """
    layout, weights = taken_apart(model)
    each = by_kind(model, each)
    shared = (mixing.Whole(where, model.attention), *shared)
    if so_far is not None:
        so_far = by_kind(model, so_far)
    by_number = so_far is not None or model.config.kinds or partly.any_in(weights)
    if model.remat == "full" and by_number:
        return _by_number(layout, x, weights, so_far, shared, each)
    if so_far is not None:
        weights = adapted.joined(_attached(adapted.part(weights, so_far), so_far), weights)
    return _scanned(layout, x, weights, shared, each, REMAT[model.remat])


def split(params: Weights) -> tuple[Weights, Weights | None]:
    """The weights of a model in two: the others, and its stacks, which `so_far` of `run` is like.

    The gradient of the others comes alone, that of the stacks as the sum; None: there are no
    stacks among them. `join` is the way back.
    """
    return {name: w for name, w in params.items() if name != STACKS}, params.get(STACKS)


def join(others: Weights, stacks: Weights | None) -> Weights:
    """The weights of a model again, from what `split` made of them."""
    return others if stacks is None else others | {STACKS: stacks}


def taken_apart(model: Stacked) -> tuple[Layout, ByKind]:
    """The layout of a model's blocks, and their weights by kind."""
    kinds = model.config.kinds or (ALIKE,) * model.config.sizes["L"]
    parts = {kind: nnx.split(block) for kind, block in by_kind(model, model.blocks).items()}
    graphs = tuple((kind, graph) for kind, (graph, _) in parts.items())
    weights = {kind: nnx.to_pure_dict(state) for kind, (_, state) in parts.items()}
    return Layout(graphs, pattern.schedule(kinds)), weights


def by_kind(model: Stacked, tree: PyTree) -> ByKind:
    """What is given for a model's layers, by kind: where all are alike there is one."""
    if not model.config.kinds:
        return {ALIKE: tree}
    return dict.fromkeys(model.config.kinds) | dict(tree or {})


def at(tree: PyTree, n: Array) -> PyTree:
    """One layer of what has a leading L."""

    def one(x: Any) -> Array:
        if isinstance(x, partly.Partly):
            return x.layer(n)
        return jax.lax.dynamic_index_in_dim(x, n, keepdims=False)

    return jax.tree.map(one, tree, is_leaf=partly.is_partly)


def through(layout: Layout, layer: Callable, carry: PyTree) -> tuple[PyTree, list]:
    """`carry, left = layer(carry, kind, n)` for every layer: the n-th of its kind.

    What they left comes too: of each part, for each place of its pattern, by repetition.
    """
    left = []
    for part in layout.parts:

        def repetition(counted: tuple, _: None, part: pattern.Part = part) -> tuple[tuple, list]:
            carry, i = counted
            some = []
            for kind, n in part.layers(i):
                carry, one = layer(carry, kind, n)
                some.append(one)
            return (carry, i + 1), some

        begin = (carry, jnp.zeros((), jnp.int32))
        (carry, _), some = jax.lax.scan(repetition, begin, length=part.times)
        left.append(some)
    return carry, left


def keeping(kept: list[Array]) -> Run:
    """A way through the blocks that puts into `kept` what enters each of them, [L, B, T, D]."""

    def run(
        model: Stacked,
        x: Float[Array, "B T D"],
        where: spans.Spans,
        *shared: PyTree,
        each: PyTree = None,
    ) -> Float[Array, "B T D"]:
        layout, weights = taken_apart(model)
        shared = (mixing.Whole(where, model.attention), *shared)
        x, (entering, *_) = _forward(layout, x, weights, None, shared, by_kind(model, each))
        for by_place in entering:  # of each part, by place in its pattern, by repetition
            in_order = jnp.stack(by_place, axis=1)
            kept.append(in_order.reshape(-1, *in_order.shape[2:]))
        return x

    return run


def block_of(graph: nnx.GraphDef, x: Array, weights: Weights, own: PyTree, shared: tuple) -> Array:
    """One layer: its weights, and what it has of its own, if anything."""
    block: Callable[..., Array] = nnx.merge(graph, nnx.State(weights))
    more = shared if own is None else (*shared, own)
    return sharding.constrain(block(x, *more), "B T D")


def _scanned(
    layout: Layout, x: Array, weights: ByKind, shared: tuple, each: ByKind, policy: Callable
) -> Array:
    """As jax differentiates it. Of a kind that several parts have, each part copies its weights."""
    graphs = dict(layout.graphs)

    def layer(x: Array, given: tuple, kind: str, place: int | None) -> Array:
        if place is not None:
            one = functools.partial(jax.lax.index_in_dim, index=place, keepdims=False)
            given = jax.tree.map(one, given)
        own, more = given
        return block_of(graphs[kind], x, own, more, shared)

    # Within what is recomputed, so that no layer's weights are kept for it a second time.
    layer = functools.partial(
        jax.checkpoint, prevent_cse=False, policy=policy, static_argnums=(2, 3)
    )(layer)
    for part in layout.parts:

        def repetition(x: Array, given: ByKind, part: pattern.Part = part) -> tuple[Array, None]:
            for kind, place in part.places():
                x = layer(x, given[kind], kind, place)
            return x, None

        cut = lambda kind, part=part: jax.tree.map(
            functools.partial(part.cut, kind), (weights[kind], each[kind])
        )
        x, _ = jax.lax.scan(repetition, x, {kind: cut(kind) for kind in set(part.kinds)})
    return x


@jax.custom_vjp
def _attached(trained: ByKind, so_far: ByKind) -> ByKind:
    return trained


_attached.defvjp(
    lambda trained, so_far: (trained, so_far),
    lambda so_far, gradient: (None, jax.tree.map(jnp.add, so_far, gradient)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_number(
    layout: Layout, x: Array, weights: ByKind, so_far: ByKind | None, shared: tuple, each: ByKind
) -> Array:
    """Each layer looked up by its number: no weights are copied, and gradients added in place.

    The gradient is that of `so_far`, and of the weights where there is none.
    """
    return _forward(layout, x, weights, so_far, shared, each)[0]


def _forward(
    layout: Layout, x: Array, weights: ByKind, so_far: ByKind | None, shared: tuple, each: ByKind
) -> tuple:
    graphs = dict(layout.graphs)

    def layer(x: Array, kind: str, i: Array) -> tuple[Array, Array]:
        return block_of(graphs[kind], x, at(weights[kind], i), at(each[kind], i), shared), x

    x, inputs = through(layout, layer, x)
    return x, (inputs, weights, so_far, shared, each)


def _backward(layout: Layout, kept: tuple, gradient: Array) -> tuple:
    inputs, weights, so_far, shared, each = kept
    graphs = dict(layout.graphs)
    sums = jax.tree.map(jnp.zeros_like, weights) if so_far is None else so_far

    def layer(carry: tuple, kind: str, n: Array, x: Array) -> tuple:
        gradient, sums = carry
        own, whole = at(each[kind], n), at(weights[kind], n)
        again = lambda x, some: block_of(graphs[kind], x, adapted.joined(some, whole), own, shared)
        _, pull = jax.vjp(again, x, adapted.part(whole, sums[kind]))
        gradient, fresh = pull(gradient)

        def add(sum_: Array, new: Array, of: Array | partly.Partly) -> Array:
            if isinstance(of, partly.Partly):
                return of.added(sum_, new, n)
            return jax.lax.dynamic_update_index_in_dim(sum_, at(sum_, n) + new, n, 0)

        whose = adapted.part(weights[kind], sums[kind])
        return gradient, sums | {kind: jax.tree.map(add, sums[kind], fresh, whose)}

    for part, entered in zip(reversed(layout.parts), reversed(inputs), strict=True):

        def repetition(
            carry: tuple, i: Array, part: pattern.Part = part, entered: list = entered
        ) -> tuple:
            for (kind, n), x in zip(reversed(part.layers(i)), reversed(entered), strict=True):
                carry = layer(carry, kind, n, at(x, i))
            return carry, None

        steps = jnp.arange(part.times)
        (gradient, sums), _ = jax.lax.scan(repetition, (gradient, sums), steps, reverse=True)
    if so_far is None:
        return gradient, sums, None, None, None
    return gradient, None, sums, None, None


_by_number.defvjp(_forward, _backward)

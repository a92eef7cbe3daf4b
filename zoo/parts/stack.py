"""Stacks of blocks: the weights of like layers with a leading L, scanned, and the backward pass.

Layers are all alike, or of several kinds that follow each other in a pattern, each kind a stack of
its own. A scan goes over the repetitions of the pattern: what is compiled are the blocks of one
repetition, and it takes the same time for 2 of them and for 80.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from zoo.parts import adapted, blocks, mixing, partly, pattern, spans

# What of a block is kept for the backward pass, beside the residual stream before it; the rest is
# recomputed. Less kept is less memory and more time.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}

# (model, x, where, *shared, each=, handed=) -> x after the last block: `run`, or one that keeps
# the keys.
Run = Callable[..., Array]

STACKS = "blocks"  # the part of a model, and of its weights, that `run` goes through


def run(
    model: blocks.Stacked,
    x: Float[Array, "B T D"],
    where: spans.Spans,
    *shared: PyTree,
    each: PyTree = None,
    handed: PyTree = None,
    so_far: blocks.Weights | None = None,
) -> Float[Array, "B T D"]:
    """Applies the blocks of a model layer by layer: `x = block(x, attend, *shared)`.

    `shared` are pytrees that take no gradient; `each` is one with a leading L: what differs from
    layer to layer, and then the last argument of `block`. Where layers are of several kinds (see
    `Config.kinds`), it is by kind, for those that have something. `handed` is what layers leave to
    later ones, as it is before the first: `x, handed = block(…, handed=handed)`; no layer may read
    what a later one still changes. `so_far` is a gradient, of all weights or of those that are
    trained, that fresh gradients are added to: differentiate by it, not by the weights, and what
    comes is their sum.
    With full remat it is added to in its place, layer by layer, so that a gradient of all layers
    exists once and not twice.
    """
    layout, weights = blocks.taken_apart(model)
    each = blocks.by_kind(model, each)
    shared = (mixing.Whole(where, model.attention), *shared)
    if so_far is not None:
        so_far = blocks.by_kind(model, so_far)
    by_number = so_far is not None or model.config.kinds or partly.any_in(weights)
    if model.remat == "full" and by_number:
        return _by_number(layout, (x, handed), weights, so_far, shared, each)
    if so_far is not None:
        weights = adapted.joined(_attached(adapted.part(weights, so_far), so_far), weights)
    return _scanned(layout, (x, handed), weights, shared, each, REMAT[model.remat])


def split(params: blocks.Weights) -> tuple[blocks.Weights, blocks.Weights | None]:
    """The weights of a model in two: the others, and its stacks, which `so_far` of `run` is like.

    The gradient of the others comes alone, that of the stacks as the sum; None: there are no
    stacks among them. `join` is the way back.
    """
    return {name: w for name, w in params.items() if name != STACKS}, params.get(STACKS)


def join(others: blocks.Weights, stacks: blocks.Weights | None) -> blocks.Weights:
    """The weights of a model again, from what `split` made of them."""
    return others if stacks is None else others | {STACKS: stacks}


def keeping(kept: list[Array]) -> Run:
    """A way through the blocks that puts into `kept` what enters each of them, [L, B, T, D]."""

    def run(
        model: blocks.Stacked,
        x: Float[Array, "B T D"],
        where: spans.Spans,
        *shared: PyTree,
        each: PyTree = None,
        handed: PyTree = None,
    ) -> Float[Array, "B T D"]:
        layout, weights = blocks.taken_apart(model)
        shared, each = (mixing.Whole(where, model.attention), *shared), blocks.by_kind(model, each)
        x, (entering, *_) = _forward(layout, (x, handed), weights, None, shared, each)
        for by_place in entering:  # of each part, by place in its pattern, by repetition
            in_order = jnp.stack(by_place, axis=1)
            kept.append(in_order.reshape(-1, *in_order.shape[2:]))
        return x

    return run


def _scanned(
    layout: blocks.Layout,
    entering: blocks.Entering,
    weights: blocks.ByKind,
    shared: tuple,
    each: blocks.ByKind,
    policy: Callable,
) -> Array:
    """As jax differentiates it. Of a kind that several parts have, each part copies its weights."""
    graphs = dict(layout.graphs)

    def layer(
        entering: blocks.Entering, given: tuple, kind: str, place: int | None
    ) -> blocks.Entering:
        if place is not None:
            one = functools.partial(jax.lax.index_in_dim, index=place, keepdims=False)
            given = jax.tree.map(one, given)
        own, more = given
        return blocks.block_of(graphs[kind], entering, own, more, shared)

    # Within what is recomputed, so that no layer's weights are kept for it a second time.
    layer = functools.partial(
        jax.checkpoint, prevent_cse=False, policy=policy, static_argnums=(2, 3)
    )(layer)
    for part in layout.parts:

        def repetition(
            entering: blocks.Entering, given: blocks.ByKind, part: pattern.Part = part
        ) -> tuple[blocks.Entering, None]:
            for kind, place in part.places():
                entering = layer(entering, given[kind], kind, place)
            return entering, None

        cut = lambda kind, part=part: jax.tree.map(
            functools.partial(part.cut, kind), (weights[kind], each[kind])
        )
        given = {kind: cut(kind) for kind in set(part.kinds)}
        entering, _ = jax.lax.scan(repetition, entering, given)
    return entering[0]


@jax.custom_vjp
def _attached(trained: blocks.ByKind, so_far: blocks.ByKind) -> blocks.ByKind:
    return trained


_attached.defvjp(
    lambda trained, so_far: (trained, so_far),
    lambda so_far, gradient: (None, jax.tree.map(jnp.add, so_far, gradient)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_number(
    layout: blocks.Layout,
    entering: blocks.Entering,
    weights: blocks.ByKind,
    so_far: blocks.ByKind | None,
    shared: tuple,
    each: blocks.ByKind,
) -> Array:
    """Each layer looked up by its number: no weights are copied, and gradients added in place.

    The gradient is that of `so_far`, and of the weights where there is none.
    """
    return _forward(layout, entering, weights, so_far, shared, each)[0]


def _forward(
    layout: blocks.Layout,
    entering: blocks.Entering,
    weights: blocks.ByKind,
    so_far: blocks.ByKind | None,
    shared: tuple,
    each: blocks.ByKind,
) -> tuple:
    graphs = dict(layout.graphs)

    def layer(entering: blocks.Entering, kind: str, i: Array) -> tuple[blocks.Entering, Array]:
        own = blocks.at(weights[kind], i), blocks.at(each[kind], i)
        return blocks.block_of(graphs[kind], entering, *own, shared), entering[0]

    (x, handed), inputs = blocks.through(layout, layer, entering)
    return x, (inputs, handed, weights, so_far, shared, each)


def _backward(layout: blocks.Layout, kept: tuple, gradient: Array) -> tuple:
    inputs, handed, weights, so_far, shared, each = kept
    graphs = dict(layout.graphs)
    sums = jax.tree.map(jnp.zeros_like, weights) if so_far is None else so_far
    # What layers have of their own takes a gradient if it is made of the model's numbers.
    of_each = {kind: jax.tree.map(jnp.zeros_like, tree) if _is_made(tree) else None
               for kind, tree in each.items()}  # fmt: skip

    def layer(carry: tuple, kind: str, n: Array, x: Array) -> tuple:
        gradient, sums, of_each = carry
        own, whole, is_made = (
            blocks.at(each[kind], n),
            blocks.at(weights[kind], n),
            _is_made(each[kind]),
        )

        def again(entering: blocks.Entering, some: PyTree, made: PyTree) -> blocks.Entering:
            given = adapted.joined(some, whole), made if is_made else own
            return blocks.block_of(graphs[kind], entering, *given, shared)

        # Each layer read what was handed to it as it is in the end, or not at all.
        some, made = adapted.part(whole, sums[kind]), own if is_made else None
        _, pull = jax.vjp(again, (x, handed), some, made)
        gradient, fresh, of_own = pull(gradient)
        put = lambda whole, new: jax.lax.dynamic_update_index_in_dim(whole, new, n, 0)
        of_each = of_each | {kind: jax.tree.map(put, of_each[kind], of_own)}

        def add(sum_: Array, new: Array, of: Array | partly.Partly) -> Array:
            if isinstance(of, partly.Partly):
                return of.added(sum_, new, n)
            return jax.lax.dynamic_update_index_in_dim(sum_, blocks.at(sum_, n) + new, n, 0)

        whose = adapted.part(weights[kind], sums[kind])
        return gradient, sums | {kind: jax.tree.map(add, sums[kind], fresh, whose)}, of_each

    carry: Any = (gradient, jax.tree.map(jnp.zeros_like, handed)), sums, of_each
    for part, entered in zip(reversed(layout.parts), reversed(inputs), strict=True):

        def repetition(
            carry: tuple, i: Array, part: pattern.Part = part, entered: list = entered
        ) -> tuple:
            for (kind, n), x in zip(reversed(part.layers(i)), reversed(entered), strict=True):
                carry = layer(carry, kind, n, blocks.at(x, i))
            return carry, None

        steps = jnp.arange(part.times)
        carry, _ = jax.lax.scan(repetition, carry, steps, reverse=True)
    gradient, sums, of_each = carry
    if so_far is None:
        return gradient, sums, None, None, of_each
    return gradient, None, sums, None, of_each


def _is_made(each: PyTree) -> bool:
    return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(each))


_by_number.defvjp(_forward, _backward)

"""Stacks of blocks: the weights of like layers with a leading L, scanned, and the backward pass.

Layers are all alike, or of several kinds that follow each other in a pattern, each kind a stack of
its own. A scan goes over the repetitions of the pattern: what is compiled are the blocks of one
repetition, and it takes the same time for 2 of them and for 80.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from checkpoints_io.errors import BadInput
from zoo.parts import adapted, blocks, mixing, partly, pattern, remat, spans

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
    It is added to in its place, layer by layer, so that a gradient of all layers exists once and
    not twice.
    """
    layout, weights, shared, each = _taken_apart(model, where, shared, each)
    if so_far is not None:
        so_far = blocks.by_kind(model, so_far)
    if model.remat not in remat.POLICIES:
        raise BadInput(f"remat={model.remat!r} is none of {', '.join(remat.POLICIES)}")
    is_plain = model.remat_layers is None and not model.config.kinds
    if so_far is None and is_plain and not partly.any_in(weights):
        return _scanned(layout, model.remat, (x, handed), weights, shared, each)
    keeps = remat.by_part(layout.parts, model.remat, model.remat_layers)
    layout = layout._replace(parts=tuple(part for part, _ in keeps))
    policies = tuple(policy for _, policy in keeps)
    return _by_number(layout, policies, (x, handed), weights, so_far, shared, each)


def _taken_apart(
    model: blocks.Stacked, where: spans.Spans, shared: tuple, each: PyTree
) -> tuple[blocks.Layout, blocks.ByKind, tuple, blocks.ByKind]:
    """The blocks of a model, and what they are given: `shared` begins with how they attend."""
    layout, weights = blocks.taken_apart(model)
    shared = (mixing.Whole(where, model.attention), *shared)
    return layout, weights, shared, blocks.by_kind(model, each)


def split(params: blocks.Weights) -> tuple[blocks.Weights, blocks.Weights | None]:
    """The weights of a model in two: the others, and its stacks, which `so_far` of `run` is like.

    The gradient of the others comes alone, that of the stacks as the sum; None: there are no
    stacks among them. `join` is the way back.
    """
    return {name: w for name, w in params.items() if name != STACKS}, params.get(STACKS)


def join(others: blocks.Weights, stacks: blocks.Weights | None) -> blocks.Weights:
    """The weights of a model again, from what `split` made of them."""
    return others if stacks is None else others | {STACKS: stacks}


def keeping(entered: list[Array]) -> Run:
    """A way through the blocks that puts into `entered` what enters each of them, [L, B, T, D]."""

    def run(
        model: blocks.Stacked,
        x: Float[Array, "B T D"],
        where: spans.Spans,
        *shared: PyTree,
        each: PyTree = None,
        handed: PyTree = None,
    ) -> Float[Array, "B T D"]:
        layout, weights, shared, each = _taken_apart(model, where, shared, each)
        x, (left, *_) = _forward(layout, None, (x, handed), weights, None, shared, each)
        for by_place in left:  # of each part, by place in its pattern, by repetition
            in_order = jnp.stack([entering for entering, _ in by_place], axis=1)
            entered.append(in_order.reshape(-1, *in_order.shape[2:]))
        return x

    return run


class Measured(NamedTuple):
    """What `measuring` found."""

    kept: dict[str, dict[str, list[Array]]]  # of one layer, by kind and by policy
    beside: list[Array]  # what layers have of their own, of all, and what they hand on


def measuring(found: Measured) -> Run:
    """A way past the blocks that puts into `found` what layers keep if each weight is trained."""

    def run(
        model: blocks.Stacked,
        x: Float[Array, "B T D"],
        where: spans.Spans,
        *shared: PyTree,
        each: PyTree = None,
        handed: PyTree = None,
    ) -> Float[Array, "B T D"]:
        layout, weights, shared, each = _taken_apart(model, where, shared, each)
        found.beside.extend(jax.tree.leaves((each, handed)))
        for kind, graph in layout.graphs:
            first = jnp.zeros((), jnp.int32)
            given = _given((x, handed), kind, first, weights, weights, each, shared)
            layer, arguments = given.through(graph)
            found.kept[kind] = {}
            for policy in remat.POLICIES:
                _, beside = remat.forward(layer, arguments, given, policy)
                found.kept[kind][policy] = beside.arrays if beside else []
        return x

    return run


def _scanned(
    layout: blocks.Layout,
    policy: str,
    entering: blocks.Entering,
    weights: blocks.ByKind,
    shared: tuple,
    each: blocks.ByKind,
) -> Array:
    """Layers that are all alike, as jax differentiates them, forward and backward."""
    ((kind, graph),) = layout.graphs

    def layer(entering: blocks.Entering, given: tuple) -> blocks.Entering:
        own, more = given
        return blocks.block_of(graph, entering, own, more, shared)

    # Within what is recomputed, so that no layer's weights are kept for it a second time.
    layer = jax.checkpoint(layer, prevent_cse=False, policy=remat.POLICIES[policy])
    step = lambda entering, given: (layer(entering, given), None)
    return jax.lax.scan(step, entering, (weights[kind], each[kind]))[0][0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_number(
    layout: blocks.Layout,
    policies: tuple[str, ...],
    entering: blocks.Entering,
    weights: blocks.ByKind,
    so_far: blocks.ByKind | None,
    shared: tuple,
    each: blocks.ByKind,
) -> Array:
    """Each layer looked up by its number: no weights are copied, and gradients added in place.

    The gradient is that of `so_far`, and of the weights where there is none.
    """
    return _forward(layout, None, entering, weights, so_far, shared, each)[0]


class _Given(NamedTuple):
    """What one layer is computed of."""

    entering: blocks.Entering
    some: PyTree  # those of its weights that are trained
    weights: PyTree
    each: PyTree
    shared: tuple

    def through(self, graph: nnx.GraphDef) -> tuple[Callable, tuple]:
        """The layer, as a function of what has a gradient; and that."""
        is_made = _is_made(self.each)

        def layer(entering: blocks.Entering, some: PyTree, made: PyTree) -> blocks.Entering:
            weights, own = adapted.joined(some, self.weights), made if is_made else self.each
            return blocks.block_of(graph, entering, weights, own, self.shared)

        return layer, (self.entering, self.some, self.each if is_made else None)


def _given(
    entering: blocks.Entering,
    kind: str,
    n: Array,
    weights: blocks.ByKind,
    trained: blocks.ByKind,
    each: blocks.ByKind,
    shared: tuple,
) -> _Given:
    """Layer n of its kind; `trained` are like those of the weights that take a gradient."""
    whole = blocks.at(weights[kind], n)
    some = adapted.part(whole, trained[kind])
    return _Given(entering, some, whole, blocks.at(each[kind], n), shared)


def _forward(
    layout: blocks.Layout,
    policies: tuple[str, ...] | None,
    entering: blocks.Entering,
    weights: blocks.ByKind,
    so_far: blocks.ByKind | None,
    shared: tuple,
    each: blocks.ByKind,
) -> tuple:
    """What comes out, and what the backward pass takes; without `policies` there is none."""
    graphs, trained = dict(layout.graphs), weights if so_far is None else so_far

    def layer(
        policy: str, entering: blocks.Entering, kind: str, n: Array
    ) -> tuple[blocks.Entering, tuple]:
        given = _given(entering, kind, n, weights, trained, each, shared)
        function, arguments = given.through(graphs[kind])
        leaving, beside = remat.forward(function, arguments, given, policy)
        return leaving, (entering[0], beside)

    left = []
    for part, policy in zip(layout.parts, policies or ("full",) * len(layout.parts), strict=True):
        own = layout._replace(parts=(part,))
        entering, of_places = blocks.through(own, functools.partial(layer, policy), entering)
        left += of_places
    x, handed = entering
    return x, (left, handed, weights, so_far, shared, each)


def _backward(
    layout: blocks.Layout, policies: tuple[str, ...], saved: tuple, gradient: Array
) -> tuple:
    del policies  # they are in what was saved
    left, handed, weights, so_far, shared, each = saved
    graphs, trained = dict(layout.graphs), weights if so_far is None else so_far
    sums = jax.tree.map(jnp.zeros_like, weights) if so_far is None else so_far
    of_each = {kind: jax.tree.map(jnp.zeros_like, tree) if _is_made(tree) else None
               for kind, tree in each.items()}  # fmt: skip

    def layer(carry: tuple, kind: str, n: Array, left: tuple) -> tuple:
        gradient, sums, of_each = carry
        x, beside = left
        # Each layer read what was handed to it as it is in the end, or not at all.
        given = _given((x, handed), kind, n, weights, trained, each, shared)
        pull = remat.backward(*given.through(graphs[kind]), given, beside)
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
    for part, of_places in zip(reversed(layout.parts), reversed(left), strict=True):

        def repetition(
            carry: tuple, i: Array, part: pattern.Part = part, of_places: list = of_places
        ) -> tuple:
            for (kind, n), own in zip(reversed(part.layers(i)), reversed(of_places), strict=True):
                own, (gradient, *rest) = blocks.at(own, i), carry
                if part.times == 1:  # XLA unrolls a loop of one, and would keep its forward pass
                    own, gradient = jax.lax.optimization_barrier((own, gradient))
                carry = layer((gradient, *rest), kind, n, own)
            return carry, None

        steps = jnp.arange(part.times)
        carry, _ = jax.lax.scan(repetition, carry, steps, reverse=True)
    gradient, sums, of_each = carry
    if so_far is None:
        return gradient, sums, None, None, of_each
    return gradient, None, sums, None, of_each


def _is_made(each: PyTree) -> bool:
    """Does what layers have of their own take a gradient: is it made of the model's numbers?"""
    return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(each))


_by_number.defvjp(_forward, _backward)

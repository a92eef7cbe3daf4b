"""Scans over stacked blocks, whose weights have a leading L axis, and their backward pass.

The layers are all alike, or of several kinds that repeat in a pattern, with one stack per kind. The
scan goes over the repetitions of the pattern, so only one repetition is compiled: compiling takes
the same time for 2 repetitions as for 80.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from checkpoints_io.errors import BadInput
from zoo.parts import adapted, blocks, mixing, partly, pattern, remat, spans

# (model, x, where, *shared, each=, handed=) -> x after the last block: `run`, or a variant that
# fills the KV cache.
Run = Callable[..., Array]

STACKS = "blocks"  # the attribute of a model, and the key of its weights, that `run` scans over


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

    `shared` are pytrees that take no gradient. `each` is a pytree with a leading L axis that holds
    per-layer inputs, passed as the last argument of `block`; with several kinds of layers (see
    `Config.kinds`) it is a dict by kind. `handed` is the initial value of what layers pass on to
    later ones: `x, handed = block(…, handed=handed)`; no layer may read what a later one still
    changes. `so_far` is an accumulated gradient, of all weights or of the trained ones:
    differentiate with respect to it, not to the weights, and the result is the sum.
    It is updated in place, layer by layer, so that only one gradient of all layers exists at a
    time.
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
    """Takes the blocks of a model apart, and puts the attention inputs first in `shared`."""
    layout, weights = blocks.taken_apart(model)
    shared = (mixing.Whole(where, model.attention), *shared)
    return layout, weights, shared, blocks.by_kind(model, each)


def split(params: blocks.Weights) -> tuple[blocks.Weights, blocks.Weights | None]:
    """Splits weights into those outside the blocks and the stacks, for `so_far` of `run`.

    The gradient of the former is returned as it is, that of the stacks as the accumulated sum. The
    second part is None if there are no stacks. `join` is the inverse.
    """
    return {name: w for name, w in params.items() if name != STACKS}, params.get(STACKS)


def join(others: blocks.Weights, stacks: blocks.Weights | None) -> blocks.Weights:
    """The inverse of `split`: puts the weights of a model back together."""
    return others if stacks is None else others | {STACKS: stacks}


def keeping(entered: list[Array]) -> Run:
    """A variant of `run` that appends the input of every block to `entered`, [L, B, T, D]."""

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
        for by_place in left:  # indexed by part, place in the pattern, then repetition
            in_order = jnp.stack([entering for entering, _ in by_place], axis=1)
            entered.append(in_order.reshape(-1, *in_order.shape[2:]))
        return x

    return run


class Measured(NamedTuple):
    """The arrays that `measuring` found."""

    kept: dict[str, dict[str, list[Array]]]  # residuals of one layer, by kind and remat policy
    beside: list[Array]  # the `each` of all layers, and `handed`


def measuring(found: Measured) -> Run:
    """A stand-in for `run` that records what layers would save if all weights were trained."""

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
    """Scans over layers that are all alike, and leaves the backward pass to JAX."""
    ((kind, graph),) = layout.graphs

    def layer(entering: blocks.Entering, given: tuple) -> blocks.Entering:
        own, more = given
        return blocks.block_of(graph, entering, own, more, shared)

    # The weights are indexed inside the checkpoint, so that no layer's weights are saved twice.
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
    """Indexes each layer by its number: copies no weights, and adds gradients in place.

    The gradient is with respect to `so_far`, or to the weights if that is None.
    """
    return _forward(layout, None, entering, weights, so_far, shared, each)[0]


class _Given(NamedTuple):
    """The inputs of one layer."""

    entering: blocks.Entering
    some: PyTree  # its trained weights
    weights: PyTree
    each: PyTree
    shared: tuple

    def through(self, graph: nnx.GraphDef) -> tuple[Callable, tuple]:
        """The layer as a function of its differentiable inputs, and those inputs."""
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
    """The inputs of layer n of its kind; `trained` has the structure of the trained weights."""
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
    """Returns the output and the residuals of the backward pass (none without `policies`)."""
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
    del policies  # the residuals already depend on them
    left, handed, weights, so_far, shared, each = saved
    graphs, trained = dict(layout.graphs), weights if so_far is None else so_far
    sums = jax.tree.map(jnp.zeros_like, weights) if so_far is None else so_far
    of_each = {kind: jax.tree.map(jnp.zeros_like, tree) if _is_made(tree) else None
               for kind, tree in each.items()}  # fmt: skip

    def layer(carry: tuple, kind: str, n: Array, left: tuple) -> tuple:
        gradient, sums, of_each = carry
        x, beside = left
        # A layer read `handed` in its final state or not at all, so the final state serves here.
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

    carry: PyTree = (gradient, jax.tree.map(jnp.zeros_like, handed)), sums, of_each
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
    """Whether the per-layer inputs take a gradient: they do if they hold floats."""
    return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(each))


_by_number.defvjp(_forward, _backward)

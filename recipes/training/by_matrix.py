"""Muon and Adafactor, which see matrices: each layer's, and each expert's, on its own.

Weights are stacks: "L D N H" is L matrices from D to N x H, and what stands side by side in one
tensor (J: gate and up, or q, k and v) is several. Taken as one array of four axes, a stack would be
orthogonalised across its layers, and its second moments be factored over L or H.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import optax

# The root mean square of an update, which is about AdamW's: one learning rate serves both.
MUON_RMS = 0.2
# An update of Adafactor has at most this root mean square.
ADAFACTOR_RMS = 1.0


class Sides(NamedTuple):
    """Which axes of a weight are summed over in its product, and which are made.

    All other axes count matrices. A vector is a matrix of one row.
    """

    into: tuple[int, ...]
    out: tuple[int, ...]
    hidden: bool  # a matrix of the layers: not an embedding, a head, a norm or a bias


class Parted(NamedTuple):
    """The state of Muon: each tree has the weights of its kind, and None in place of the others."""

    hidden: PyTree  # of Muon
    others: PyTree  # of AdamW


def sides(axes: str, into: str, out: str, *, hidden: bool) -> Sides:
    """`sides("L D N H", "D", "N H", hidden=True)` is `Sides((1,), (2, 3), True)`."""
    letters = axes.split()
    where = lambda side: tuple(letters.index(letter) for letter in side.split())
    return Sides(where(into), where(out), hidden)


def of_vector(axes: str) -> Sides:
    """`Sides` of a norm, a bias or sinks: a vector per layer, and per expert if it has one.

    A number of each layer is a vector of one.
    """
    own = [letter for letter in axes.split() if letter not in "LJ"]
    if own[:1] == ["E"] and len(own) > 1:  # alone it is a router's bias
        own = own[1:]
    return sides(axes, "", " ".join(own), hidden=False)


def is_sides(value: object) -> bool:
    """Whether a value is `Sides`, which say how a weight is matrices."""
    return isinstance(value, Sides)


def cut(x: Float[Array, "..."], of: Sides) -> Float[Array, "B into out"]:
    """A weight as the list of its matrices."""
    order = _order(x.ndim, of)
    rows, columns = (math.prod(x.shape[i] for i in side) for side in (of.into, of.out))
    return x.transpose(order).reshape(-1, rows, columns)


def together(
    matrices: Float[Array, "B into out"], of: Sides, shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """A weight of this shape from the list of its matrices."""
    order = _order(len(shape), of)
    back = sorted(range(len(shape)), key=order.__getitem__)
    return matrices.reshape([shape[i] for i in order]).transpose(back)


def _order(count: int, of: Sides) -> tuple[int, ...]:
    lead = (i for i in range(count) if i not in of.into + of.out)
    return (*lead, *of.into, *of.out)


def scale_by_muon(
    sides: PyTree,
    others: optax.GradientTransformation,
    mu_dtype: jax.typing.DTypeLike,
    *,
    max_norm: float | None,
) -> optax.GradientTransformation:
    """Optax's Muon for the matrices of the layers, and `others` for all else.

    Gradients are clipped to a global norm here: beforehand, a clip would be a copy of them all.

    Momentum 0.95, Nesterov's; five steps of Newton and Schulz. An update is scaled by
    0.2 sqrt(max(into, out)), so that learning rate and weight decay are those of AdamW.

    Source: https://kellerjordan.github.io/posts/muon; the scale: Eq. 4 of
    https://arxiv.org/abs/2502.16982.
    """
    # Its own `muon` would decay norms too, and take all layers of all weights at a time.
    muon: Any = optax.contrib.scale_by_muon(mu_dtype=mu_dtype)
    turned = jax.tree.map(lambda of: of if of.hidden else None, sides, is_leaf=is_sides)

    def part(tree: PyTree, *, hidden: bool) -> PyTree:
        if not jax.tree.leaves(tree):  # optax asks what the state is like
            return tree
        return jax.tree.map(lambda x, of: x if of.hidden == hidden else None, tree, sides)

    def init(params: PyTree) -> Parted:
        return Parted(muon.init(part(params, hidden=True)), others.init(part(params, hidden=False)))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params
        before, by = state.hidden, _shrunk(updates, max_norm)

        def of_matrix(gradient: Array, mu: Array) -> tuple:
            change, after = muon.update(by * gradient, before._replace(mu=mu))
            return MUON_RMS * math.sqrt(max(gradient.shape)) * change, after.mu

        def of_layer(of: Sides, gradient: Array, mu: Array) -> tuple[Array, ...]:
            found = jax.vmap(of_matrix)(cut(gradient, of), cut(mu, of))
            return tuple(together(x, of, gradient.shape) for x in found)

        each = functools.partial(_by_layer, of_layer)
        changes, mu = _parts(each, part(updates, hidden=True), turned, before.mu)
        hidden = before._replace(count=optax.safe_increment(before.count), mu=mu)
        left = jax.tree.map(lambda x: by * x, part(updates, hidden=False))
        rest, other = others.update(left, state.others)
        mine = lambda of, one, two: one if of.hidden else two
        return jax.tree.map(mine, sides, changes, rest, is_leaf=is_sides), Parted(hidden, other)

    return optax.GradientTransformation(init, update)


def scale_by_adafactor(sides: PyTree, *, max_norm: float | None) -> optax.GradientTransformation:
    """Optax's factored second moments, and its clip of an update, for each matrix.

    Gradients are clipped to a global norm here, as for Muon.

    A matrix with a side below 128 keeps its second moment whole, as a vector does. There is no
    momentum, and no scale by the size of the weights: the learning rate is the size of a step, as
    in the Trainer of transformers.

    Source: https://arxiv.org/abs/1804.04235, Algorithm 4.
    """
    factored: Any = optax.scale_by_factored_rms()
    clip = optax.clip_by_block_rms(ADAFACTOR_RMS)

    def of_layer(of: Sides, x: Array) -> tuple[Array, Array, Array]:
        return _kept(jax.vmap(factored.init)(cut(x, of)), of, x.shape)

    def init(params: PyTree) -> optax.FactoredState:
        begun = factored.init(params)
        if not jax.tree.leaves(params):  # optax asks what the state is like
            return begun
        each = lambda x, of: (
            jax.vmap(functools.partial(of_layer, _of_layer(of)))(x)
            if _is_stacked(of)
            else of_layer(of, x)
        )
        return optax.FactoredState(begun.count, *_parts(each, params, sides))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params
        by = _shrunk(updates, max_norm)

        def of_matrix(gradient: Array, *moments: Array) -> tuple:
            # Of the weight it would only ask the shape.
            before = optax.FactoredState(state.count, *moments)
            change, after = factored.update(by * gradient, before, gradient)
            return clip.update(change, optax.EmptyState())[0], after

        def of_layer(of: Sides, gradient: Array, row: Array, column: Array, whole: Array) -> tuple:
            shape = gradient.shape
            whole = cut(whole, of) if whole.shape == shape else whole
            change, after = jax.vmap(of_matrix)(cut(gradient, of), row, column, whole)
            return together(change, of, shape), *_kept(after, of, shape)

        each = functools.partial(_by_layer, of_layer)
        moments = state.v_row, state.v_col, state.v
        changes, *moments = _parts(each, updates, sides, *moments)
        return changes, optax.FactoredState(optax.safe_increment(state.count), *moments)

    return optax.GradientTransformation(init, update)


def _shrunk(gradients: PyTree, max_norm: float | None) -> Float[Array, ""] | float:
    """What a clip of the global norm multiplies gradients by."""
    return 1.0 if max_norm is None else jnp.minimum(1, max_norm / optax.tree.norm(gradients))


def _kept(state: PyTree, of: Sides, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """The moments of matrices; those that are not factored in the shape of the weight."""
    whole = together(state.v, of, shape) if state.v.ndim == 3 else state.v
    return state.v_row, state.v_col, whole


def _by_layer(of_layer: Callable, gradient: Array, of: Sides, *moments: Array) -> tuple:
    """The change of a weight and its next moments, renewed layer by layer in their place.

    What a step works with is then that of one layer, however many there are.
    """
    if not _is_stacked(of):
        return of_layer(of, gradient, *moments)
    at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    put = lambda x, new, i: jax.lax.dynamic_update_index_in_dim(x, new, i, 0)

    def one(i: Array, kept: tuple) -> tuple:
        now = of_layer(_of_layer(of), at(gradient, i), *(at(x, i) for x in kept[1:]))
        return tuple(put(x, new, i) for x, new in zip(kept, now, strict=True))

    return jax.lax.fori_loop(0, len(gradient), one, (jnp.zeros_like(gradient), *moments))


def _is_stacked(of: Sides) -> bool:
    """Whether the first axis counts layers."""
    return 0 not in of.into + of.out


def _of_layer(of: Sides) -> Sides:
    less = lambda side: tuple(i - 1 for i in side)
    return of._replace(into=less(of.into), out=less(of.out))


def _parts(each: Callable[..., tuple], tree: PyTree, *others: PyTree) -> list[PyTree]:
    """What a function gives for each leaf, and the subtrees in its place: a tree of each part."""
    flat, structure = jax.tree.flatten(tree)
    beside = map(structure.flatten_up_to, others)
    found = [each(*one) for one in zip(flat, *beside, strict=True)]
    return [structure.unflatten(some) for some in zip(*found, strict=True)]

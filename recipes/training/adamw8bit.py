"""AdamW whose moments of matrices take 8 bits a number: 2 bytes a weight where there were 8.

A moment is cut along its last axis into blocks, and a number x of a block whose largest is s is
kept as the whole number nearest to top * (|x| / s)^(1/4), with its sign. Each decade below s has
then nearly as many levels as in the dynamic map of bitsandbytes (55, 31, 17, 10 … of a first
moment; 64, 32, 16, 8 … there), and no table is looked up. A step is taken from the moments as they
are kept. They are renewed layer by layer, in their place: the moments of all weights, or of all
layers of one, never exist in float32.

Source: block-wise 8-bit optimizers, https://arxiv.org/abs/2110.02861.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import optax

# Numbers of a block: as many as divide the last axis, between these. A scale is 4 bytes a block.
LEAST, MOST = 16, 128
# A last axis may be split over so many devices, with whole blocks on each, where it is long enough.
PARTS = 8
# Smaller weights keep their moments in float32, as those of bitsandbytes do.
SMALL = 4096


class Blocks(NamedTuple):
    """A moment in 8 bits."""

    codes: Int[Array, "..."]  # in the shape of the weight: int8, or uint8 where nothing is below 0
    largest: Float[Array, "..."]  # of each block; the last axis counts blocks


def is_blocks(value: object) -> bool:
    """Whether a moment is in 8 bits."""
    return isinstance(value, Blocks)


def block(size: int) -> int | None:
    """The length of the blocks of a last axis: its largest divisor that may be one."""
    part = size // PARTS if size % PARTS == 0 else 0
    return _divisor(part, MOST // 2, MOST) or _divisor(size, LEAST, MOST)


def narrow(x: Float[Array, "..."], *, signed: bool) -> Blocks:
    """Rounds numbers to the nearest code.

    Of a second moment what is not 0 does not become it: a step that is divided by its root would
    be a step without bounds.
    """
    cut = x.reshape(*x.shape[:-1], -1, block(x.shape[-1]))
    largest = jnp.abs(cut).max(-1)
    share = jnp.abs(cut) / jnp.where(largest > 0, largest, 1)[..., None]
    codes = jnp.round((127 if signed else 255) * jnp.sqrt(jnp.sqrt(jnp.minimum(share, 1))))
    codes = codes.reshape(x.shape)
    if signed:
        return Blocks((jnp.sign(x) * codes).astype(jnp.int8), largest)
    return Blocks(jnp.where(x > 0, jnp.maximum(codes, 1), 0).astype(jnp.uint8), largest)


def widened(kept: Blocks) -> Float[Array, "..."]:
    """The numbers that codes stand for, in float32."""
    codes, largest = kept
    signed = codes.dtype == jnp.int8
    cut = codes.reshape(*largest.shape, -1).astype(jnp.float32) / (127 if signed else 255)
    return (jnp.sign(cut) * cut**4 * largest[..., None]).reshape(codes.shape)


def scale_by_adam(
    b1: float, b2: float, eps: float, *, max_norm: float | None, matrices: PyTree
) -> optax.GradientTransformation:
    """Optax's scale_by_adam with the moments of matrices (a tree of bools says which) in 8 bits.

    Gradients are clipped to a global norm here: beforehand, a clip would be a copy of them all.
    """
    exact = optax.scale_by_adam(b1, b2, eps)

    def init(params: PyTree) -> PyTree:
        begun: PyTree = exact.init(params)
        if not jax.tree.leaves(params):  # optax asks what the state is like
            return begun
        kept = lambda x, is_matrix, signed: (
            narrow(x, signed=signed) if is_matrix and _is_large(x) else x
        )
        mu = jax.tree.map(functools.partial(kept, signed=True), begun.mu, matrices)
        nu = jax.tree.map(functools.partial(kept, signed=False), begun.nu, matrices)
        return begun._replace(mu=mu, nu=nu)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params
        by = 1.0 if max_norm is None else jnp.minimum(1, max_norm / optax.tree.norm(updates))

        def moments(gradient: Array, mu: PyTree, nu: PyTree) -> tuple:
            gradient = gradient * by
            first = b1 * _wide(mu) + (1 - b1) * gradient
            second = b2 * _wide(nu) + (1 - b2) * jnp.square(gradient)
            if not is_blocks(mu):
                return first, second
            return narrow(first, signed=True), narrow(second, signed=False)

        def step(mu: PyTree, nu: PyTree) -> Array:
            root = jnp.sqrt(_wide(nu) / (1 - b2**count))
            return _wide(mu) / (1 - b1**count) / (root + eps)

        count = optax.safe_increment(state.count)
        flat, tree = jax.tree.flatten(updates)
        kept = zip(flat, *map(tree.flatten_up_to, (state.mu, state.nu)), strict=True)
        renewed = [_in_place(moments, *one) if is_blocks(one[1]) else moments(*one) for one in kept]
        mu, nu = (tree.unflatten(list(some)) for some in zip(*renewed, strict=True))
        changes = tree.unflatten([step(*one) for one in renewed])
        return changes, state._replace(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _in_place(moments: PyTree, gradient: Array, mu: Blocks, nu: Blocks) -> tuple[Blocks, Blocks]:
    """Updates moments layer by layer, or without layers by groups of rows that lie apart.

    This way every device has its part of each, whichever axes are split.
    """
    shape, axis = gradient.shape, 0
    if len(shape) < 3:
        groups = _divisor(shape[0], 1, 64) if len(shape) == 2 else None
        shape, axis = (shape[0] // (groups or 1), groups or 1, *shape[1:]), 1
    cut = lambda x: x.reshape(*shape[:-1], -1)
    at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
    put = lambda x, new, i: jax.lax.dynamic_update_index_in_dim(x, new, i, axis)
    whole = cut(gradient)

    def one(i: Array, kept: tuple) -> tuple:
        now = moments(at(whole, i), *jax.tree.map(lambda x: at(x, i), kept))
        return jax.tree.map(lambda x, new: put(x, new, i), kept, now)

    renewed = jax.lax.fori_loop(0, shape[axis], one, jax.tree.map(cut, (mu, nu)))
    return jax.tree.map(lambda x, like: x.reshape(like.shape), renewed, (mu, nu))


def _wide(moment: PyTree) -> Array:
    return widened(moment) if is_blocks(moment) else moment


def _is_large(x: Array) -> bool:
    return x.ndim > 1 and x.size >= SMALL and block(x.shape[-1]) is not None


def _divisor(size: int, least: int, most: int) -> int | None:
    """The largest divisor within these bounds."""
    return next((n for n in range(min(size, most), least - 1, -1) if size % n == 0), None)

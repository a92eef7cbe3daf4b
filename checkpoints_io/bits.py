"""Arrays identified by their bits, independently of files, sharding and devices."""

import functools
import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, UInt32
import numpy as np


def fingerprint(tree: PyTree, dtype: jax.typing.DTypeLike | None = None) -> str:
    """Sixteen hex digits that change with any bit of any array, and with its place in the tree.

    They are computed on the arrays' own devices, reading each array once, after a cast to `dtype`
    if one is given.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    to = [np.dtype(dtype or value.dtype) for _, value in leaves]
    # Start all of them before waiting for any.
    sums = [_bit_sums(value, one) for (_, value), one in zip(leaves, to, strict=True)]
    digest = hashlib.sha256()
    for (path, value), one, found in zip(leaves, to, sums, strict=True):
        place = f"{jax.tree_util.keystr(path)}{value.shape}{one}"
        digest.update(place.encode() + np.asarray(found).tobytes())
    return digest.hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=1)
def finite(value: PyTree, leading: int) -> Bool[Array, "..."]:
    """Whether each part of an array, indexed by its first `leading` axes, has no NaN or infinity.

    Given several arrays, a part is finite if it is finite in all of them.
    """
    own = lambda x: jnp.isfinite(x).all(axis=tuple(range(leading, x.ndim)))
    return functools.reduce(jnp.logical_and, map(own, jax.tree.leaves(value)))


@functools.partial(jax.jit, static_argnums=1)
def _bit_sums(value: Array, dtype: np.dtype) -> UInt32[Array, " 2"]:
    """Two integer sums of the bits, weighted by hashes of the index; order does not matter."""
    value = value.astype(dtype)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[value.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(value, unsigned).astype(jnp.uint32)
    index = jnp.zeros(value.shape, jnp.uint32)
    for axis, size in enumerate(value.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, value.shape, axis)
    sums = []
    for odd in (0x9E3779B1, 0x85EBCA77):
        mixed = (index + 1) * jnp.uint32(odd)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D) | 1
        sums.append((bits * mixed).sum(dtype=jnp.uint32))
    return jnp.stack(sums)

"""LoRA and DoRA: a frozen weight together with its low-rank adapter.

The value of a parameter may be an `Adapted` in place of an array: a scan over layers slices each of
its arrays, a product adds the low-rank path, and no architecture needs to know. Only its `Adapter`
is trained; `joined` puts a tree of trained adapters into the tree of all weights.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from zoo.parts import partly

RANK = "r"  # in equations, where R may be the rank of a latent


class Adapter(NamedTuple):
    """The trained part of an adapted weight."""

    a: PyTree  # [L, into, R]
    b: PyTree  # [L, R, out]
    magnitude: PyTree = None  # [L, out], for DoRA: the norm of each output's weights


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "scale", "adapter"),
    meta_fields=("ranks", "axes", "into", "out"),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """The weight W + scale · A B of every layer, renormalised by a magnitude if there is one.

    `into` are the input axes of the product and `out` its output axes ("D" and "N H" for a query),
    each in the order of the Hugging Face file.

    Source: LoRA, https://arxiv.org/abs/2106.09685; DoRA, https://arxiv.org/abs/2402.09353, Eq. 5.
    """

    # Typed Any, for JAX puts shapes and its own sentinels in their places.
    base: PyTree  # [L, ...]: an array, or an object whose `astype` gives one
    scale: PyTree  # [L], float32: 0 turns the adapter of a layer off, including its magnitude
    adapter: PyTree  # an Adapter; None in a tree of frozen weights
    ranks: tuple[int, ...]  # of each layer: A and B are 0 beyond it
    axes: str  # of one layer of the base
    into: str
    out: str

    @property
    def size(self) -> int:
        """Of the base."""
        return self.base.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Of the base."""
        return self.base.dtype

    def __getitem__(self, index: Any) -> Any:
        """Returns itself for `...`; for a layer number that layer's weight, merged in float32."""
        if index is Ellipsis:
            return self
        return jax.tree.map(lambda x: x[index], self).astype(jnp.float32)

    def astype(self, dtype: jax.typing.DTypeLike) -> Array:
        """The merged weight of one layer or of all, computed in float32."""
        a, b, magnitude = self.adapter
        layer = "L" * self.scale.ndim
        into, out, axes = lettered(self.into), lettered(self.out), layer + lettered(self.axes)
        lead = layer + lettered(lead_of(self.axes, self.into, self.out))
        a, b, base = (x.astype(jnp.float32) for x in (a, b, self.base))
        scale = lambda like: jnp.expand_dims(self.scale, [*range(self.scale.ndim, like.ndim)])
        exact = functools.partial(jnp.einsum, precision="highest")
        wide = base + exact(f"{lead}{into}r,{lead}r{out}->{axes}", a * scale(a), b)
        if magnitude is not None:
            length = jnp.sqrt(exact(f"{axes},{axes}->{lead}{out}", wide, wide))
            by = jnp.where(scale(magnitude) == 0, 1.0, magnitude / length)
            wide = exact(f"{axes},{lead}{out}->{axes}", wide, by)
        return wide.astype(dtype)


def lettered(axes: str) -> str:
    """The axes as written in an einsum equation: "NH" for "N H"."""
    return axes.replace(" ", "")


def lead_of(axes: str, into: str, out: str) -> str:
    """The axes of a weight that are neither input nor output: L, and E for experts."""
    return " ".join(c for c in axes.split() if c not in into + out)


def cast(weight: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
    """Casts a weight to the compute dtype; a magnitude and the scale stay in float32."""
    if not is_adapted(weight):
        return weight.astype(dtype)
    a, b, magnitude = weight.adapter
    adapter = Adapter(a.astype(dtype), b.astype(dtype), magnitude)
    return dataclasses.replace(weight, base=weight.base.astype(dtype), adapter=adapter)


def axes_of(weight: PyTree, axes: str) -> PyTree:
    """The axes of each array in a `cast` weight of one layer, as a matching tree."""
    if not is_adapted(weight):
        return axes
    lead = lead_of(axes, weight.into, weight.out)
    magnitude = None if weight.adapter.magnitude is None else weight.out
    adapter = Adapter(f"{lead} {weight.into} {RANK}", f"{lead} {RANK} {weight.out}", magnitude)
    return dataclasses.replace(weight, base=axes, scale="", adapter=adapter)


def turn(weight: Adapted) -> Float[Array, "..."]:
    """DoRA's magnitude divided by the norm of W + s A B, per output of one layer, in float32.

    The norm is computed without adding the matrices, and takes no gradient, as in section 4.3 of
    the paper and in PEFT.
    """
    a, b, magnitude = weight.adapter
    axes, into, out = (lettered(x) for x in (weight.axes, weight.into, weight.out))
    w, a, b = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (weight.base, a, b))
    dot = functools.partial(jnp.einsum, precision="highest")
    own = dot(f"{axes},{axes}->{out}", w, w)
    cross = dot(f"{into}r,{axes},r{out}->{out}", a, w, b)
    low = dot(f"{into}r,{into}s,r{out},s{out}->{out}", a, a, b, b)
    length = jnp.sqrt(own + 2 * weight.scale * cross + weight.scale**2 * low)
    return jnp.where(weight.scale == 0, 1.0, magnitude / length)


def is_adapted(value: object) -> bool:
    """Whether a weight is an `Adapted`, with or without its adapter."""
    return isinstance(value, Adapted)


def joined(some: PyTree, weights: PyTree) -> PyTree:
    """Puts `some` weights or adapters into a tree of weights; both are dicts."""
    if some is None:
        return weights
    if isinstance(some, dict):
        within = weights or {}
        return within | {name: joined(value, within.get(name)) for name, value in some.items()}
    if partly.is_partly(weights):
        return dataclasses.replace(weights, trained=some)
    return dataclasses.replace(weights, adapter=some) if is_adapted(weights) else some


def part(weights: PyTree, like: PyTree) -> PyTree:
    """The weights or adapters of a tree that are also in the tree `like`."""
    if isinstance(like, dict):
        return {name: part(weights[name], value) for name, value in like.items()}
    if like is None:
        return None
    return weights.adapter if is_adapted(weights) else weights

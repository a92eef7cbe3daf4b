"""A frozen weight with the product of two narrow ones beside it: LoRA, and DoRA's magnitude.

The value of a parameter may be an `Adapted` in place of an array: a scan over layers cuts each of
its arrays, a product takes both ways, and no architecture knows of it. What is trained of it is
its `Adapter`; trees of what is trained are put into the tree of all weights by `joined`.
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
    """What is trained beside a frozen weight."""

    a: Any  # [L, into, R]
    b: Any  # [L, R, out]
    magnitude: Any = None  # [L, out], of DoRA: the length of what makes each output


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "scale", "adapter"),
    meta_fields=("ranks", "axes", "into", "out"),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """W + scale · A B, of every layer; with a magnitude, each output's weights scaled to it.

    The letters `into` are summed over in the product, `out` are made ("D" and "N H" of a query),
    each in the order of the Hugging Face file.

    Source: LoRA, https://arxiv.org/abs/2106.09685; DoRA, https://arxiv.org/abs/2402.09353, Eq. 5.
    """

    # Of any type, for jax puts shapes, and marks of its own, in their places.
    base: Any  # [L, ...]: an array, or what gives one by `astype`
    scale: Any  # [L], float32: 0 turns the adapter of a layer off, magnitude and all
    adapter: Any  # an Adapter; none in a tree of frozen weights
    ranks: tuple[int, ...]  # of each layer: what A and B hold beyond it is 0
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
        """Itself, for `...`; for that of a layer its weight, merged in float32."""
        if index is Ellipsis:
            return self
        return jax.tree.map(lambda x: x[index], self).astype(jnp.float32)

    def astype(self, dtype: jax.typing.DTypeLike) -> Array:
        """The merged weight, worked out in float32; of one layer, or of all."""
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
    """Axes as an equation has them: "NH" of "N H"."""
    return axes.replace(" ", "")


def lead_of(axes: str, into: str, out: str) -> str:
    """What of a weight's axes neither side of its product has: L, and E of experts."""
    return " ".join(c for c in axes.split() if c not in into + out)


def cast(weight: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A weight as it is computed with; a magnitude and the scale stay in float32."""
    if not is_adapted(weight):
        return weight.astype(dtype)
    a, b, magnitude = weight.adapter
    adapter = Adapter(a.astype(dtype), b.astype(dtype), magnitude)
    return dataclasses.replace(weight, base=weight.base.astype(dtype), adapter=adapter)


def axes_of(weight: Any, axes: str) -> Any:
    """The axes of each array of a `cast` weight of one layer, in its place."""
    if not is_adapted(weight):
        return axes
    lead = lead_of(axes, weight.into, weight.out)
    magnitude = None if weight.adapter.magnitude is None else weight.out
    adapter = Adapter(f"{lead} {weight.into} {RANK}", f"{lead} {RANK} {weight.out}", magnitude)
    return dataclasses.replace(weight, base=axes, scale="", adapter=adapter)


def turn(weight: Adapted) -> Float[Array, "..."]:
    """DoRA's magnitude over the length of W + s A B, for each output of one layer, in float32.

    The length is worked out without adding the matrices, and takes no gradient: section 4.3 of the
    paper, and PEFT.
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
    """Whether the value of a weight has an adapter, or a place for one."""
    return isinstance(value, Adapted)


def joined(some: PyTree, weights: PyTree) -> PyTree:
    """A tree of weights with `some` of them, or of their adapters, in place; both are dicts."""
    if some is None:
        return weights
    if isinstance(some, dict):
        within = weights or {}
        return within | {name: joined(value, within.get(name)) for name, value in some.items()}
    if partly.is_partly(weights):
        return dataclasses.replace(weights, trained=some)
    return dataclasses.replace(weights, adapter=some) if is_adapted(weights) else some


def part(weights: PyTree, like: PyTree) -> PyTree:
    """Of a tree of weights those, or their adapters, that the tree `like` has."""
    if isinstance(like, dict):
        return {name: part(weights[name], value) for name, value in like.items()}
    if like is None:
        return None
    return weights.adapter if is_adapted(weights) else weights

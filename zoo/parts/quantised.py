"""Frozen weights in 4 or 8 bits, dequantised one layer at a time.

The value of a parameter may be a `Quantised` in place of an array, as it may be an `Adapted`: a
scan over layers slices each of its arrays, `astype` dequantises that layer's weight, and no
architecture needs to know.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_io.quantised import BLOCK, NESTED, NF4, Narrow
from zoo.parts import sharding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("narrow",),
    meta_fields=("axes", "sizes", "into", "out"),
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Matrices of every layer, in the rows and blocks of `checkpoints_io.quantised.Narrow`.

    `into` and `out` are the input and output axes of the product, as in `Adapted`; what is left
    of `axes` (experts) leads.
    """

    narrow: Narrow  # each array has a leading L axis, unless it is a single layer
    axes: str  # of one layer
    sizes: tuple[int, ...]  # of these
    into: str
    out: str

    @property
    def lead(self) -> str:
        """The leading axes: L, unless it is a single layer, and E for experts."""
        held = [c for c in self.axes.split() if c not in self.into + self.out]
        return " ".join(["L"] * (self.narrow.codes.ndim - 2 - len(held)) + held)

    @property
    def kind(self) -> str:
        """The quantisation: "nf4" or "int8"."""
        return "nf4" if self.narrow.codes.dtype == jnp.uint8 else "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dequantised weight, in the order of `axes`."""
        layers = self.narrow.codes.shape[:1] if self.lead.startswith("L") else ()
        return (*layers, *self.sizes)

    @property
    def ndim(self) -> int:
        """The number of axes of the dequantised weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the dequantised weight."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the dequantised numbers."""
        return jnp.dtype(jnp.float32)

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """The sharding of the codes, which are nearly all of the data."""
        return self.narrow.codes.sharding

    def __getitem__(self, index: object) -> "Array | Quantised":
        """Returns itself for `...`; for a layer number, that layer's weight in float32."""
        if index is Ellipsis:
            return self
        return jax.tree.map(lambda x: x[index], self).astype(jnp.float32)

    def astype(self, dtype: jax.typing.DTypeLike) -> Array:
        """Dequantises the weight of one layer or of all."""
        size = dict(zip(self.axes.split(), self.sizes, strict=True))
        count = math.prod(size[c] for c in f"{self.out} {self.into}".split())
        # Devices exchange the codes. Rows are sharded like the outputs, where that is possible.
        by = sharding.STORED.get(self.out.split()[0], ())
        axes = f"{self.lead} {'rows' if 'tensor' in by else '.'} ."
        narrow = self.narrow._replace(codes=sharding.gather(self.narrow.codes, axes))
        flat = _of_nf4(narrow, count) if self.kind == "nf4" else _of_int8(narrow)
        letters = f"{self.lead} {self.out} {self.into}".split()
        layers = {"L": self.narrow.codes.shape[0]}
        wide = flat.astype(dtype).reshape([(layers | size)[c] for c in letters])
        own = [c for c in letters if c == "L"] + self.axes.split()
        return wide.transpose([letters.index(c) for c in own])


def _of_int8(narrow: Narrow) -> Float[Array, "..."]:
    return narrow.codes.astype(jnp.float32) * narrow.scales[..., None]


def _of_nf4(narrow: Narrow, count: int) -> Float[Array, "..."]:
    """Dequantises matrices of `count` numbers each, with the rounding of bitsandbytes."""
    codes, scales, steps, offset, table = narrow
    lead = codes.shape[:-2]
    if steps is not None:
        own = jnp.take_along_axis(table, scales.astype(jnp.int32), axis=-1)
        own = own * _each(steps, NESTED, scales.shape[-1])
        # The bound keeps the compiler from fusing multiply and add, which would round once instead
        # of twice.
        scales = jnp.minimum(own, jnp.finfo(jnp.float32).max) + offset[..., None]
    halves = jnp.stack([codes >> 4, codes & 15], axis=-1)
    numbers = jnp.asarray(NF4).at[halves].get(mode="promise_in_bounds")
    return numbers.reshape(*lead, -1)[..., :count] * _each(scales, BLOCK, count)


def _each(shared: Float[Array, "..."], times: int, count: int) -> Float[Array, "..."]:
    """Repeats each value that `times` neighbours share, up to `count` values."""
    wide = jnp.broadcast_to(shared[..., None], (*shared.shape, times))
    return wide.reshape(*shared.shape[:-1], -1)[..., :count]


def is_quantised(value: object) -> bool:
    """Whether the value of a weight is quantised."""
    return isinstance(value, Quantised)

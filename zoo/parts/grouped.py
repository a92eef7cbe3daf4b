"""Grouped matrix products on GPUs: tiles of tokens times their experts' matrices in one kernel.

The kernel reads the matrices in place, without a copy per tile. D is the contracted axis, F the
output axis, J the matrices fused into one tensor. Pallas' Triton dialect.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.parts import dialect
from zoo.parts.dialect import Ref

# Tile sides of a program; the dialect's products take no smaller ones.
SMALLEST, LARGEST = 16, 128
STEP = 64  # of the contracted axis, so that the 99 KiB of shared memory of smaller GPUs suffice
PARAMS = triton.CompilerParams(num_warps=8, num_stages=2)


class Tiles(NamedTuple):
    """The tiles of tokens; those of one expert are consecutive."""

    experts: Int[Array, " I"]  # the expert of each tile
    first: Int[Array, " E"]
    each: Int[Array, " E"]
    count: Int[Array, ""]  # the number of tiles in use; outputs of the others are zeros


class How(NamedTuple):
    """The compile-time settings of a kernel."""

    tile: int  # tokens
    out: jax.typing.DTypeLike
    interpret: bool  # runs on any platform, slowly


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A weight of all experts that an expert's work sees as one expert's, for all tiles at once."""

    all: Float[Array, "E ..."]
    tiles: Tiles
    tile: int
    interpret: bool

    def product(
        self, equation: str, x: Float[Array, "T D"], out: jax.typing.DTypeLike | None
    ) -> Array:
        """The grouped product; `x` in `equation` has a token axis, then the contracted axes."""
        (token, summed), of_w, of_out = re.split(",|->", equation)
        assert of_out == token + of_w.replace(summed, ""), equation
        E, *sizes = self.all.shape
        at = of_w.index(summed)
        w = self.all.reshape(E, math.prod(sizes[:at]), sizes[at], -1)
        room = lambda x, *axes: jnp.pad(
            x, [(0, -n % SMALLEST if i in axes else 0) for i, n in enumerate(x.shape)]
        )
        how = How(self.tile, jnp.dtype(out or x.dtype), self.interpret)
        made = _multiplied(how, room(x, 1), room(w, 2, 3), self.tiles)[..., : w.shape[3]]
        return made.reshape(len(x), *sizes[:at], *sizes[at + 1 :])

    def __getitem__(self, index: object) -> Float[Array, "T ..."]:
        """For `...`, the bias of each token, in float32, in which its gradient accumulates."""
        assert index is Ellipsis
        of_tiles = self.all.astype(jnp.float32)[self.tiles.experts]
        return jnp.repeat(of_tiles, self.tile, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiplied(
    how: How, x: Float[Array, "T D"], w: Float[Array, "E J D F"], tiles: Tiles
) -> Float[Array, "T J F"]:
    T, (J, D, F) = len(x), w.shape[1:]
    t, d, f = _side(how.tile), _side(D, STEP), _side(F)

    def experts_matmul(x: Ref, w: Ref, experts: Ref, count: Ref, y: Ref) -> None:
        i, j = dialect.over(pl.program_id(0), how.tile // t)[0], pl.program_id(2)
        expert, made = experts[i], pl.ds(pl.program_id(1) * f, f)

        def add(k: Array, sofar: Array) -> Array:
            here = pl.ds(k * d, d)
            return sofar + dialect.product(x[:, here], w[expert, j, here, made])

        steps = (i < count[0]).astype(jnp.int32) * (D // d)
        begin = jnp.zeros((t, f), jnp.float32)
        y[...] = jax.lax.fori_loop(0, steps, add, begin).astype(y.dtype)

    return _called(
        experts_matmul, how, (T // t, F // f, J), (x, w, tiles.experts, tiles.count[None]),
        [pl.BlockSpec((t, D), lambda i, n, j: (i, 0))],
        pl.BlockSpec((t, None, f), lambda i, n, j: (i, j, n)), (T, J, F), how.out,
    )  # fmt: skip


def _forward(how: How, x: Array, w: Array, tiles: Tiles) -> tuple:
    return _multiplied(how, x, w, tiles), (x, w, tiles)


def _backward(how: How, kept: tuple, gradient: Float[Array, "T J F"]) -> tuple:
    x, w, tiles = kept
    gradient = gradient.astype(x.dtype)
    return _of_tokens(how, gradient, w, tiles), _of_weights(how, x, gradient, w, tiles), None


_multiplied.defvjp(_forward, _backward)


def _of_tokens(
    how: How, gradient: Float[Array, "T J F"], w: Float[Array, "E J D F"], tiles: Tiles
) -> Float[Array, "T D"]:
    (T, J, F), D = gradient.shape, w.shape[2]
    t, d, f = _side(how.tile), _side(D), _side(F, STEP)

    def experts_matmul_of_tokens(
        gradient: Ref, w: Ref, experts: Ref, count: Ref, of_x: Ref
    ) -> None:
        i = dialect.over(pl.program_id(0), how.tile // t)[0]
        expert, made = experts[i], pl.ds(pl.program_id(1) * d, d)

        def add(k: Array, sofar: Array) -> Array:
            j, n = dialect.over(k, F // f)
            here = pl.ds(n * f, f)
            return sofar + dialect.product(gradient[:, j, here], w[expert, j, made, here].T)

        steps = (i < count[0]).astype(jnp.int32) * (J * (F // f))
        begin = jnp.zeros((t, d), jnp.float32)
        of_x[...] = jax.lax.fori_loop(0, steps, add, begin).astype(of_x.dtype)

    return _called(
        experts_matmul_of_tokens, how, (T // t, D // d),
        (gradient, w, tiles.experts, tiles.count[None]),
        [pl.BlockSpec((t, J, F), lambda i, n: (i, 0, 0))],
        pl.BlockSpec((t, d), lambda i, n: (i, n)), (T, D), gradient.dtype,
    )  # fmt: skip


def _of_weights(
    how: How,
    x: Float[Array, "T D"],
    gradient: Float[Array, "T J F"],
    w: Float[Array, "E J D F"],
    tiles: Tiles,
) -> Float[Array, "E J D F"]:
    T, (E, J, D, F) = len(x), w.shape
    t, d, f = _side(how.tile, STEP), _side(D), _side(F)

    def experts_matmul_of_weights(x: Ref, gradient: Ref, first: Ref, each: Ref, of_w: Ref) -> None:
        e, j = dialect.over(pl.program_id(2), J)
        begin, end = (i * (how.tile // t) for i in (first[e], first[e] + each[e]))

        def add(i: Array, sofar: Array) -> Array:
            here = pl.ds(i * t, t)
            return sofar + dialect.product(x[here, :].T, gradient[here, j, :])

        none = jnp.zeros((d, f), jnp.float32)
        of_w[...] = jax.lax.fori_loop(begin, end, add, none).astype(of_w.dtype)

    return _called(
        experts_matmul_of_weights, how, (F // f, D // d, E * J),
        (x, gradient, tiles.first, tiles.each),
        [pl.BlockSpec((T, d), lambda n, m, e: (0, m)),
         pl.BlockSpec((T, J, f), lambda n, m, e: (0, 0, n))],
        pl.BlockSpec((None, None, d, f), lambda n, m, e: (e // J, e % J, m, n)), w.shape, w.dtype,
    )  # fmt: skip


def _side(size: int, most: int = LARGEST) -> int:
    """The largest power of two that divides `size`, up to `most`."""
    return min(size & -size, most)


def _called(
    kernel: Callable, how: How, grid: tuple[int, ...], given: tuple, parts: list,
    made: pl.BlockSpec, shape: tuple[int, ...], dtype: jax.typing.DTypeLike,
) -> Array:  # fmt: skip
    """Calls a kernel; `parts` are the block specs of the first arrays, others are passed whole."""
    zeros = lambda n: lambda *_: (0,) * n
    whole = [pl.BlockSpec(x.shape, zeros(x.ndim)) for x in given[len(parts) :]]
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[*parts, *whole],
        out_specs=made,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=PARAMS,
        interpret=how.interpret,
        name=kernel.__name__,
    )(*given)

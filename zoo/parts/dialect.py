"""Helpers shared by our GPU kernels in Pallas' Triton dialect."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Ref = Any  # what a kernel reads from or writes to: a part of an array, indexed like it


def product(a: Float[Array, "t D"], b: Float[Array, "D F"]) -> Float[Array, "t F"]:
    """A matrix product in float32; float32 operands do not use TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def over(i: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder of a non-negative number; the dialect cannot lower `%` of a tracer."""
    return jax.lax.div(i, jnp.int32(by)), jax.lax.rem(i, jnp.int32(by))

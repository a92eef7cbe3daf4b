"""Pallas' Triton dialect: what our kernels for GPUs share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(a: Float[Array, "t D"], b: Float[Array, "D F"]) -> Float[Array, "t F"]:
    """In float32, and of float32 without tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def over(i: Array, by: int) -> tuple[Array, Array]:
    """Quotient and rest of a number that is not negative; `%` of a tracer is not translated."""
    return jax.lax.div(i, jnp.int32(by)), jax.lax.rem(i, jnp.int32(by))

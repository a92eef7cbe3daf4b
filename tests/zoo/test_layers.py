"""What architectures share."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from zoo import layers

TIMES = 2048  # in bfloat16 a sum of ones ends at 256


def test_a_token_seen_often_gets_all_of_its_gradient():
    tokens = jnp.ones((1, TIMES), jnp.int32)

    def summed(table):
        return layers.embed(nnx.Param(table, axes="V D"), tokens, jnp.bfloat16).sum(
            dtype=jnp.float32
        )

    gradient = jax.grad(summed)(jnp.ones((3, 4)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, [[0] * 4, [TIMES] * 4, [0] * 4])

"""What architectures share."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from zoo import layers, llama

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


def test_a_norm_seen_often_gets_all_of_its_gradient():
    norm = layers.RmsNorm("D", {"D": 4}, nnx.Rngs(0), eps=1e-6)
    graph, state = nnx.split(norm)

    def summed(state):
        ones = jnp.ones((TIMES, 1, 4), jnp.bfloat16)
        return nnx.merge(graph, state)(ones).sum(dtype=jnp.float32)

    gradient = jax.grad(summed)(state)["scale"][...]
    np.testing.assert_allclose(gradient, np.full(4, TIMES), rtol=1e-2)


@pytest.mark.parametrize(
    ("less", "more"), [("full", "attention"), ("attention", "products"), ("products", "none")]
)
def test_what_is_kept_takes_memory(less, more):
    model = llama.Model(small_config(num_hidden_layers=8), nnx.Rngs(0))
    tokens = jnp.zeros((2, 128), jnp.int32)

    def temporary(remat):
        model.remat = remat
        graph, state = nnx.split(model)
        summed = lambda state: nnx.merge(graph, state)(tokens).sum()
        compiled = jax.jit(jax.grad(summed)).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(less) < temporary(more)

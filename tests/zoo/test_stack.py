"""Gradients that are added to in their place are those that are added afterwards."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import large_weights, small_config
from tests.long_forms import full_but
from tests.zoo import twins
from zoo import llama
from zoo.parts import spans, stack

TOKENS = np.arange(80).reshape(2, 40) % 97


def split(remat, model=None, **sizes):
    model = model or large_weights(llama.Model(small_config(**sizes), nnx.Rngs(0)))
    model.remat = remat
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def summed(graph, params, so_far=None):
    model = nnx.merge(graph, nnx.State(params))
    run = functools.partial(stack.run, so_far=so_far)
    hidden = model.hidden(jnp.asarray(TOKENS), spans.causal(2, 40), run)
    return (hidden**2).sum()


@pytest.mark.parametrize("remat", full_but(["full", "attention", "products", "none"], "products"))
def test_the_sum_of_gradients(remat):
    check_sum(*split(remat))


@pytest.mark.parametrize(
    ("family", "shape", "remat"),
    full_but(
        [
            ("gemma3_text", "plain", "full"),
            ("smollm3", "window, yarn", "full"),
            ("gpt_oss", "odd", "products"),
            ("gemma4_text", "inputs of each layer, shared keys", "products"),
            ("deepseek_v2", "tied, odd, no latent of queries", "products"),
            ("falcon_h1", "plain", "products"),
        ],
        ("smollm3", "window, yarn", "full"),
    ),
)
def test_the_sum_of_gradients_where_layers_differ(family, shape, remat):
    """Windows and ropes of each layer's own, going back as going forth; what some hand on."""
    check_sum(*split(remat, twins.untrained(family, shape)))


def check_sum(graph, params):
    plain = jax.grad(lambda params: summed(graph, params))(params)
    draw = np.random.default_rng(0)
    so_far = jax.tree.map(
        lambda x: jnp.asarray(draw.standard_normal(x.shape), jnp.float32), params["blocks"]
    )
    embedding = {"embedding": params["embedding"]}
    by = lambda given, so_far: summed(graph, params | given, so_far)
    of_embedding, total = jax.grad(by, argnums=(0, 1))(embedding, so_far)
    expected = jax.tree.map(jnp.add, so_far, plain["blocks"])
    for ours, theirs in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_embedding["embedding"], plain["embedding"], rtol=1e-4, atol=1e-4)


def test_there_is_one_gradient_of_the_blocks_and_not_two():
    graph, params = split("full", num_hidden_layers=64, hidden_size=64)
    blocks = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]))

    def temporary(add):
        program = jax.jit(add, donate_argnums=0).lower(params["blocks"], params).compile()
        return program.memory_analysis().temp_size_in_bytes

    afterwards = temporary(
        lambda so_far, params: jax.tree.map(
            jnp.add, so_far, jax.grad(lambda p: summed(graph, p))(params)["blocks"]
        )
    )
    in_place = temporary(
        lambda so_far, params: jax.grad(lambda so_far: summed(graph, params, so_far))(so_far)
    )
    assert in_place < afterwards - 0.9 * blocks

"""What layers keep for their backward pass: what a policy says, and nothing they were given."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import large_weights, small_config
from tests.long_forms import full_but
from zoo import adapters, llama, targets
from zoo.parts import adapted, pattern, remat, spans, stack

TOKENS = np.arange(80).reshape(2, 40) % 97


@functools.cache
def model_of(policy, layers=None):
    model = large_weights(llama.Model(small_config(num_hidden_layers=4), nnx.Rngs(0)))
    model.attention, model.remat, model.remat_layers = "blocks", policy, layers
    return model


def shapes_kept(model):
    """Of the arrays that one layer keeps beside what it was given, by policy."""
    found = stack.Measured({}, [])
    run, where = stack.measuring(found), spans.causal(2, 64)
    jax.eval_shape(lambda tokens: model.hidden(tokens, where, run), jnp.zeros((2, 64), jnp.int32))
    return {policy: sorted(x.shape for x in kept) for policy, kept in found.kept[""].items()}


def test_what_is_kept_of_a_layer():
    """Heads of 4 over 2 of 8, width 32, an MLP of 48: no weight, no table, nothing that enters."""
    config = model_of("full").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.hidden_size, config.intermediate_size) == (32, 48)
    kept = shapes_kept(model_of("full"))
    of_attention = kept["attention"]
    assert kept["full"] == []
    assert len(of_attention) == 2  # what comes out, and the sums of its softmax
    assert sum(map(np.prod, of_attention)) == 2 * 64 * 4 * 8 + 2 * 64 * 4
    of_products = [shape for shape in kept["products"] if shape not in of_attention]
    assert of_products == [
        (2, 64, 2, 8), (2, 64, 2, 8),  # k, v
        (2, 64, 4, 8),  # q
        (2, 64, 32),  # what attention adds to the residual stream; not what the MLP does
        (2, 64, 48), (2, 64, 48),  # gate, up
    ]  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
def test_of_a_product_with_an_adapter_the_sum_is_kept(dora):
    model = model_of("full")
    sites = targets.sites(model, targets.Lora(2, 4.0, dora=dora))
    frozen = adapters.attached(nnx.to_pure_dict(nnx.state(model)), sites)
    new = adapters.fresh(frozen, adapters.layout(model, sites), zero="B", seed=0)
    weights = adapted.joined(new, frozen)
    with_adapters = nnx.merge(nnx.graphdef(model), nnx.State(weights))
    plain, kept = shapes_kept(model), shapes_kept(with_adapters)
    assert kept["products"] == plain["products"]
    assert len(kept["none"]) > len(plain["none"])


def test_the_last_layers_keep_more():
    parts = pattern.schedule("d" + "aab" * 3 + "c")
    told = lambda policy, layers: [
        ("".join(part.kinds), part.times, name)
        for part, name in remat.by_part(parts, policy, layers)
    ]
    assert told("products", None) == [
        ("d", 1, "products"), ("aab", 3, "products"), ("c", 1, "products")
    ]  # fmt: skip
    assert told("products", 8) == [
        ("d", 1, "attention"), ("aab", 1, "attention"), ("aab", 2, "products"),
        ("c", 1, "products"),
    ]  # fmt: skip
    # A pattern keeps the same in all its layers, and nothing before it keeps more.
    assert told("products", 3) == [
        ("d", 1, "attention"), ("aab", 3, "attention"), ("c", 1, "products")
    ]  # fmt: skip
    assert told("products", 0) == [
        ("d", 1, "attention"), ("aab", 3, "attention"), ("c", 1, "attention")
    ]  # fmt: skip


def test_the_parts_of_a_part_are_its_layers():
    first, rest = pattern.schedule("daabaaba")[1].split(1)
    assert first.layers(0) == [("a", 0), ("a", 1), ("b", 0)]
    assert rest.layers(0) == [("a", 2), ("a", 3), ("b", 1)]
    assert (first.times, rest.times) == (1, 1)


@functools.cache
def gradients(policy, layers=None):
    """Of the blocks, added to numbers that are there already."""
    graph, state = nnx.split(model_of(policy, layers))
    params = nnx.to_pure_dict(state)

    def summed(params, so_far):
        model = nnx.merge(graph, nnx.State(params))
        run = functools.partial(stack.run, so_far=so_far)
        return (model.hidden(jnp.asarray(TOKENS), spans.causal(2, 40), run) ** 2).sum()

    begun = jax.tree.map(jnp.ones_like, params["blocks"])
    compiled = jax.jit(jax.grad(summed, argnums=1)).lower(params, begun).compile()
    found = jax.tree.leaves(compiled(params, begun))
    return found, compiled.as_text().count(" dot("), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("policy", "layers"),
    full_but(
        [("attention", None), ("products", None), ("products", 1), ("none", None)],
        ("products", 1),
    ),
)  # fmt: skip
def test_gradients_are_those_of_layers_that_keep_nothing(policy, layers):
    for ours, full in zip(gradients(policy, layers)[0], gradients("full")[0], strict=True):
        np.testing.assert_allclose(ours, full, rtol=1e-5, atol=1e-5 * np.abs(full).max())


def test_no_product_is_made_again():
    """Of a layer's seven the backward pass needs six; attention's own products are beside."""
    full, attention, products = (
        gradients(policy)[1] for policy in ("full", "attention", "products")
    )
    assert full > attention > products
    assert attention - products == 6


def test_each_layer_more_takes_memory():
    sizes = lambda *how: [gradients(*one)[2] for one in how]
    growing = sizes(("full",), ("products", 1), ("products", 2), ("products",), ("none",))
    assert growing == sorted(growing) and len(set(growing)) == len(growing)
    full, attention = sizes(("full",), ("attention",))
    assert full < attention

"""Muon and Adafactor on stacks: what each matrix of them gets is what it would get alone."""

import functools

import einops
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes.configs import tiny
from recipes.training import adapting, by_matrix, optimizer, plan, trained, written
from tests.conftest import given_by, optimizer_settings_of, small_config
from tests.long_forms import full_but
from tests.zoo import twins
from zoo import models
from zoo.parts import layers, sharding

SIZES = {"L": 3, "D": 160, "N": 2, "H": 64, "E": 2, "J": 2, "F": 144, "V": 200, "R": 8, "Q": 3}
# Axes of weights, their two sides, and by hand the list of their matrices.
WEIGHTS = {
    "q": ("L D N H", "D", "N H", "L D N H -> L D (N H)"),
    "o": ("L N H D", "N H", "D", "L N H D -> L (N H) D"),
    "qkv": ("L D J N H", "D", "N H", "L D J N H -> (L J) D (N H)"),
    "gate_up": ("L J F D", "D", "F", "L J F D -> (L J) D F"),
    "experts": ("L E J D F", "D", "F", "L E J D F -> (L E J) D F"),
    "down": ("L E F D", "F", "D", "L E F D -> (L E) F D"),
    "a": ("L D R", "D", "R", "L D R -> L D R"),
    "b": ("L R N H", "R", "N H", "L R N H -> L R (N H)"),
}
OTHERS = {"embedding": ("V D", "V", "D", "V D -> 1 V D"), "norm": ("L D", "", "D", "L D -> L 1 D")}
ALL = WEIGHTS | OTHERS
SIDES = {
    name: by_matrix.sides(axes, into, out, hidden=name in WEIGHTS)
    for name, (axes, into, out, _) in ALL.items()
}
# One for each family that lays its weights out otherwise, by hand.
BY_HAND = {
    "llama": {
        "blocks.attention.q": "L D N H -> L D (N H)",
        "blocks.attention.o": "L N H D -> L (N H) D",
        "blocks.mlp.gate": "L D F -> L D F",
        "blocks.mlp.down": "L F D -> L F D",
    },
    "gpt2": {
        "blocks.attention.qkv": "L D J N H -> (L J) D (N H)",
        "blocks.attention.qkv_bias": "L J N H -> (L J) 1 (N H)",
        "blocks.mlp.up": "L D F -> L D F",
        "blocks.mlp.up_bias": "L F -> L 1 F",
        "positions": "M D -> 1 M D",
    },
    "phi3": {
        "blocks.attention.qkv": "L D Q H -> L D (Q H)",
        "blocks.mlp.gate_up": "L J F D -> (L J) D F",
    },
    "gpt_oss": {
        "blocks.mlp.router": "L D E -> L D E",
        "blocks.mlp.router_bias": "L E -> L 1 E",
        "blocks.mlp.gate_up": "L E J D F -> (L E J) D F",
        "blocks.mlp.gate_up_bias": "L E J F -> (L E J) 1 F",
        "blocks.mlp.down_bias": "L E D -> (L E) 1 D",
        "blocks.attention.sinks": "L N -> L 1 N",
    },
    "mixtral": {
        "blocks.mlp.gate": "L E D F -> (L E) D F",
        "blocks.mlp.down": "L E F D -> (L E) F D",
    },
}


def drawn(seed, dtype=jnp.float32):
    """Numbers over some decades in the shape of every weight."""
    draw = np.random.default_rng(seed)
    shape = lambda axes: [SIZES[letter] for letter in axes.split()]
    number = lambda axes: (
        draw.standard_normal(shape(axes)) * np.exp(draw.standard_normal(shape(axes)))
    )
    return {name: jnp.asarray(number(axes), dtype) for name, (axes, *_) in ALL.items()}


def given_of(name, **other):
    return optimizer_settings_of(tiny.get_config())._replace(
        optimizer=name, **{"max_grad_norm": None} | other
    )


def three_updates(one, params, names=tuple(ALL)):
    """The changes of three, each taken from the same weights."""
    some = lambda tree: {name: tree[name] for name in names}
    state, found = one.init(some(params)), []
    update = jax.jit(one.update)
    for seed in range(3):
        changes, state = update(some(drawn(seed + 1, params[names[0]].dtype)), state, some(params))
        found.append(changes)
    return found


def test_vectors_by_hand():
    """A norm, a bias of experts, a router's bias, and a number of each layer."""
    found = {axes: by_matrix.of_vector(axes)[:2] for axes in ("L D", "L E F", "L E", "L")}
    assert found == {"L D": ((), (1,)), "L E F": ((), (2,)), "L E": ((), (1,)), "L": ((), ())}
    scales = jnp.arange(3.0)
    matrices = by_matrix.cut(scales, by_matrix.of_vector("L"))
    assert matrices.shape == (3, 1, 1)
    again = by_matrix.together(matrices, by_matrix.of_vector("L"), (3,))
    np.testing.assert_array_equal(again, scales)


@pytest.mark.full
@pytest.mark.parametrize("family", BY_HAND)
def test_the_matrices_of_every_family(family):
    """As written by hand; and cut apart and put together a weight is what it was."""
    model = twins.untrained(family, "plain")
    found = traverse_util.flatten_dict(trained.sides_of(model), sep=".")
    weights = {models.name_of(path): x for path, x in nnx.to_flat_state(nnx.state(model))}
    assert found.keys() == weights.keys()
    hidden = {name for name, of in found.items() if of.hidden}
    assert hidden == {
        name for name, x in weights.items()
        if name.startswith("blocks") and layers.is_matrix(x.axes)
    }  # fmt: skip
    for name, by_hand in BY_HAND[family].items():
        x, of = weights[name].get_value(), found[name]
        expected = einops.rearrange(np.asarray(x), by_hand)
        np.testing.assert_array_equal(by_matrix.cut(x, of), expected, err_msg=name)
    for name, param in weights.items():
        x, of = param.get_value(), found[name]
        np.testing.assert_array_equal(by_matrix.together(by_matrix.cut(x, of), of, x.shape), x)


@functools.cache
def of_stacks(name):
    """Three changes of all weights, by an optimizer that sees their stacks."""
    decayed = dict.fromkeys(ALL, False)
    return three_updates(
        optimizer.optimizer_of(given_of(name), lambda _: 0.1, decayed, None, SIDES), drawn(0)
    )


def alone(name, one):
    """Three changes of a stack, each of its matrices by an optimizer that sees nothing else."""
    axes, *_, by_hand = ALL[name]
    lists = [np.asarray(einops.rearrange(drawn(seed)[name], by_hand)) for seed in range(4)]
    update, each = jax.jit(one.update), []
    for weight, *gradients in zip(*lists, strict=True):
        state, found = one.init(jnp.asarray(weight)), []
        for gradient in gradients:
            change, state = update(gradient, state, weight)
            found.append(np.asarray(change))
        each.append(found)
    back = " -> ".join(reversed(by_hand.split(" -> ")))
    sizes = {letter: SIZES[letter] for letter in axes.split()}
    return [einops.rearrange(np.array(some), back, **sizes) for some in zip(*each, strict=True)]


@pytest.mark.parametrize("name", full_but(ALL, "q", "experts", "norm", "embedding"))
def test_adafactor_is_that_of_each_matrix_alone(name):
    expected = alone(name, optax.adafactor(0.1, multiply_by_parameter_scale=False))
    for changes, one in zip(of_stacks("adafactor"), expected, strict=True):
        np.testing.assert_allclose(changes[name], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", full_but(WEIGHTS, "q", "experts", "a"))
def test_muon_is_that_of_each_matrix_alone(name):
    """optax's, scaled so that steps are as large as AdamW's."""
    expected = alone(name, optax.contrib.muon(0.1, consistent_rms=0.2))
    for changes, one in zip(of_stacks("muon"), expected, strict=True):
        np.testing.assert_allclose(changes[name], one, rtol=1e-3, atol=1e-5)


def test_muon_is_adamw_for_what_is_no_matrix_of_a_layer(monkeypatch):
    monkeypatch.setitem(written.DTYPES, "f64", jnp.float64)
    decayed = {name: name != "norm" for name in ALL}
    other = dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-6)
    with jax.enable_x64():  # in float32 two programs differ where decay and Adam cancel
        found, expected = (
            three_updates(
                optimizer.optimizer_of(
                    given_of(name, adam_mu_dtype="f64", **other),
                    lambda _: 0.1,
                    decayed,
                    None,
                    SIDES,
                ),
                drawn(0, jnp.float64),
            )
            for name in ("muon", "adamw")
        )
    for ours, theirs in zip(found, expected, strict=True):
        for name in OTHERS:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-11, atol=1e-14)
        for name in WEIGHTS:  # and matrices decay as AdamW's
            turned = ours[name] + 0.1 * 0.1 * drawn(0)[name]
            assert 0.01 < float(jnp.sqrt(jnp.mean(turned**2))) < 0.03


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_gradients_are_clipped_to_a_global_norm(name):
    """As optax clips them: a large one weighs no more in the moments than those after it."""
    some = ("q", "embedding", "norm")
    sides = {key: SIDES[key] for key in some}
    of = lambda norm: optimizer.optimizer_of(
        given_of(name, max_grad_norm=norm, adam_mu_dtype="bf16"),
        lambda _: 0.1,
        dict.fromkeys(some, False),
        None,
        sides,
    )
    found = three_updates(of(1.0), drawn(0), some)
    expected = three_updates(optax.chain(optax.clip_by_global_norm(1.0), of(None)), drawn(0), some)
    for ours, theirs in zip(found, expected, strict=True):
        for key in some:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_step_works_on_a_layer_at_a_time(name):
    """Of a model of 32 layers it takes little more than the changes, 4 bytes a weight."""
    config = small_config(num_hidden_layers=32, hidden_size=128, intermediate_size=384)
    mesh = sharding.mesh_of(1, 1, 1)
    learnt = trained.of(models.abstract(config, mesh=mesh), None, None)
    one = optimizer.optimizer_of(given_of(name, max_grad_norm=1.0), lambda _: 1e-3, *learnt[1:])

    def step(gradient, params, state):
        changes, state = one.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    state = optimizer.layout(one, learnt.like, mesh)
    work = jax.jit(step, donate_argnums=(1, 2)).lower(learnt.like, learnt.like, state).compile()
    count = sum(x.size for x in jax.tree.leaves(learnt.like))
    assert work.memory_analysis().temp_size_in_bytes < 6 * count


def test_an_adapter_is_two_matrices_of_every_layer():
    """Beside magnitudes, and at the rates of LoRA+."""
    given = given_by(tiny.get_config()) | {
        "adapter.rank": 4, "adapter.dora": True, "adapter.lora_plus": 4.0,
        "adapter.targets": ("q_proj", "down_proj"),
    }  # fmt: skip
    model = models.abstract(small_config(), mesh=sharding.mesh_of(1, 1, 1))
    asked = adapting.of_settings(given, model)
    learnt = trained.of(model, asked, None)
    assert jax.tree.structure(learnt.sides, is_leaf=by_matrix.is_sides) == jax.tree.structure(
        learnt.like
    )
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), learnt.like)
    gradient = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape)), params
    )
    for name in ("adafactor", "muon"):
        one = optimizer.optimizer_of(given_of(name), lambda _: 1e-3, *learnt[1:])
        plain = optimizer.optimizer_of(
            given_of(name), lambda _: 1e-3, learnt.decayed, None, learnt.sides
        )
        changes, _ = jax.jit(one.update)(gradient, one.init(params), params)
        same, _ = jax.jit(plain.update)(gradient, plain.init(params), params)
        ours, theirs = changes["blocks"]["attention"]["q"], same["blocks"]["attention"]["q"]
        np.testing.assert_allclose(ours.a, theirs.a, rtol=1e-6)
        np.testing.assert_allclose(ours.b, 4 * theirs.b, rtol=1e-6)
        assert ours.magnitude.shape == (3, 4, 8)


BYTES = {"lion": 4, "rmsprop": 4, "muon": 4, "adafactor": 0}


@pytest.mark.parametrize("name", BYTES)
def test_state_is_planned_and_placed(name):
    """On one device all of it, by the layout; on eight split as the weights are."""
    config = small_config(hidden_size=256, intermediate_size=512, head_dim=64)
    mesh = sharding.mesh_of(1, 1, 1)
    model = models.abstract(config, mesh=mesh)
    learnt = trained.of(model, None, None)
    one = optimizer.optimizer_of(given_of(name), lambda _: 1e-3, *learnt[1:])
    layout = optimizer.layout(one, learnt.like, mesh)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), learnt.like)
    begun = optimizer.init(one, params, mesh)
    assert jax.tree.structure(layout) == jax.tree.structure(begun)
    assert all(
        (x.shape, x.dtype) == (y.shape, y.dtype)
        for x, y in zip(jax.tree.leaves(layout), jax.tree.leaves(begun), strict=True)
    )
    held = plan.memory(model, learnt.like, layout, None, resident=False)["optimizer"]
    assert held == sum(x.nbytes for x in jax.tree.leaves(begun))
    per_weight = held / sum(x.size for x in jax.tree.leaves(params))
    assert BYTES[name] <= per_weight <= BYTES[name] + 0.2  # AdamW for the embeddings beside Muon

    many = jax.sharding.AbstractMesh((1, 4, 1, 2), sharding.MESH_AXES)
    place = lambda axes, shape: jax.NamedSharding(many, sharding.spec(axes, shape, many.shape))
    flat = {models.name_of(path): x for path, x in nnx.to_flat_state(nnx.state(model))}
    apart = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=place(x.axes, x.shape))
        for path, x in flat.items()
    }
    state = optimizer.layout(one, traverse_util.unflatten_dict(apart, sep="."), many)
    of_shape = {x.shape: x.sharding for x in apart.values()}
    for x in jax.tree.leaves(state):
        x.sharding.shard_shape(x.shape)
        if x.shape in of_shape and x.ndim > 2:
            assert x.sharding == of_shape[x.shape]


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(
        ValueError, match=r"optimizer=muon only applies to .*trainable selects none: use --con"
    ):
        optimizer.optimizer_of(
            given_of("muon"), lambda _: 0.1, {"norm": False}, None, {"norm": SIDES["norm"]}
        )

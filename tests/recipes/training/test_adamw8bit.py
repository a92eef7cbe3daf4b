"""Moments in 8 bits: what is kept of a number, and steps beside those of float32 moments."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes.configs import tiny
from recipes.training import adamw8bit, optimizer
from tests.conftest import optimizer_settings_of, small_config
import zoo
from zoo.parts import sharding


def drawn(*shape, spread=1.0, seed=0):
    """Numbers of many sizes in each block."""
    draw = np.random.default_rng(seed)
    sizes = np.exp(spread * draw.standard_normal(shape))
    return jnp.asarray(sizes * draw.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_kept_of_a_number(signed):
    """Half a step of the fourth root, as a share of the block's largest; codes stay."""
    x = drawn(3, 5, 256, spread=2.0)
    x = x if signed else jnp.square(x)
    kept = adamw8bit.narrow(x, signed=signed)
    assert kept.codes.shape == x.shape
    assert kept.codes.dtype == (jnp.int8 if signed else jnp.uint8)
    assert kept.largest.shape == (3, 5, 2)
    found = adamw8bit.widened(kept)
    roots = lambda x: np.abs(np.asarray(x).reshape(3, 5, 2, 128) / kept.largest[..., None]) ** 0.25
    # A second moment that would be 0 is kept as the least code: it is off by at most one.
    bound = 0.5 / 127 if signed else np.where(roots(x) < 0.5 / 255, 1, 0.5) / 255
    assert (np.abs(roots(found) - roots(x)) <= bound + 1e-5).all()
    assert (np.sign(found) * np.sign(x) >= 0).all()
    if not signed:
        assert ((found > 0) == (x > 0)).all()
    again = adamw8bit.narrow(found, signed=signed)
    np.testing.assert_array_equal(again.codes, kept.codes)


def test_nothing_is_kept_of_nothing():
    kept = adamw8bit.narrow(jnp.zeros((4, 64)), signed=False)
    np.testing.assert_array_equal(adamw8bit.widened(kept), np.zeros((4, 64)))


@pytest.mark.parametrize(
    ("size", "length"),
    [(4096, 128), (640, 80), (64, 64), (128, 128), (80, 80), (1792, 112), (97, 97), (131, None),
     (8, None)],
)  # fmt: skip
def test_blocks_divide_the_last_axis(size, length):
    """And, where it is long, its part on each of eight devices."""
    assert adamw8bit.block(size) == length


def optimizers(**other):
    """AdamW with moments in float32, and in 8 bits."""
    given = optimizer_settings_of(tiny.get_config())._replace(**other)
    make = lambda name: optimizer.optimizer_of(
        given._replace(optimizer=name), lambda _: 1e-2, {"w": True, "norm": False}
    )
    return make("adamw"), make("adamw8bit")


def test_small_weights_and_norms_keep_their_moments_in_float32():
    exact, narrow = optimizers()
    params = {"w": drawn(2, 16, 128), "norm": drawn(64, 128)}
    moments = narrow.init(params)[1][0]
    assert adamw8bit.is_blocks(moments.mu["w"]) and adamw8bit.is_blocks(moments.nu["w"])
    assert moments.mu["norm"].dtype == moments.nu["norm"].dtype == jnp.float32
    small = {"w": drawn(31, 128), "norm": drawn(128)}
    assert jax.tree.structure(exact.init(small)) == jax.tree.structure(narrow.init(small))
    state, narrow_state = exact.init(small), narrow.init(small)
    for seed in range(3):
        gradient = jax.tree.map(lambda x: drawn(*x.shape, seed=seed), small)  # noqa: B023
        changes, state = exact.update(gradient, state, small)
        others, narrow_state = narrow.update(gradient, narrow_state, small)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), others, changes)


MORE = [pytest.param(shape, marks=pytest.mark.full) for shape in ((96, 128), (2, 4, 16, 96))]


@pytest.mark.parametrize("shape", [(3, 32, 128), *MORE])
def test_steps_are_near_those_of_float32_moments(shape):
    """Clipped and decayed too, and none is much larger than it should be.

    A moment's fourth root is off by 1/4 of a level on average, the moment by 4 x 1/4 of 1/127 where
    it is large and by more where it is small: a step, all in all, by some hundredths.
    """
    exact, narrow = optimizers(max_grad_norm=5.0, weight_decay=0.1, adam_beta2=0.99)
    params = {"w": drawn(*shape), "norm": drawn(shape[-1])}
    state, narrow_state = exact.init(params), narrow.init(params)
    sizes = jnp.exp(drawn(*shape, spread=0.0, seed=1))
    for seed in range(20):
        gradient = {
            "w": sizes * (0.3 + drawn(*shape, spread=0.0, seed=10 + seed)),
            "norm": drawn(shape[-1], seed=40 + seed),
        }
        changes, state = jax.jit(exact.update)(gradient, state, params)
        others, narrow_state = jax.jit(narrow.update)(gradient, narrow_state, params)
        off = optax.tree.norm(jax.tree.map(jnp.subtract, changes, others))
        assert float(off / optax.tree.norm(changes)) < 0.08, seed
        assert jnp.abs(others["w"]).max() < 1.5 * jnp.abs(changes["w"]).max()
        np.testing.assert_allclose(others["norm"], changes["norm"], rtol=1e-5, atol=1e-7)


def test_a_quadratic_goes_down_as_with_float32_moments():
    """Curvatures over three decades, and noise: the loss is near that of AdamW all along."""
    curvature = jnp.exp(drawn(4, 32, 128, spread=0.0, seed=2) * 1.5)
    losses, keys = [], jax.random.split(jax.random.key(0), 150)
    for one in optimizers(adam_beta2=0.99):
        params = {"w": drawn(4, 32, 128, spread=0.0), "norm": jnp.ones(8)}
        loss = lambda params: jnp.mean(curvature * params["w"] ** 2)

        def step(carry, key, one=one, loss=loss):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            noise = 1e-5 * jax.random.normal(key, curvature.shape)
            gradient |= {"w": gradient["w"] + noise}
            changes, state = one.update(gradient, state, params)
            return (optax.apply_updates(params, changes), state), value

        run = jax.jit(functools.partial(jax.lax.scan, step))
        _, values = run((params, one.init(params)), keys)
        losses.append(np.asarray(values))
    wide, narrow = losses
    assert wide[-1] < wide[0] / 10
    np.testing.assert_allclose(narrow, wide, rtol=0.15)


def compiled(name, layers):
    """The memory of one step of a small Llama's optimizer: of its state, and beside it."""
    mesh = sharding.mesh_of(1, 1, 1)
    config = small_config(num_hidden_layers=layers, hidden_size=128, intermediate_size=384)
    layout = nnx.state(zoo.abstract(config, mesh=mesh))
    params = nnx.to_pure_dict(layout)
    given = optimizer_settings_of(tiny.get_config())._replace(optimizer=name, max_grad_norm=1.0)
    adamw = optimizer.optimizer_of(given, lambda _: 1e-2, optimizer.matrices(layout))
    state = optimizer.layout(adamw, params, mesh)

    def step(gradient, params, state):
        changes, state = adamw.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    program = jax.jit(step, donate_argnums=(1, 2)).lower(params, params, state).compile()
    count = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= 4 * count + held  # all is given away, and used again
    return held / count, analysis.temp_size_in_bytes, count


def test_a_step_takes_two_bytes_a_weight_and_one_layer_in_float32():
    """However deep the model: 4 and 32 layers."""
    held, few, _ = compiled("adamw8bit", 4)
    _, many, count = compiled("adamw8bit", 32)
    assert 2 < held < 2.6  # scales: 4 bytes to a block of each moment, of 8 bits by head
    layer = 4 * 128 * 384  # bytes of the largest matrix of one
    assert many < few + layer and many < 6 * layer < 0.1 * 4 * count


def test_a_moment_is_split_as_its_weight_is():
    """Scales too, where their number can be divided."""
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), sharding.MESH_AXES)
    place = lambda axes, shape: jax.NamedSharding(mesh, sharding.spec(axes, shape, mesh.shape))
    sizes = {"w": (2, 64, 1024), "norm": (2, 32, 104)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place("L F D", shape))
        for name, shape in sizes.items()
    }
    given = optimizer_settings_of(tiny.get_config())._replace(optimizer="adamw8bit")
    adamw = optimizer.optimizer_of(given, lambda _: 1e-2, {"w": True, "norm": True})
    moments = optimizer.layout(adamw, params, mesh)[1][0]
    codes, largest = moments.mu["w"]
    assert codes.sharding == params["w"].sharding
    assert largest.sharding.shard_shape(largest.shape) == (2, 64, 1)
    assert moments.nu["norm"].codes.sharding == params["norm"].sharding
    assert moments.nu["norm"].largest.sharding.is_fully_replicated  # one block of 104

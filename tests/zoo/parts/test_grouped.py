"""The kernels for experts, run on CPUs, against the loop over tiles that CPUs take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.long_forms import full_but
from zoo.parts import adapted, experts, grouped, layers, tiles


def drawn(E, D, F, rank=None):
    """Tokens, their experts, weights that are trained and not, and what is asked of the outputs."""
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    weights = {
        "gate_up": array(E, 2, D, F) / D**0.5, "gate_up_bias": array(E, 2, F),
        "down": array(E, F, D) / F**0.5, "down_bias": array(E, D),
    }  # fmt: skip
    frozen = {}
    if rank:
        how = dict(ranks=(rank,), axes="E F D", into="F", out="D")
        frozen["down"] = adapted.Adapted(weights["down"], jnp.float32(0.5), None, **how)
        weights["down"] = adapted.Adapter(array(E, F, rank) / 4, array(E, rank, D) / 4)
    # The last expert is nobody's.
    route = experts.Route(
        jnp.asarray(draw.integers(0, E - 1, (2, 90, 2)), jnp.int32), jax.nn.softmax(array(2, 90, 2))
    )
    return array(2, 90, D), route, weights, frozen, array(2, 90, D)


def work(x, own):
    gate, up = layers.shifted(
        layers.times("tD,JDF->tJF", x, own["gate_up"]), own["gate_up_bias"]
    ).swapaxes(0, 1)
    made = layers.times("tF,FD->tD", jax.nn.silu(gate) * up, own["down"])
    return layers.shifted(made, own["down_bias"])


def outcome(x, route, weights, frozen, pull, part=None):
    def pulled(x, shares, weights):
        own = route._replace(shares=shares)
        every = adapted.joined(weights, frozen)
        made = tiles.gathered(x, own, every, work=work, before=False, part=part)
        return (made * pull).sum(), made

    run = jax.grad(pulled, argnums=(0, 1, 2), has_aux=True)
    if part is None:
        return jax.jit(run)(x, route.shares, weights)
    by_part = jax.tree.map(lambda w: w.reshape(part.count, -1, *w.shape[1:]), weights)
    return jax.jit(jax.vmap(run, in_axes=(None, None, 0), axis_name=part.axis))(
        x, route.shares, by_part
    )


@pytest.mark.parametrize(
    ("D", "F", "rank", "part"),
    full_but(
        [(24, 40, None, None), (32, 16, 4, None), (24, 40, None, tiles.Part("tensor", 2))],
        (24, 40, None, None),
        (32, 16, 4, None),
    ),
)
def test_kernels_are_the_loop(D, F, rank, part, monkeypatch):
    """Odd widths, biases, adapters, an expert without tokens, experts of a device."""
    given = drawn(6, D, F, rank)
    expected = outcome(*given, part=part)
    monkeypatch.setattr(tiles, "BY_KERNELS", {("cpu", "float32")})
    monkeypatch.setattr(tiles, "_tile_by_tile", None)  # the loop is not asked
    found = outcome(*given, part=part)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_two_tiles_by_hand():
    """Of two experts that double and negate; the third tile is nobody's."""
    mine = grouped.Tiles(*map(jnp.asarray, ([1, 0, 0], [1, 0], [1, 1], 2)))
    w = jnp.stack([2 * jnp.eye(16), -jnp.eye(16)])
    x = jnp.arange(48.0)[:, None] * jnp.eye(1, 16)
    made = layers.dot("tD,DF->tF", x, grouped.Grouped(w, mine, 16, interpret=True))
    np.testing.assert_array_equal(made[:16, 0], -jnp.arange(16.0))
    np.testing.assert_array_equal(made[16:32, 0], 2 * jnp.arange(16.0, 32.0))
    assert not made[32:].any() and not made[:, 1:].any()

"""What architectures share."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT, small_config
from tests.long_forms import full_but
from zoo import llama
from zoo.parts import experts, layers, sharding, tiles

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


def test_a_bias_seen_often_gets_all_of_its_gradient():
    def summed(bias):
        return layers.shifted(jnp.ones((TIMES, 4), jnp.bfloat16), bias).sum(dtype=jnp.float32)

    np.testing.assert_array_equal(jax.grad(summed)(jnp.ones(4)), np.full(4, TIMES))


def test_an_expert_met_often_gets_all_of_its_gradient():
    """Two experts, one of which every token meets: many tiles of it, and none of the other."""
    x = jnp.ones((1, TIMES, 4), jnp.bfloat16)
    route = experts.Route(jnp.zeros((1, TIMES, 1), jnp.int32), jnp.ones((1, TIMES, 1)))

    def summed(weights):
        given = {"down": (weights["down"], "E F D"), "bias": (weights["bias"], "E D")}
        work = lambda x, own: layers.shifted(layers.dot("tF,FD->tD", x, own["down"]), own["bias"])
        return experts.mixed(x, route, given, work).sum(dtype=jnp.float32)

    weights = {"down": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}
    gradient = jax.grad(summed)(weights)
    for name in weights:
        np.testing.assert_allclose(
            gradient[name][0], np.full_like(weights[name][0], TIMES), rtol=1e-2
        )
        assert not gradient[name][1].any()


def test_a_share_before_an_expert_by_hand():
    """The expert squares: 3 at a share of 1/2 makes 9/4, and 9/2 where it is weighed after."""
    x, half = jnp.full((1, 1, 1), 3.0), jnp.full((1, 1, 1), 0.5)
    route = experts.Route(jnp.zeros((1, 1, 1), jnp.int32), half)
    weights = {"down": (jnp.ones((1, 1, 1)), "E F D")}
    squared = lambda x, own: layers.times("tF,FD->tD", x**2, own["down"])
    assert experts.mixed(x, route, weights, squared, before=True).item() == 9 / 4
    assert experts.mixed(x, route, weights, squared).item() == 9 / 2


def test_parts_of_the_experts_add_up_to_all_of_them():
    """As devices have them, each some by number; values and gradients."""
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    x, down, pull = array(2, 9, 4), array(6, 4, 4), array(2, 9, 4)
    chosen = jnp.asarray(draw.integers(0, 6, (2, 9, 2)), jnp.int32)
    route = experts.Route(chosen, jax.nn.softmax(array(2, 9, 2)))
    work = lambda x, own: layers.times("tF,FD->tD", jnp.tanh(x), own["down"])

    def whole(x, shares, down):
        own = route._replace(shares=shares)
        made = tiles.gathered(x, own, {"down": down}, work=work, before=False)
        return (made * pull).sum(), made

    def in_parts(x, shares, down):
        own, part = route._replace(shares=shares), tiles.Part("tensor", 3)
        one = lambda down: tiles.gathered(
            x, own, {"down": down}, work=work, before=False, part=part
        )
        made = jax.vmap(one, axis_name="tensor")(down.reshape(3, 2, 4, 4)).sum(0)
        return (made * pull).sum(), made

    both = (
        jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(x, route.shares, down)
        for run in (whole, in_parts)
    )
    for theirs, ours in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_token_goes_to_the_best_experts_by_hand():
    """Shares of 1, 2 and 4 sevenths; of the two best, as they are or brought to a sum of one."""
    logits = jnp.log(jnp.array([[[1.0, 2.0, 4.0]]]))
    as_they_are = experts.chosen(logits, experts.Choice(2, to_one=False))
    assert as_they_are.experts.tolist() == [[[2, 1]]]
    np.testing.assert_allclose(as_they_are.shares, [[[4 / 7, 2 / 7]]], rtol=1e-6)
    brought_to_one = experts.chosen(logits, experts.Choice(2, to_one=True))
    np.testing.assert_allclose(brought_to_one.shares, [[[2 / 3, 1 / 3]]], rtol=1e-6)
    after = experts.top_then_softmax(logits, 2)
    np.testing.assert_allclose(after.shares, [[[2 / 3, 1 / 3]]], rtol=1e-6)


def test_a_correction_chooses_and_has_no_share_by_hand():
    """Sigmoids of 1/2, 3/4, 1/4, 2/3; in two groups, of which the better sum of two counts."""
    wanted = jnp.array([[[1 / 2, 3 / 4, 1 / 4, 2 / 3]]])
    logits = jnp.log(wanted / (1 - wanted))
    choice = experts.Choice(2, to_one=False, scores=jax.nn.sigmoid, scale=2.0)
    plain = experts.chosen(logits, choice)
    assert plain.experts.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(plain.shares, [[[3 / 2, 4 / 3]]], rtol=1e-6)
    corrected = experts.chosen(logits, choice, jnp.array([0.4, 0, 0, 0]))
    assert corrected.experts.tolist() == [[[0, 1]]]
    np.testing.assert_allclose(corrected.shares, [[[1, 3 / 2]]], rtol=1e-6)
    grouped = choice._replace(to_one=True, groups=2, kept=1)
    assert experts.chosen(logits, grouped).experts.tolist() == [[[1, 0]]]
    np.testing.assert_allclose(
        experts.chosen(logits, grouped).shares, [[[6 / 5, 4 / 5]]], rtol=1e-6
    )
    # By the best of each group alone it would be the same; by a correction of the other it is not.
    other = experts.chosen(logits, grouped, jnp.array([0, 0, 0.5, 0]))
    assert other.experts.tolist() == [[[2, 3]]]


def test_a_router_chooses_in_float32():
    """Logits that bfloat16 would make equal."""
    x = jnp.array([[[1.0, 2**-9]]], jnp.bfloat16)
    router = nnx.Param(jnp.array([[1.0, 1.0], [0.0, 1.0]]), axes="D E")
    assert experts.logits(x, router).tolist() == [[[1.0, 1 + 2**-9]]]


def test_experts_take_the_memory_of_what_they_are_asked():
    """And not of every token at every expert."""

    def temporary(E):
        sizes = {"L": 1, "D": 64, "F": 32, "E": E}
        one = experts.GatedExperts(sizes, nnx.Rngs(0), experts.Choice(2, to_one=True))
        graph, state = nnx.split(one)
        state = jax.tree.map(lambda w: w[0], state)
        x = jnp.ones((1, 2048, 64))
        loss = lambda state: nnx.merge(graph, state)(x).sum()
        return jax.jit(jax.grad(loss)).lower(state).compile().memory_analysis().temp_size_in_bytes

    assert temporary(64) < 2.5 * temporary(4)


@pytest.mark.parametrize(
    ("less", "more"),
    full_but(
        [("full", "attention"), ("attention", "products"), ("products", "none")],
        ("full", "attention"),
    ),
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


def test_every_axis_has_a_letter_of_the_alphabet():
    """And every letter of the alphabet is said once."""
    alphabet = re.findall(r"(?:  |; )([A-Z]) \w", str(layers.__doc__))
    assert len(alphabet) == len(set(alphabet)) == 25
    assert {axis for axis in sharding.STORED if len(axis) == 1} <= set(alphabet)
    for path in [*(ROOT / "zoo").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        text = path.read_text()
        axes = re.findall(r"(?:Float|Int|Bool|Key)\[[\w.| ]+, *\"([^\"]*)\"\]", text)
        axes += re.findall(r"(?:constrain|gather|by_width|weight)\([^\"()]*\"([A-Z ]+)\"", text)
        found = {letter for one in axes for letter in re.findall(r"\b[A-Z]\b", one)}
        assert found <= set(alphabet), path

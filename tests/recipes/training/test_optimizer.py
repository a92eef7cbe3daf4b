"""AdamW by hand, which number stands where; the others against those they are taken from."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes.configs import tiny
from recipes.training import optimizer, plan, policy, settings
from tests.conftest import ROOT, optimizer_settings_of


def test_two_updates_by_hand():
    """Gradients clipped to a norm of 1, moments corrected, matrices decayed and norms not."""
    config = tiny.get_config()
    config.max_grad_norm, config.weight_decay = 1.0, 0.1
    config.adam_beta1, config.adam_beta2, config.adam_epsilon = 0.5, 0.75, 1e-3
    rates = [0.25, 0.125]
    adamw = optimizer.optimizer_of(
        optimizer_settings_of(config),
        lambda count: jnp.array(rates)[count],
        {"matrix": True, "norm": False},
    )
    params = {"matrix": jnp.array([2.0]), "norm": jnp.array([3.0])}
    given = [{"matrix": 3.0, "norm": 4.0}, {"matrix": 0.3, "norm": -0.4}]
    clipped = [{"matrix": 0.6, "norm": 0.8}, {"matrix": 0.3, "norm": -0.4}]
    state = adamw.init(params)
    by_hand = {"matrix": 2.0, "norm": 3.0}
    first, second = {"matrix": 0.0, "norm": 0.0}, {"matrix": 0.0, "norm": 0.0}
    for at, (gradient, own, rate) in enumerate(zip(given, clipped, rates, strict=True), start=1):
        gradient = jax.tree.map(lambda x: jnp.array([x]), gradient)
        changes, state = adamw.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
        for name, g in own.items():
            first[name] = 0.5 * first[name] + 0.5 * g
            second[name] = 0.75 * second[name] + 0.25 * g * g
            mean, square = first[name] / (1 - 0.5**at), second[name] / (1 - 0.75**at)
            decay = 0.1 * by_hand[name] if name == "matrix" else 0.0
            by_hand[name] -= rate * (mean / (np.sqrt(square) + 1e-3) + decay)
            np.testing.assert_allclose(params[name], by_hand[name], rtol=1e-5)


def test_moments_in_the_dtype_that_was_asked_for():
    config = tiny.get_config()
    config.adam_mu_dtype = "bf16"
    adamw = optimizer.optimizer_of(optimizer_settings_of(config), lambda _: 0.1, {"w": True})
    mu, nu = (x for x in jax.tree.leaves(adamw.init({"w": jnp.ones(3)})) if x.ndim)
    assert (mu.dtype, nu.dtype) == (jnp.bfloat16, jnp.float32)


def moved(one, steps=4):
    """Weights after some updates, and the gradients of these."""
    draw = np.random.default_rng(0)
    params = {"matrix": jnp.asarray(draw.standard_normal((3, 4)), jnp.float32),
              "norm": jnp.ones(4)}  # fmt: skip
    state, seen = one.init(params), [params]
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape), jnp.float32), params)
        for _ in range(steps)
    ]
    for gradient in gradients:
        changes, state = one.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
        seen.append(params)
    return seen, gradients


MASK = {"matrix": True, "norm": False}


def of(name, **other):
    given = optimizer_settings_of(tiny.get_config())._replace(
        optimizer=name, **{"max_grad_norm": None} | other
    )
    return optimizer.optimizer_of(given, optax.linear_schedule(0.1, 0.0, 10), MASK)


def test_lion_is_optaxs():
    """Clipped, decayed and scheduled."""
    rate = optax.linear_schedule(0.1, 0.0, 10)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.lion(rate, weight_decay=0.2, mask=MASK)
    )
    (ours, _), (expected, _) = moved(of("lion", weight_decay=0.2, max_grad_norm=1.0)), moved(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_rmsprop_is_torchs():
    """Of which https://arxiv.org/abs/2305.18290 takes the defaults."""
    torch = pytest.importorskip("torch")
    seen, gradients = moved(of("rmsprop"))
    weights = {n: torch.nn.Parameter(torch.tensor(np.asarray(x))) for n, x in seen[0].items()}
    theirs = torch.optim.RMSprop(weights.values(), lr=0.1)
    for at, (gradient, now) in enumerate(zip(gradients, seen[1:], strict=True)):
        theirs.param_groups[0]["lr"] = 0.1 * (1 - at / 10)
        for name, weight in weights.items():
            weight.grad = torch.tensor(np.asarray(gradient[name]))
        theirs.step()
        for name, weight in weights.items():
            np.testing.assert_allclose(now[name], weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_rmsprop_decays_matrices_apart_from_the_gradient():
    (plain, _), (decayed, _) = moved(of("rmsprop"), 1), moved(of("rmsprop", weight_decay=0.2), 1)
    matrix = plain[1]["matrix"] - 0.1 * 0.2 * plain[0]["matrix"]
    np.testing.assert_allclose(decayed[1]["matrix"], matrix, rtol=1e-6)
    np.testing.assert_array_equal(decayed[1]["norm"], plain[1]["norm"])


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_an_average_of_the_weights_is_kept_beside_them(name):
    """Of each step's weights, which move as they would without it."""
    (plain, _), (seen, _) = moved(of(name)), moved(of(name, ema_decay=0.75))
    jax.tree.map(np.testing.assert_array_equal, seen, plain)
    one, by_hand = of(name, ema_decay=0.75), plain[0]
    _, gradients = moved(one)
    state, params = one.init(plain[0]), plain[0]
    assert jax.tree.structure(state.inner) == jax.tree.structure(of(name).init(params))
    for gradient, now in zip(gradients, plain[1:], strict=True):
        _, state = one.update(gradient, state, params)
        by_hand = jax.tree.map(lambda average, x: 0.75 * average + 0.25 * x, by_hand, now)
        params = now
        found = optimizer.average_of(state)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, by_hand)
    assert optimizer.average_of(of(name).init(params)) is None


def test_the_average_is_what_is_evaluated_and_exported(small_model):
    """And is planned for, once."""
    graph, state = nnx.split(small_model)
    weights = nnx.to_pure_dict(state)
    given = optimizer_settings_of(tiny.get_config())._replace(ema_decay=0.5)
    one = optimizer.optimizer_of(given, lambda _: 0.1, optimizer.matrices(state))
    opt_state = one.init(weights)
    for mine, theirs in zip(*map(jax.tree.leaves, (opt_state.average, weights)), strict=True):
        assert mine is not theirs  # a step gives both away
    doubled = jax.tree.map(lambda x: 2 * x, weights)
    own = policy.Policy(small_model, graph, {}, None)
    now = policy.State(1, weights, {}, opt_state._replace(average=doubled))
    exported = nnx.to_pure_dict(nnx.state(policy.export_model(own, now)))
    for found in (exported, policy.eval_weights(own, now)):
        jax.tree.map(np.testing.assert_array_equal, found, doubled)
    held = plan.memory(small_model, weights, opt_state, None, resident=False)
    assert held["average"] == held["policy"]
    assert held["optimizer"] == pytest.approx(2 * held["policy"], abs=64)


def test_the_docs_have_a_row_for_each():
    told = (ROOT / "docs" / "dpo.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)
    without = sorted({*settings.ALL["optimizer"].choices} - {*rows})
    assert not without, f"write a row for {', '.join(without)} in docs/dpo.md"


def test_an_optimizer_that_is_only_a_setting_is_none():
    """And not another one, without a word."""
    with pytest.raises(NotImplementedError, match=r"settings.py lists an optimizer adabelief"):
        optimizer._scaled(
            optimizer_settings_of(tiny.get_config())._replace(optimizer="adabelief"), {}, {}
        )


def test_only_matrices_decay(small_model):
    decays = optimizer.matrices(nnx.state(small_model))
    assert decays["embedding"]
    assert decays["blocks"]["attention"]["q"]
    assert not decays["blocks"]["mlp_norm"]["scale"]
    assert not decays["norm"]["scale"]

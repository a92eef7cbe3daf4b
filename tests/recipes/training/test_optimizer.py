"""AdamW by hand: which number stands where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recipes.configs import tiny
from recipes.training import optimizer
from tests.conftest import adamw_of


def test_two_updates_by_hand():
    """Gradients clipped to a norm of 1, moments corrected, matrices decayed and norms not."""
    config = tiny.get_config()
    config.max_grad_norm, config.weight_decay = 1.0, 0.1
    config.adam_beta1, config.adam_beta2, config.adam_epsilon = 0.5, 0.75, 1e-3
    rates = [0.25, 0.125]
    adamw = optimizer.optimizer_of(
        adamw_of(config), lambda count: jnp.array(rates)[count], {"matrix": True, "norm": False}
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
    adamw = optimizer.optimizer_of(adamw_of(config), lambda _: 0.1, {"w": True})
    mu, nu = (x for x in jax.tree.leaves(adamw.init({"w": jnp.ones(3)})) if x.ndim)
    assert (mu.dtype, nu.dtype) == (jnp.bfloat16, jnp.float32)

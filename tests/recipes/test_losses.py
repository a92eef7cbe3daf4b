"""Losses by hand, and against the agreed table."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes import losses
from recipes.configs import tiny


def test_sigmoid_by_hand():
    chosen, rejected = jnp.array([0.0, 2.0]), jnp.array([0.0, -1.0])
    found = losses.sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.0)
    np.testing.assert_allclose(found, [math.log(2), math.log1p(math.exp(-1.5))], rtol=1e-6)
    smoothed = losses.sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.25)
    wrong = math.log1p(math.exp(1.5))
    expected = 0.75 * math.log1p(math.exp(-1.5)) + 0.25 * wrong
    assert float(smoothed[1]) == pytest.approx(expected, rel=1e-6)


def test_dpop_by_hand():
    """A chosen answer that has become less likely costs; one that has not does not."""
    chosen, rejected = jnp.array([-1.0, 2.0]), jnp.array([-3.0, -1.0])
    found = losses.dpop(chosen, rejected, beta=0.5, label_smoothing=0.0, dpop_lambda=4.0)
    expected = [math.log1p(math.exp(-0.5 * (2.0 - 4.0))), math.log1p(math.exp(-1.5))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_far_margins_stay_finite():
    far = jnp.array([1e4, -1e4])
    found = losses.sigmoid(far, -far, beta=1.0, label_smoothing=0.1)
    assert np.isfinite(found).all()
    gradient = jax.grad(lambda x: losses.sigmoid(x, -x, beta=1.0, label_smoothing=0.1).sum())(far)
    assert np.isfinite(gradient).all()


def test_agrees_with_the_table(shared):
    """Values and gradients in float64, agreed with TRL to 5e-15."""
    table = json.loads((shared / "golden" / "preference_losses.json").read_text())
    cases = [case for case in table["cases"] if case["loss"] in ("sigmoid", "cdpo", "dpop")]
    known = {"beta", "label_smoothing", "dpop_lambda"}
    cases = [case for case in cases if case["params"].keys() <= known]
    assert len(cases) >= 6 and any(case["loss"] == "dpop" for case in cases)
    for case in cases:
        logps = {name: jnp.asarray(x) for name, x in table["sets"][case["set"]].items()
                 if name.endswith("logps")}  # fmt: skip
        config = tiny.get_config()
        config.loss = "dpop" if case["loss"] == "dpop" else "sigmoid"
        for name, value in case["params"].items():
            if name != "label_smoothing" or case["loss"] == "cdpo":
                config[name] = value

        def mean_loss(chosen, rejected, logps=logps, config=config):
            each = losses.of(config)(
                chosen - logps["ref_chosen_logps"], rejected - logps["ref_rejected_logps"]
            )
            return each.mean(), each

        given = logps["policy_chosen_logps"], logps["policy_rejected_logps"]
        (_, each), gradients = jax.value_and_grad(mean_loss, (0, 1), has_aux=True)(*given)
        np.testing.assert_allclose(each, case["losses"], rtol=1e-5, atol=1e-6)
        for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
            expected = case.get(f"grad_mean_loss_wrt_policy_{side}_logps")
            if expected is None:  # where a margin stands on dpop's kink
                assert case["loss"] == "dpop"
                continue
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)

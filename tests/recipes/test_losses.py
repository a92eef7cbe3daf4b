"""Losses by hand, and against the agreed table."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes import losses


def test_sigmoid_by_hand():
    chosen, rejected = jnp.array([0.0, 2.0]), jnp.array([0.0, -1.0])
    found = losses.sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.0)
    np.testing.assert_allclose(found, [math.log(2), math.log1p(math.exp(-1.5))], rtol=1e-6)
    smoothed = losses.sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.25)
    wrong = math.log1p(math.exp(1.5))
    expected = 0.75 * math.log1p(math.exp(-1.5)) + 0.25 * wrong
    assert float(smoothed[1]) == pytest.approx(expected, rel=1e-6)


def test_far_margins_stay_finite():
    far = jnp.array([1e4, -1e4])
    found = losses.sigmoid(far, -far, beta=1.0, label_smoothing=0.1)
    assert np.isfinite(found).all()
    gradient = jax.grad(lambda x: losses.sigmoid(x, -x, beta=1.0, label_smoothing=0.1).sum())(far)
    assert np.isfinite(gradient).all()


def test_agrees_with_the_table(shared):
    """Values and gradients in float64, agreed with TRL to 5e-15."""
    table = json.loads((shared / "golden" / "preference_losses.json").read_text())
    cases = [case for case in table["cases"] if case["loss"] in ("sigmoid", "cdpo")]
    cases = [case for case in cases if case["params"].keys() <= {"beta", "label_smoothing"}]
    assert len(cases) >= 4
    for case in cases:
        logps = {name: jnp.asarray(x) for name, x in table["sets"][case["set"]].items()
                 if name.endswith("logps")}  # fmt: skip
        smoothing = case["params"].get("label_smoothing", 0.0) if case["loss"] == "cdpo" else 0.0

        def mean_loss(chosen, rejected, logps=logps, case=case, smoothing=smoothing):
            each = losses.sigmoid(
                chosen - logps["ref_chosen_logps"],
                rejected - logps["ref_rejected_logps"],
                beta=case["params"]["beta"],
                label_smoothing=smoothing,
            )
            return each.mean(), each

        given = logps["policy_chosen_logps"], logps["policy_rejected_logps"]
        (_, each), gradients = jax.value_and_grad(mean_loss, (0, 1), has_aux=True)(*given)
        np.testing.assert_allclose(each, case["losses"], rtol=1e-5, atol=1e-6)
        for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
            expected = case[f"grad_mean_loss_wrt_policy_{side}_logps"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)

"""Losses by hand, and against the agreed table."""

import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.configs import tiny
from recipes.preference import losses
from recipes.training import settings
from recipes.training.update import Answers
from tests.conftest import given_by


def answers(chosen, rejected, reference=0.0):
    """With these log-ratios."""
    ratios = jnp.stack([chosen, rejected], axis=-1)
    rated = jnp.full(ratios.shape, jnp.nan)
    tokens = jnp.ones(ratios.shape, jnp.int32)
    return Answers(ratios + reference, jnp.zeros(ratios.shape) + reference, tokens, rated)


def test_sigmoid_by_hand():
    both = answers(jnp.array([0.0, 2.0]), jnp.array([0.0, -1.0]))
    found = losses.sigmoid(both, beta=0.5, label_smoothing=0.0)
    np.testing.assert_allclose(found, [math.log(2), math.log1p(math.exp(-1.5))], rtol=1e-6)
    smoothed = losses.sigmoid(both, beta=0.5, label_smoothing=0.25)
    wrong = math.log1p(math.exp(1.5))
    expected = 0.75 * math.log1p(math.exp(-1.5)) + 0.25 * wrong
    assert float(smoothed[1]) == pytest.approx(expected, rel=1e-6)


def test_dpop_by_hand():
    """A chosen answer that has become less likely costs; one that has not does not."""
    both = answers(jnp.array([-1.0, 2.0]), jnp.array([-3.0, -1.0]))
    found = losses.dpop(both, beta=0.5, label_smoothing=0.0, dpop_lambda=4.0)
    expected = [math.log1p(math.exp(-0.5 * (2.0 - 4.0))), math.log1p(math.exp(-1.5))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_loss_takes_the_settings_that_its_parameters_name():
    given = given_by(tiny.get_config(), beta=0.5, label_smoothing=0.25, dpop_lambda=4.0)
    both = answers(jnp.array([-1.0, 2.0]), jnp.array([-3.0, -1.0]), reference=-50.0)
    sigmoid, dpop = (losses.objective(given | {"loss": name}) for name in ("sigmoid", "dpop"))
    assert sigmoid.beta == dpop.beta == 0.5
    by_hand = losses.sigmoid(both, beta=0.5, label_smoothing=0.25)
    np.testing.assert_array_equal(sigmoid.loss(both), by_hand)
    by_hand = losses.dpop(both, beta=0.5, label_smoothing=0.25, dpop_lambda=4.0)
    np.testing.assert_array_equal(dpop.loss(both), by_hand)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_loss_is_first_what_it_says(name, smoothing):
    """Where policy and reference are equal, whatever beta is."""
    given = given_by(tiny.get_config(), loss=name, label_smoothing=smoothing, dpop_lambda=5.0)
    equal = answers(jnp.zeros(3), jnp.zeros(3), reference=-50.0)
    for beta in (0.01, 0.1, 2.0):
        objective = losses.objective(given | {"beta": beta})
        np.testing.assert_allclose(objective.loss(equal), objective.first, rtol=1e-6)


def test_the_options_of_every_loss_are_settings():
    """And a setting that it does not take is one of other losses, or its use is refused nowhere."""
    table = settings.PREFERENCE.items()
    for name, loss in losses.LOSSES.items():
        options = inspect.signature(loss.of).parameters.values()
        taken = {p.name for p in options if p.kind is p.KEYWORD_ONLY}
        told = {s for s, one in table if s != "loss" and name in (one.of_losses or (name,))}
        assert taken == told, name


def test_far_margins_stay_finite():
    far = jnp.array([1e4, -1e4])
    loss = lambda x: losses.sigmoid(answers(x, -x), beta=1.0, label_smoothing=0.1)
    assert np.isfinite(loss(far)).all()
    gradient = jax.grad(lambda x: loss(x).sum())(far)
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
        given = given_by(tiny.get_config(), loss="dpop" if case["loss"] == "dpop" else "sigmoid")
        for name, value in case["params"].items():
            if name != "label_smoothing" or case["loss"] == "cdpo":
                given[name] = value

        def mean_loss(chosen, rejected, logps=logps, given=given):
            theirs = jnp.stack([logps["ref_chosen_logps"], logps["ref_rejected_logps"]], axis=-1)
            both = answers(chosen, rejected)._replace(reference=theirs)
            each = losses.objective(given).loss(both)
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

"""TR-DPO: a reference that follows the policy, by hand and in runs."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes import dpo
from recipes.preference import objectives, reference
from recipes.training import optimizer
from tests.conftest import check_resume, few_pairs, given_by, records


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_by_hand(share):
    descent = optimizer.followed(optax.sgd(0.5), 2, share)
    weights = {"w": jnp.array([4.0, -2.0])}
    state = descent.init(weights)
    ours, theirs = np.array([4.0, -2.0]), np.array([4.0, -2.0])
    for step in range(1, 6):
        gradient = np.array([1.0, step])
        changes, state = descent.update({"w": jnp.asarray(gradient)}, state, weights)
        weights = optax.apply_updates(weights, changes)
        ours = ours - 0.5 * gradient
        if step % 2 == 0:
            theirs = theirs + share * (ours - theirs)
        np.testing.assert_allclose(weights["w"], ours, rtol=1e-6)
        np.testing.assert_allclose(optimizer.reference_of(state)["w"], theirs, rtol=1e-6)
        if share == 1 and step % 2 == 0:
            np.testing.assert_array_equal(optimizer.reference_of(state)["w"], weights["w"])


@pytest.fixture
def config(tiny_config, tmp_path):
    config = tiny_config
    config.train_data, config.validation = (
        few_pairs(tmp_path, 16),
        {"some": few_pairs(tmp_path, 16)},
    )
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 4, 0.0
    config.learning_rate, config.steps_per_checkpoint, config.steps_per_eval = 1e-3, 1, 2
    config.steps_per_hf_export, config.hf_save_dtype = None, "float32"
    with config.unlocked():
        config.reference_sync_steps, config.reference_mixup_alpha = 2, 1.0
    return config


@pytest.mark.full
def test_a_reference_that_has_caught_up_is_the_policy(config):
    dpo.train(config)
    losses = {
        one["step"]: one["train/dpo_loss"] for one in records(config) if "train/dpo_loss" in one
    }
    assert losses[1] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < math.log(2) - 1e-4
    assert losses[3] == pytest.approx(math.log(2), abs=1e-6)  # after the second update
    held_out = [one for one in records(config) if "eval/some/dpo_loss" in one]
    assert held_out[0]["eval/some/dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out[0]["eval/some/dpo_reward_margin"] == 0


WITH_MORE = {"adapter": {"rank": 4}, "ema_decay": 0.5}


@pytest.mark.full
@pytest.mark.parametrize("other", [{}, WITH_MORE])
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, capfd, other):
    with config.ignore_type(), config.unlocked():
        config.reference_mixup_alpha = 0.6
        for name, value in other.items():
            config[name] = value
    dpo.train(config)
    check_resume(dpo.train, config, tmp_path / "parts", capfd, after=3)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"reference_mode": "cached"}, "copy of the policy: leave out"),
        ({"reference_model_path": "other"}, "copy of the policy: leave out"),
        ({"reference_sync_steps": None}, "reference_mixup_alpha has no effect without"),
        ({"keep_best": "some/dpo_accuracy"}, "use dpo_margin_policy"),
        ({"loss": "simpo", "beta": 2.0}, "reference_sync_steps=2 has no effect"),
    ],
)
def test_what_does_not_follow_is_refused(config, other, words):
    given = given_by(config) | other
    with pytest.raises(ValueError, match=words):
        reference.wanted(given, objectives.objective(given))

"""What is said aloud, and when."""

import json

import jax.numpy as jnp
import pytest

from recipes import metrics, settings
from recipes.configs import tiny


def readings(chosen, rejected, accuracy):
    names = "dpo_chosen_reward", "dpo_rejected_reward", "dpo_accuracy"
    for values in zip(chosen, rejected, accuracy, strict=True):
        yield {f"train/{name}": value for name, value in zip(names, values, strict=True)}


def said(*figures):
    trend = metrics.Trend()
    return [trend.read(reading) is not None for reading in readings(*figures)]


def test_both_rewards_falling_is_said_once_with_the_remedies():
    falling = [-0.1, -0.2, -0.3, -0.4], [-0.2, -0.5, -0.9, -1.4], [0.5, 0.6, 0.7, 0.8]
    assert said(*falling) == [False, False, True, False]
    trend = metrics.Trend()
    told = [trend.read(reading) for reading in readings(*falling)][2]
    assert "--config.loss=dpop" in told and "--config.beta" in told


@pytest.mark.parametrize(
    "figures",
    [
        ([-0.1, -0.2, -0.1], [-0.2, -0.5, -0.9], [0.5, 0.6, 0.7]),  # chosen came back
        ([0.3, 0.2, 0.1], [-0.2, -0.5, -0.9], [0.5, 0.6, 0.7]),  # still above the reference
        ([-0.1, -0.2, -0.3], [-0.2, -0.1, 0.0], [0.5, 0.6, 0.7]),
        ([-0.1, -0.2, -0.3], [-0.2, -0.5, -0.9], [0.7, 0.6, 0.5]),  # that is seen anyway
    ],
)
def test_what_is_no_such_trend_is_not_said(figures):
    assert not any(said(*figures))


def test_the_best_is_the_highest_or_the_lowest():
    config = tiny.get_config()
    figures = {"eval/heldout/dpo_loss": 0.25, "eval/heldout/dpo_accuracy": float("nan")}
    assert settings.score(config, figures) is None
    config.keep_best = "heldout/dpo_loss"
    assert settings.score(config, figures) == -0.25
    assert settings.score(config, {}) is None
    config.keep_best = "heldout/dpo_accuracy"
    assert settings.score(config, figures) is None
    config.keep_best = "heldout/dpo_reward_margin"
    assert settings.score(config, {"eval/heldout/dpo_reward_margin": 0.5}) == 0.5


def test_the_reward_margin_is_beta_times_what_chosen_gained_over_rejected():
    policy, reference = jnp.array([[-1.0, -5], [-2, -3]]), jnp.array([[-2.0, -4], [-2, -2]])
    here = jnp.array([True, True])
    loss = lambda chosen, rejected: chosen - rejected
    values = metrics.preference(policy, reference, here, loss=loss, beta=0.1)
    assert float(values["dpo_reward_margin"]) == pytest.approx(0.1 * ((1 + 1) + (0 + 1)) / 2)
    assert float(values["dpo_margin_policy"]) == pytest.approx((4 + 1) / 2)
    one = metrics.preference(policy, reference, here.at[1].set(False), loss=loss, beta=0.1)
    assert float(one["dpo_reward_margin"]) == pytest.approx(0.2)


def test_the_line_has_the_figures_to_watch():
    figures = {"dpo_loss": 0.5, "dpo_margin_policy": 7.0, "dpo_reward_margin": 0.25}
    figures = {f"eval/heldout/{name}": value for name, value in figures.items()}
    told = metrics.line(20, 60, figures)
    assert told == "step 20/60     eval/heldout     dpo_loss 0.5  dpo_reward_margin 0.25"


def test_held_out_figures_of_a_step_are_read_back(tmp_path):
    assert metrics.of_held_out(tmp_path, 2) == {}
    records = [
        {"step": 2, "train/dpo_loss": 0.5},
        {"step": 2, "eval/heldout/dpo_loss": 0.25, "eval/heldout/odd": "word"},
        {"step": 4, "eval/heldout/dpo_loss": 0.125},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"st')
    assert metrics.of_held_out(tmp_path, 2) == {"eval/heldout/dpo_loss": 0.25}
    assert metrics.of_held_out(tmp_path, 3) == {}

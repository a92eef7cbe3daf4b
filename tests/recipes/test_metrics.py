"""What is said aloud, and when."""

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

"""Learning rates are what their schedules say."""

import numpy as np
import pytest

from recipes.configs import tiny
from recipes.training import optimizer, settings
from tests.conftest import optimizer_settings_of


@pytest.fixture
def config():
    return tiny.get_config()


def rates(config, total, **other):
    config.update_from_flattened_dict(other)
    schedule = optimizer.schedule_of(optimizer_settings_of(config), total)
    return np.array([float(schedule(i)) for i in range(total)]) / config.learning_rate


def test_marins_schedule(config):
    """Warm-up a tenth, plateau, decay over the last tenth."""
    found = rates(config, 100, warmup=0.1, cooldown=0.1)
    np.testing.assert_allclose(found[:11], np.arange(11) / 10, atol=1e-6)
    np.testing.assert_allclose(found[10:91], 1, atol=1e-6)
    np.testing.assert_allclose(found[90:], 1 - np.arange(10) / 10, atol=1e-6)


def test_no_cooldown_decays_all_the_way(config):
    found = rates(config, 100, warmup=10.0)
    np.testing.assert_allclose(found[10:], 1 - np.arange(90) / 90, atol=1e-5)
    cosine = rates(config, 100, warmup=0.0, lr_schedule="cosine", min_lr_ratio=0.1)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    np.testing.assert_allclose(cosine, expected, atol=1e-5)
    constant = rates(config, 20, warmup=0.5, lr_schedule="constant")
    np.testing.assert_allclose(constant[10:], 1)


@pytest.mark.parametrize("warmup", [0, 10])
def test_inverse_sqrt_is_that_of_transformers(config, warmup):
    torch, optimization = map(pytest.importorskip, ("torch", "transformers.optimization"))
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = optimization.get_inverse_sqrt_schedule(theirs, warmup)
    expected = []
    for _ in range(100):
        expected += schedule.get_last_lr()
        theirs.step()
        schedule.step()
    found = rates(config, 100, warmup=float(warmup), lr_schedule="inverse_sqrt")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_inverse_sqrt_after_a_plateau_and_above_its_floor(config):
    found = rates(
        config, 100, warmup=10.0, cooldown=50.0, min_lr_ratio=0.5, lr_schedule="inverse_sqrt"
    )
    np.testing.assert_allclose(found[10:51], 1, atol=1e-6)
    np.testing.assert_allclose(found[60], np.sqrt(10 / 20), rtol=1e-5)
    np.testing.assert_allclose(
        found[79:], np.maximum(np.sqrt(10 / np.arange(39, 60)), 0.5), rtol=1e-5
    )


def test_warmup_and_cooldown_must_fit(config):
    config.warmup, config.cooldown = 60.0, 60.0
    with pytest.raises(ValueError, match="do not fit into 100 steps"):
        optimizer.schedule_of(optimizer_settings_of(config), 100)


@pytest.mark.parametrize("name", settings.ALL["lr_schedule"].choices)
def test_every_schedule_is_one(config, name):
    assert rates(config, 10, lr_schedule=name, warmup=0.0)[0] == pytest.approx(1)

"""What a plan says of the rate, and what is refused before any long work."""

import dataclasses
import json

import pytest

from checkpoints_io.errors import BadInput
from recipes.configs import tiny
from recipes.training import optimizer, plan
from tests.conftest import given_by, optimizer_settings_of, small_config
from tests.zoo import twins
import zoo
from zoo import qwen3_5


@pytest.fixture
def config():
    config = tiny.get_config()
    config.learning_rate = 5e-5
    return config


def test_rows_that_devices_cannot_share_are_refused(config):
    refuse = lambda model, length, context: plan.refuse_cut_rows(
        given_by(config, row_length=length), model, context
    )
    said = json.loads(twins.config_of("qwen3_5_text", "plain").to_json_string(use_diff=True))
    config_of = qwen3_5.Config.from_hf(said)
    full = dataclasses.replace(config_of, layer_types=("full_attention",) * len(config_of.kinds))
    llama, recurrent = zoo.abstract(small_config()), zoo.abstract(config_of)
    refuse(recurrent, 640, 1)
    refuse(zoo.abstract(full), 768, 4)
    for length in (None, 768):
        refuse(llama, length, 4)
    told = r"row_length=640 cannot be split over .*mesh.context=4 devices.*of 256 .e.g. 768"
    with pytest.raises(BadInput, match=told):
        refuse(llama, 640, 4)
    told = r"mesh.context=4: qwen3_5_text has recurrent layers \(inputs, memory\)"
    with pytest.raises(BadInput, match=told):
        refuse(recurrent, None, 4)


def test_a_run_that_would_learn_nothing_is_refused(config):
    config.warmup = 1.0
    with pytest.raises(ValueError, match="the only step of the run is taken there"):
        optimizer.schedule_of(optimizer_settings_of(config), 1)
    config.warmup, config.learning_rate = 0.0, 1e-50
    with pytest.raises(ValueError, match="learning_rate=1e-50 is 0 in float32"):
        optimizer.schedule_of(optimizer_settings_of(config), 1)
    for steps, warmup in ((10**30, 0.0), (60, 1e300)):
        config.warmup = warmup
        with pytest.raises(ValueError, match="a run must have fewer than"):
            optimizer.schedule_of(optimizer_settings_of(config), steps)
    config.warmup, config.learning_rate = 0.1, 1e-5  # which rounds to no step
    assert float(optimizer.schedule_of(optimizer_settings_of(config), 1)(0)) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("other", "steps", "told"),
    [
        ({}, 60, "0 to 5e-05 over 6 steps, then linear from 5e-05 to 0 over 54"),
        ({"cooldown": 0.1, "lr_schedule": "cosine", "min_lr_ratio": 0.1}, 60,
         "0 to 5e-05 over 6 steps, then 5e-05, then cosine from 5e-05 to 5e-06 over 6"),
        ({"lr_schedule": "constant", "warmup": 0.0}, 60, "5e-05"),
        ({"lr_schedule": "inverse_sqrt", "warmup": 12.0}, 48,
         "0 to 5e-05 over 12 steps, then inverse_sqrt from 5e-05 to 2.5e-05 over 36"),
        ({}, 1, "linear from 5e-05 to 0 over 1"),
    ],
)  # fmt: skip
def test_the_rate_is_told(config, other, steps, told):
    config.update_from_flattened_dict(other)
    assert plan._schedule(optimizer_settings_of(config), steps) == told

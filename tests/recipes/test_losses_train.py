"""Every loss trains the model that is shipped, and begins where it promises to."""

import math

import pytest

from recipes import dpo
from recipes.data.rows.source import UNPAIRED
from recipes.preference import losses
from recipes.training import settings
from tests.conftest import records
from tests.losses_on_devices import OPTIONS
from tests.recipes import test_kto

RATES = {"ipo": 1e-3, "ipo_sum": 1e-4, "sppo_hard": 1e-4}


@pytest.mark.full
def test_a_coupled_loss_pulls_the_weights_that_are_trained(tiny_config, tmp_path):
    """And not their average, which is what is evaluated."""
    tiny_config.num_train_steps, tiny_config.train_batch_size, tiny_config.warmup = 3, 8, 0.0
    tiny_config.learning_rate, tiny_config.validation, tiny_config.max_eval_pairs = 1e-3, {}, None
    tiny_config.loss = "aot"
    found = []
    for decay in (None, 0.9):
        config = tiny_config.copy_and_resolve_references()
        config.directory, config.ema_decay = str(tmp_path / str(decay)), decay
        dpo.train(config)
        found.append([one["train/dpo_loss"] for one in records(config)])
    assert found[0] == found[1]
    assert len({*found[0]}) == 3  # the pairs of each step meet other weights


@pytest.mark.full
@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_trains(tiny_config, tmp_path, name):
    config = tiny_config
    given = {"loss": name, "beta": 0.1} | OPTIONS.get(name, {})
    with config.ignore_type(), config.unlocked():
        for option, value in given.items():
            assert option in settings.PREFERENCE
            config[option] = value
    if name in UNPAIRED:
        made = lambda name: test_kto.write(tmp_path / f"{name}.jsonl", test_kto.rows(name))
        config.train_data, config.validation.heldout = made("train"), made("heldout")
    config.num_train_steps = 40
    config.learning_rate = RATES.get(name, 5e-4)
    config.steps_per_checkpoint, config.sample_tokens, config.steps_per_log = None, 0, 1
    config.steps_per_eval, config.max_eval_pairs = None, None
    dpo.train(config)
    found = records(config)
    first = next(one for one in found if "train/dpo_loss" in one)["train/dpo_loss"]
    last = next(one for one in reversed(found) if "eval/heldout/dpo_accuracy" in one)
    options = {key: value for key, value in given.items() if key != "loss"}
    if (promised := losses.FIRST.get(name)) and math.isfinite(promised(**options)):
        assert first == pytest.approx(promised(**options), rel=1e-4)  # as the gate has it
    assert math.isfinite(last["eval/heldout/dpo_loss"])
    accuracy, margin = (last[f"eval/heldout/dpo_{x}"] for x in ("accuracy", "reward_margin"))
    print(f"{name}: first loss {first:.4f}, held out: accuracy {accuracy:.3f}, margin {margin:.3f}")
    assert accuracy > 0.7

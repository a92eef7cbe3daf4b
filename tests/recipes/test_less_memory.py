"""Runs that train all weights on less memory, or some of them: as they begin, and resumed."""

import math
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

from recipes import dpo
from tests.conftest import TINY, exported, held, records, stopped_after

LAST_LAYERS = r".*layers\.[23]\.(self_attn|mlp).*|.*layers\.0\.mlp\.up.*|model\.norm\.weight"


def training(config):
    """Figures per step, without those of the clock."""
    return [one for one in records(config) if "train/dpo_loss" in one]


def whole_and_parted(config, tmp_path):
    """The same run twice: in one piece, and stopped after its second step and resumed."""
    config.num_train_steps, config.steps_per_checkpoint, config.train_batch_size = 3, 2, 8
    config.validation, config.max_eval_pairs = {}, None
    config.hf_save_dtype, config.steps_per_hf_export = "f32", 3
    whole, parted = (config.copy_and_resolve_references() for _ in range(2))
    whole.directory, parted.directory = str(tmp_path / "whole"), str(tmp_path / "parted")
    dpo.train(whole)
    with stopped_after(2):
        dpo.train(parted)
    dpo.train(parted)
    return whole, parted


def refuse_far_from_float32(found, config):
    """The losses are those of float32 moments, but for a small share of what was learnt."""
    config.directory, config.optimizer = f"{config.directory}-exact", "adamw"
    dpo.train(config)
    losses = lambda some: np.array([one["train/dpo_loss"] for one in some])
    exact = losses(training(config))
    learnt = np.abs(exact - math.log(2)).max()
    assert learnt > 1e-4
    np.testing.assert_allclose(losses(found), exact, rtol=0, atol=0.05 * learnt)


FULL = pytest.mark.full


@pytest.mark.full
@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"optimizer": "adamw8bit"}, id="moments in 8 bits", marks=FULL),
        pytest.param({"optimizer": "muon"}, id="moments of two kinds", marks=FULL),
        pytest.param({"optimizer": "adafactor"}, id="moments by row and column", marks=FULL),
        pytest.param({"ema_decay": 0.5}, id="an average"),
        pytest.param(
            {"trainable": LAST_LAYERS, "mp": "p=f32,c=bfloat16"}, id="some layers", marks=FULL
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_config, tmp_path, capsys, other):
    with tiny_config.ignore_type(), tiny_config.unlocked():
        for name, value in other.items():
            tiny_config[name] = value
    whole, parted = whole_and_parted(tiny_config, tmp_path)
    if other.get("optimizer") == "adamw8bit":
        refuse_far_from_float32(training(whole), tiny_config.copy_and_resolve_references())
    told = capsys.readouterr().out
    assert "resuming from step 2" in told
    assert "must agree to the last bit" in told
    assert training(parted)[-1] == training(whole)[-1]
    first = training(whole)[0]
    assert first["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    ours, theirs = exported(whole, 3), exported(parted, 3)
    before = safetensors.numpy.load_file(TINY / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
        moved = not np.array_equal(array, before[name].astype(np.float32))
        assert moved == bool(re.fullmatch(other.get("trainable", ".*"), name)), name
    checkpoints = pathlib.Path(whole.directory) / "checkpoints"
    saved = max(held(checkpoints / "2"), held(checkpoints / "3"))
    if "optimizer" in other:  # 4 bytes of a weight and its moments; of AdamW there are 12
        bytes_of = {"adamw8bit": 6, "muon": 8, "adafactor": 4}[other["optimizer"]]
        assert saved < (bytes_of + 1) * sum(x.size for x in before.values())
    if "trainable" in other:
        trained = sum(x.size for name, x in before.items() if re.fullmatch(LAST_LAYERS, name))
        assert saved < 12 * trained + 100_000 < 0.7 * 12 * sum(x.size for x in before.values())

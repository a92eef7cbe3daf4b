"""Runs on ranked lists, from rows to a model; what has no effect or no order is said."""

import json
import math
import re

import ml_collections
import numpy as np
import pytest

from recipes import dpo
from recipes.training import checks, settings
from tests.conftest import TINY, check_resume, records


def rows(count):
    """As UltraFeedback has them: some ranked alike, some without a score, one with two answers."""
    pairs = (TINY / "train.jsonl").read_text().splitlines()[:count]
    made = []
    for i, pair in enumerate(map(json.loads, pairs)):
        wanted, unwanted = (pair[name][-1]["content"] for name in ("chosen", "rejected"))
        said = [wanted, f"{wanted} Or so.", f"{unwanted} Go on.", unwanted]
        scores = [9.0, 7.5, 7.5 if i == 1 else 3.0, None if i == 2 else 1.0]
        answers = [
            {"model": str(n), "response": text, "overall_score": score}
            for n, (text, score) in enumerate(zip(said, scores, strict=True))
        ]
        asked = pair["chosen"][0]["content"]
        kept = answers[:: 3 if i == 3 else 1]
        made.append({"instruction": asked, "completions": kept[::-1] if i % 2 else kept})
    made.append({"instruction": "Which?", "completions": [answers[0], answers[0]]})
    return "".join(json.dumps(row) + "\n" for row in made)


@pytest.fixture
def config(tiny_config, tmp_path) -> ml_collections.ConfigDict:
    config = tiny_config
    (tmp_path / "lists.jsonl").write_text(rows(24))
    config.train_data = str(tmp_path / "lists.jsonl")
    config.validation, config.validation_split_fraction = {}, 0.2
    config.data.answers = 4
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 3, 0.0
    config.learning_rate, config.steps_per_checkpoint, config.sample_tokens = 1e-3, 1, 4
    config.steps_per_hf_export = None
    return config


@pytest.mark.full
def test_lists_are_trained_and_resumed(config, tmp_path, capfd):
    """Plackett-Luce beside a term of the best answer, its reference resident and cached."""
    config.loss = "plackett_luce,sft=0.1"
    dpo.train(config)
    told = capfd.readouterr().out
    assert "1 with answers of equal rank" in told
    assert "1 with answers that have no score or rank" in told
    assert "1 dropped: no answer is ranked above another" in told
    assert re.search(r"lists +\d+ to train on", told)
    found = records(config)
    first, last = found[0], found[-1]
    assert math.log(2) < first["train/loss_plackett_luce"] <= math.log(24) + 1e-4
    assert first["train/dpo_reward_margin"] == 0
    assert last["eval/validation/dpo_accuracy"] > 0.5
    assert {f"train/length_answer_{i}" for i in (1, 2, 3, 4)} <= first.keys()
    assert first["train/score_answer_1"] == 9.0

    check_resume(dpo.train, config, tmp_path / "parts", capfd, after=2)

    cached = config.copy_and_resolve_references()
    cached.directory, cached.reference_mode = str(tmp_path / "cached"), "cached"
    cached.reference_cache = str(tmp_path / "cache")
    dpo.train(cached)
    names = ("dpo_loss", "dpo_reward_margin", "drift_chosen")
    for name in names:
        of = lambda some, name=name: [
            one[f"train/{name}"] for one in some if f"train/{name}" in one
        ]
        np.testing.assert_allclose(of(records(cached)), of(found), atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("which", ["all", "best"])
def test_pairs_of_lists_begin_where_pairs_do(config, which):
    """The gate compares the first loss with ln 2."""
    config.list_pairs, config.num_train_steps = which, 1
    dpo.train(config)
    assert records(config)[0]["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_more_answers_than_any_row_has(config, tmp_path):
    config.train_data = str(TINY / "train.jsonl")
    with pytest.raises(ValueError, match=r"data.answers=4 has no effect: no row has more than two"):
        dpo.train(config)


def test_other_recipes_refuse_lists(tmp_path):
    from recipes.configs import tiny, tiny_sft

    config = tiny_sft.get_config()
    with config.ignore_type(), config.unlocked():
        config.data["answers"] = 4
    with pytest.raises(ValueError, match=r"answers=4 has no effect: this run trains on single"):
        checks.checked(config, settings.table_of(settings.SFT))
    config = tiny.get_config()
    config.data.answers, config.reference_model_path = 4, str(TINY / "model")
    with pytest.raises(ValueError, match="only pairs are scored"):
        checks.checked(config, settings.table_of(settings.SCORE))
    config.data.answers = 1
    with pytest.raises(ValueError, match=r"data\.answers must be from 2 to 64, not 1"):
        checks.checked(config, settings.table_of(settings.DPO))

"""Runs on answers without a partner, each wanted or unwanted: from rows to a model."""

import json
import math

import ml_collections
import numpy as np
import pytest

from recipes import dpo, sft
from recipes.configs import tiny, tiny_sft
from recipes.data import run_data
from recipes.data.ids import mismatched
from recipes.data.ids.examples import AnswerIds
from recipes.training import checks, settings, written
from tests.conftest import TINY, check_resume, records


def rows(name, count=None):
    """As TRL has them; each prompt twice, with a good answer and a bad one."""
    pairs = map(json.loads, (TINY / f"{name}.jsonl").read_text().splitlines()[:count])
    return [
        {"prompt": pair[side][:-1], "completion": pair[side][-1:], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]


def write(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


@pytest.fixture
def config(tiny_config, tmp_path) -> ml_collections.ConfigDict:
    config = tiny_config
    config.train_data = write(tmp_path / "rows.jsonl", rows("train", 24))
    config.validation, config.validation_split_fraction = {}, 0.2
    config.loss, config.token_cache = "kto", None
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 3, 0.0
    config.learning_rate, config.steps_per_checkpoint, config.sample_tokens = 1e-3, 1, 4
    config.steps_per_hf_export = None
    return config


@pytest.mark.full
def test_answers_without_a_partner_are_trained_and_resumed(config, tmp_path, capfd):
    with config.ignore_type(), config.unlocked():
        config.undesirable_weight = 1.5
    dpo.train(config)
    told = capfd.readouterr().out
    assert "layout prompt_answer, recognised from the columns" in told
    assert "48 of 48 rows used" in told
    assert "answers      " in told
    assert "wanted    ⟦" in told
    found = records(config)
    first, last = found[0], found[-1]
    wanted = first["train/score_answer"]  # the share of the update
    assert first["train/dpo_loss"] == pytest.approx((wanted + 1.5 * (1 - wanted)) / 2, abs=1e-5)
    assert first["train/kl_mismatched"] == 0
    assert last["eval/validation/dpo_reward_margin"] > 0
    assert last["eval/validation/dpo_accuracy"] > 0.5
    check_resume(dpo.train, config, tmp_path / "parts", capfd, after=2)


@pytest.mark.full
def test_small_micro_batches_are_one(config, tmp_path):
    """The reference point is that of the update, however it is split; a reference may be cached."""
    config.steps_per_hf_export = -1
    # Where most are wanted, answers gain after other prompts, too, from the fourth step on.
    config.num_train_steps = 5
    most = [row | {"label": i % 12 > 0} for i, row in enumerate(rows("train", 24))]
    config.train_data = write(tmp_path / "most.jsonl", most)
    whole = config.copy_and_resolve_references()
    dpo.train(whole)
    parts = config.copy_and_resolve_references()
    parts.directory = str(tmp_path / "parts")
    parts.row_length, parts.per_device_parallelism, parts.min_pack_fill = 256, 1, 0.0
    dpo.train(parts)
    cached = parts.copy_and_resolve_references()
    cached.directory, cached.reference_mode = str(tmp_path / "cached"), "cached"
    cached.reference_cache = str(tmp_path / "cache")
    dpo.train(cached)

    def of(run):
        names = ("dpo_loss", "kl_mismatched", "gradient_norm", "token_accuracy")
        return [
            [one[f"train/{name}"] for name in names]
            for one in records(run)
            if "train/dpo_loss" in one
        ]

    assert max(point for _, point, *_ in of(whole)) > 0.1
    np.testing.assert_allclose(of(parts), of(whole), rtol=5e-5, atol=5e-6)
    np.testing.assert_allclose(of(cached), of(parts), rtol=5e-4, atol=5e-5)


def ids(prompt, answer, wanted):
    array = lambda some: np.array(some, np.int32)
    scored = np.ones(len(answer), bool)
    return AnswerIds(0, array(prompt), array(answer), scored, (), (float(wanted),))


def test_every_answer_stands_beside_one_to_another_prompt():
    answers = [
        ids([1], [10, 11], True),
        ids([1], [12], False),
        ids([2, 2, 2], [13, 14, 15, 16], True),
        ids([1], [17], True),
    ]
    found = mismatched.beside(answers, max_length=5)
    beside = [[answer.ids.tolist() for answer in one.answers] for one in found]
    only = [13, 14, 15, 16]  # to another prompt than theirs
    assert beside[:2] + beside[3:] == [[[10, 11], only], [[12], only], [[17], only]]
    assert beside[2][0] == only
    assert beside[2][1] in ([10, 11], [12], [17])
    assert [one.ratings[0] for one in found] == [1, 0, 1, 1]
    short = mismatched.beside(answers, max_length=3)
    assert [one.answers[1].ids.tolist() for one in short[:2]] == [[13, 14], [13, 14]]
    with pytest.raises(ValueError, match="all rows have the same prompt: add rows"):
        mismatched.beside(answers[:2], max_length=5)


def test_partners_are_drawn_by_chance():
    """Whatever the order of the rows: by prompt and label, as unrolled pairs are, or by label."""
    for prompts in ([i // 2 for i in range(400)], [i % 200 for i in range(400)]):
        found = mismatched.partners([str(prompt).encode() for prompt in prompts])
        assert all(prompts[i] != prompts[at] for i, at in enumerate(found))
        assert 0.4 < np.mean([at % 2 for at in found]) < 0.6
        assert 0.4 < np.mean([at < 200 for at in found]) < 0.6
        assert len({*found}) > 390


def test_a_cut_answer_has_a_score():
    unscored = ids([2], [13, 14, 15], True)._replace(scored=np.array([False, False, True]))
    found = mismatched.joined(ids([1], [9], True), unscored, 3)
    assert found.answers[1].ids.tolist() == [13, 14]
    assert found.answers[1].scored.all()


def test_every_set_finds_its_partners_in_itself(tmp_path):
    path = write(tmp_path / "two.jsonl", rows("train", 40)[40:])
    config = kto_config()
    config.train_data = {
        "a": {"path": write(tmp_path / "a.jsonl", rows("train", 20)), "weight": 1.0},
        "b": {"path": path, "weight": 3.0},
    }
    config.validation = {}
    config.validation_split_fraction = 0.4
    data = read_with(config)
    sets = [*data.train, *data.held_out]
    assert len(sets) == 4
    for one in sets:
        own = {example.answers[0].ids.tobytes() for example in one.examples}
        assert {example.answers[1].ids.tobytes() for example in one.examples} <= own
    config.train_data["a"]["path"] = write(tmp_path / "one.jsonl", rows("train", 1))
    config.validation_split_fraction = None
    with pytest.raises(ValueError, match=r"^a: --config.loss=kto compares"):
        read_with(config)


@pytest.mark.parametrize("first", [dpo, sft])
def test_recipes_share_a_cache_of_tokens_and_no_labels(tmp_path, first):
    """Fine-tuning leaves out half of the rows, whichever comes first."""
    path, cache = write(tmp_path / "rows.jsonl", rows("train", 8)), str(tmp_path / "tokens")
    counts = {}
    for recipe in (first, sft if first is dpo else dpo):
        config = kto_config() if recipe is dpo else tiny_sft.get_config()
        with config.ignore_type(), config.unlocked():
            config.train_data, config.token_cache, config.validation = path, cache, {}
            config.data.columns = {"answer": "completion"}
        counts[recipe] = len(read_with(config).train[0].examples)
    assert counts == {dpo: 16, sft: 8}


def kto_config():
    config = tiny.get_config()
    config.loss, config.token_cache = "kto", None
    return config


def read_with(config):
    table = settings.DPO if "loss" in config else settings.SFT
    given = checks.checked(config, settings.table_of(table))
    return run_data.read(run_data.data_settings(given, TINY / "model", written.rows_of(given)))


def read(tmp_path, some, **changes):
    config = tiny.get_config() if changes.pop("is_kto", True) else tiny_sft.get_config()
    with config.ignore_type(), config.unlocked():
        config.train_data, config.token_cache = write(tmp_path / "some.jsonl", some), None
        config.validation = {}
        for name, value in changes.items():
            config[name] = value
    return read_with(config)


def test_labels_as_people_write_them(tmp_path):
    said = [True, False, 1, 0, "true", "False", "1", 0.0]
    some = [row | {"label": label} for row, label in zip(rows("train", 4), said, strict=True)]
    found = read(tmp_path, some, loss="kto").train[0].examples
    assert [one.ratings[0] for one in found] == [1, 0, 1, 0, 1, 0, 1, 0]
    tagged = [{**row, "kto_tag": row.pop("label")} for row in rows("train", 4)]
    assert [one.ratings[0] for one in read(tmp_path, tagged, loss="kto").train[0].examples] == [
        1, 0, 1, 0, 1, 0, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("label", ["good", 2, -1, 0.5, [True], math.nan, None])
def test_what_is_no_label_is_malformed(tmp_path, label):
    some = [*rows("train", 4), {**rows("train", 1)[0], "label": label}]
    with pytest.raises(ValueError, match=r"1 of 9 rows .* hold no answer: .*`label`"):
        read(tmp_path, some, loss="kto")
    found = read(tmp_path, some, loss="kto", **{"data": {"max_malformed_fraction": 0.5}})
    assert len(found.train[0].examples) == 8
    assert any("1" in line and "`label`" in line for line in found.sources[0].lines)


def test_pairs_are_no_single_answers(tmp_path):
    pairs = map(json.loads, (TINY / "train.jsonl").read_text().splitlines()[:4])
    with pytest.raises(ValueError, match=r"hold pairs, but --config.loss=kto .*bco_pair"):
        read(tmp_path, pairs, loss="kto")
    with pytest.raises(ValueError, match=r"is wanted \(`label`\).* trains on such rows with"):
        read(tmp_path, rows("train", 4), loss="sigmoid")


def test_fine_tuning_leaves_unwanted_answers_out(tmp_path):
    """Of labels that are true or false: a number may be the class of something else."""
    columns = {"columns": {"answer": "completion"}}
    found = read(tmp_path, rows("train", 4), is_kto=False, data=columns)
    assert len(found.train[0].examples) == 4
    assert any("4 dropped: its `label` is false" in line for line in found.sources[0].lines)
    words = [row | {"label": f" {row['label']}"} for row in rows("train", 4)]
    assert len(read(tmp_path, words, is_kto=False, data=columns).train[0].examples) == 4
    numbers = [row | {"label": int(row["label"])} for row in rows("train", 4)]
    assert len(read(tmp_path, numbers, is_kto=False, data=columns).train[0].examples) == 8
    cells = [row | {"label": str(int(row["label"]))} for row in rows("train", 4)]  # as CSV has them
    assert len(read(tmp_path, cells, is_kto=False, data=columns).train[0].examples) == 8
    columns["columns"]["label"] = "label"
    assert len(read(tmp_path, numbers, is_kto=False, data=columns).train[0].examples) == 4

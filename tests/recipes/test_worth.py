"""A weight and a margin of each pair, from columns that are named for it."""

import json
import math

import numpy as np
import pytest

from recipes import dpo
from recipes.configs import tiny
from recipes.data import run_data
from recipes.data.ids import examples, shards
from recipes.data.ids.counts import none
from recipes.data.packed.packing import Shape
from recipes.preference import objectives, reference_cache
from recipes.training import checks, settings, written
from tests.conftest import TINY, given_by, records

COLUMNS = {"weight": "worth", "margin": "gap"}


def rows(*worth):
    pairs = (TINY / "train.jsonl").read_text().splitlines()[: len(worth)]
    said = [{"worth": weight, "gap": margin} for weight, margin in worth]
    return [json.loads(pair) | more for pair, more in zip(pairs, said, strict=True)]


def write(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def read(tmp_path, some, columns):
    config = tiny.get_config()
    config.train_data, config.token_cache = write(tmp_path / "some.jsonl", some), None
    config.validation, config.data.columns = {}, columns
    given = checks.checked(config, settings.table_of(settings.DPO))
    return run_data.read(run_data.data_settings(given, TINY / "model", written.rows_of(given)))


def test_they_are_read_where_they_are_named(tmp_path):
    some = rows((2.0, 0.5), (1, 0), ("0.25", -0.1))
    found = read(tmp_path, some, COLUMNS)
    kept = found.train[0].examples
    assert [one.worth for one in kept] == [(2.0, 0.5), (1.0, 0.0), (0.25, -0.1)]
    assert "not read" not in found.sources[0].lines[0]
    shard = shards.from_bytes(shards.to_bytes(shards.Shard(kept, np.zeros(3, np.uint64), none())))
    assert [one.worth for one in shard.ids] == [one.worth for one in kept]

    same_names = [
        {"chosen": row["chosen"], "rejected": row["rejected"], "weight": 3} for row in some
    ]
    unnamed = read(tmp_path, same_names, {})
    assert {one.worth for one in unnamed.train[0].examples} == {(1.0, 0.0)}
    assert "not read: weight" in unnamed.sources[0].lines[0]
    named = read(tmp_path, same_names, {"weight": "weight"})
    assert {one.worth for one in named.train[0].examples} == {(3.0, 0.0)}
    plain, heavy = (examples.as_bytes(one.train[0].examples[0]) for one in (unnamed, named))
    assert plain != heavy


@pytest.mark.parametrize(
    ("worth", "why"),
    [
        ((-1, 0), "a negative number in `worth`, the weight of the pair"),
        ((None, 0), "no number in `worth`, the weight of the pair"),
        ((math.nan, 0), "no number in `worth`"),
        (("much", 0), "no number in `worth`"),
        ((1, math.inf), "no number in `gap`, the margin of the pair"),
        ((1, [1]), "no number in `gap`"),
    ],
)
def test_what_is_no_number_is_malformed(tmp_path, worth, why):
    with pytest.raises(ValueError, match=rf"1 of 3 rows .*{why}"):
        read(tmp_path, rows((1, 0), worth, (1, 0)), COLUMNS)


@pytest.mark.full
def test_a_run_begins_where_the_data_says(tiny_config, tmp_path):
    """The gate knows the first loss."""
    config = tiny_config
    worth = [(2.0, 0.5), (1.0, 0.0), (0.0, 9.0), (0.5, -0.3)] * 2
    config.train_data, config.data.columns = write(tmp_path / "rows.jsonl", rows(*worth)), COLUMNS
    config.validation, config.max_eval_pairs, config.sample_tokens = {}, None, 0
    config.train_batch_size, config.num_train_steps, config.warmup = 8, 2, 0.0
    config.min_pack_fill, config.steps_per_hf_export = 0.0, -1
    dpo.train(config)
    first, second = (one["train/dpo_loss"] for one in records(config)[:2])
    expected = sum(w * math.log1p(math.exp(m)) for w, m in worth) / len(worth)
    assert first == pytest.approx(expected, rel=1e-5)
    assert second < first


@pytest.mark.parametrize(
    ("loss", "name", "answers", "words"),
    [
        (
            "sigmoid,sft=0.2",
            "weight",
            2,
            r"`weight` for each pair, but --config.loss=sft is computed over all",
        ),
        ("aot", "weight", 2, r"`weight` for each pair, but --config.loss=aot is computed over all"),
        ("ipo", "margin", 2, r"`margin`, which has no effect with --config.loss=ipo"),
        ("sigmoid", "margin", 4, r"`margin` for each pair, but --config.data.answers=4"),
    ],
)
def test_what_they_mean_nothing_for_is_refused(tiny_config, loss, name, answers, words):
    config = tiny_config
    config.loss, config.data.columns, config.data.answers = loss, {name: "worth"}, answers
    with pytest.raises(ValueError, match=words):
        dpo.train(config)
    config.data.columns = {}
    config.validation = {"heldout": {"path": config.train_data, "columns": {name: "worth"}}}
    with pytest.raises(ValueError, match=words):
        dpo.train(config)


def test_a_margin_goes_with_losses_beside_it(tiny_config):
    given = given_by(tiny_config) | {"loss": "sigmoid,sft=0.2", "data.columns": {"margin": "gap"}}
    assert [term.name for term in objectives.objective(given).terms] == ["sigmoid", "sft"]


def test_a_column_is_read_beside_what_else_it_is(tmp_path):
    some = [row | {"chosen_score": 8.0, "rejected_score": 2.0} for row in rows((1, 0), (1, 0))]
    found = read(tmp_path, some, {"weight": "chosen_score"}).train[0].examples
    assert [(one.worth.weight, one.ratings) for one in found] == [(8.0, (8.0, 2.0))] * 2


def test_the_reference_is_not_asked_again_for_another_weight(tmp_path):
    shape = Shape(1, 512, 2, 2, 1)
    light, heavy = (
        read(tmp_path, rows((weight, 0)), COLUMNS).train[0].examples[0] for weight in (1, 2)
    )
    assert reference_cache.key(light, shape) == reference_cache.key(heavy, shape)
    assert examples.as_bytes(light) != examples.as_bytes(heavy)

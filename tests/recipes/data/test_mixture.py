"""Several sources by weight: one stream, a function of its seed, gone on with at any place."""

import collections

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data import mixture
from recipes.data.mixture import Part
from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.data.rows import source
from recipes.data.rows.source import Source
from recipes.preference.metrics import by_part
from recipes.preference.objectives import Objective, Term, objective
from recipes.training.update import Answers
from tests.recipes.data.packed.test_packing import random_pairs

DATA = source.Common("preference_chat", {}, single=False)
SHAPE = Shape(2, 64, 4, 2, few=1)


def parts(*sizes, weights=(2.0, 1.0, 1.0)):
    """Of random pairs, numbered through."""
    found, first = [], 0
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=False)):
        pairs = mixture.numbered(random_pairs(i, size), first)
        first += size
        found.append(Part("abc"[i], weight, pairs, first - 1))
    return found


def rows_of(stream, start, number):
    return [stream[i].row for i in range(start, start + number)]


def test_parts_take_turns_by_weight():
    drawn = rows_of(mixture.endless(parts(10, 6, 3), seed=0), 0, 40)
    counted = collections.Counter(mixture.part_of(parts(10, 6, 3), np.array(drawn)).tolist())
    assert counted == {0: 20, 1: 10, 2: 10}


def test_without_weights_they_are_one_list():
    """Each epoch has all rows of all parts once, in another order."""
    some = parts(10, 6, 3, weights=(None, None, None))
    drawn = rows_of(mixture.endless(some, seed=0), 0, 38)
    assert sorted(drawn[:19]) == sorted(drawn[19:]) == list(range(19))
    assert drawn[:19] != drawn[19:] != sorted(drawn[19:])
    assert mixture.shares(some) == [10 / 19, 6 / 19, 3 / 19]
    assert mixture.shares(parts(10, 6, weights=(3.0, 1.0))) == [0.75, 0.25]


def test_each_epoch_of_a_part_holds_all_of_it_in_another_order():
    drawn = rows_of(mixture.endless(parts(10, 6, 3), seed=0), 0, 80)
    first = [row for row in drawn if row < 10]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    assert first[:10] != first[10:20]


def test_each_part_has_an_order_of_its_own():
    drawn = rows_of(mixture.endless(parts(10, 10, weights=(1.0, 1.0)), seed=0), 0, 20)
    one, other = ([row % 10 for row in drawn if row // 10 == part] for part in (0, 1))
    assert sorted(one) == sorted(other) == list(range(10))
    assert one != other


def test_one_part_is_the_stream_of_before():
    """The order of a run with one source does not hang on there being mixtures."""
    (part,) = parts(10)
    alone = grain.MapDataset.source(part.examples).seed(7).shuffle().repeat()
    assert rows_of(mixture.endless([part], 7), 0, 30) == rows_of(alone, 0, 30)


def test_two_epochs_of_three_sources_stopped_anywhere_go_on_with_the_same_pairs():
    sources = parts(11, 7, 5)
    rows = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P("data"))
    place = batches.Place(SHAPE, rows)
    updates = 2 * 23 // 4 + 1  # of four pairs
    ids = lambda start: [
        update.source_rows.tolist()
        for _, update in zip(
            range(start, updates),
            batches.iterate(mixture.endless(sources, 3), place, start=start),
            strict=False,
        )
    ]
    whole = ids(0)
    assert len(whole) == updates
    for stop in range(1, updates):
        assert ids(stop) == whole[stop:], stop


def test_the_settings_of_sources():
    named = {
        "mine": "a.jsonl",
        "theirs": {"path": "b.parquet", "weight": 3, "layout": "hh", "columns": {"chosen": "x"}},
    }
    found = source.training(named, DATA)
    assert found["mine"] == (Source("a.jsonl", "preference_chat", ()), 1.0)
    assert found["theirs"] == (Source("b.parquet", "hh", (("chosen", "x"),)), 3.0)
    assert source.training("a.jsonl", DATA)["train"].weight == 1.0
    by_rows = {name: {"path": name, "weight": "rows"} for name in "ab"}
    assert [one.weight for one in source.training(by_rows, DATA).values()] == [None, None]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "please set --config.train_data"),
        ({"a": {"weight": 1.0}}, "please set --config.train_data.a.path"),
        ({"a": {"path": "x", "wait": 1.0}}, "no setting 'wait': it has path, weight"),
        ({"a": {"path": "x", "weight": 0}}, "weight must be above 0, or 'rows', not 0"),
        ({"a": {"path": "x", "weight": "much"}}, "weight must be above 0, or 'rows', not 'much'"),
        ({"a": {"path": "x", "weight": "rows"}, "b": "y"}, "set weight=rows either for all"),
        ({"a": {"path": "x", "weight": float("nan")}}, "weight must be above 0"),
        (["a.jsonl", "b.jsonl"], "neither a source nor several"),
        ({"a": 3}, "train_data.a=3 is not a source"),
        ({"a": {"path": "x", "columns": "y"}}, "not of the form dict"),
    ],
)
def test_sources_that_are_no_sources(given, told):
    with pytest.raises(ValueError, match=told):
        source.training(given, DATA)


def test_metrics_of_each_source():
    sources = parts(2, 2, 2)
    ours = jnp.array([[1.0, 0], [0, 1], [3, 0]])
    answers = Answers(ours, jnp.zeros_like(ours), jnp.ones((3, 2), jnp.int32), ours)
    behind = Term("behind", 1.0, lambda answers: answers.policy[:, 1] - answers.policy[:, 0], 0.0)
    lost = Objective((behind,), 0.1)
    found = by_part(sources, np.array([0, 1, 3]), answers, lost)
    assert (found["a/pairs"], found["b/pairs"], found["c/pairs"]) == (2, 1, 0)
    assert (found["a/dpo_accuracy"], found["b/dpo_accuracy"]) == (0.5, 1)
    assert found["b/dpo_loss"] == -3
    assert not any(name.startswith("c/dpo") for name in found)
    # What depends on all pairs of an update says nothing of a source.
    both = by_part(
        sources, np.array([0, 1, 3]), answers, objective({"loss": "hinge,sft", "beta": 1.0})
    )
    assert {"b/loss_hinge", "b/dpo_accuracy"} <= both.keys()
    assert not {"b/loss_sft", "b/dpo_loss"} & both.keys()
    assert both["b/loss_hinge"] == 0
    assert by_part(sources[:1], np.array([0, 1, 3]), answers, lost) == {}

"""Lists of answers: two by two behind one copy of the prompt, and each as if it stood alone."""

import jax
import numpy as np
import pytest

from recipes.data.ids import shards
from recipes.data.ids.counts import none
from recipes.data.ids.examples import Answer, ListIds, PairIds, as_bytes
from recipes.data.packed import batches, packing, shapes, streams
from recipes.data.packed.packing import Shape
from recipes.preference import reference_cache
from tests.recipes.data.packed.test_packing import logps_alone, packed_logps


def ids(text):
    return np.array([ord(letter) for letter in text], np.int32)


def listed(prompt, *answers, row=0):
    """All tokens are scored."""
    parts = tuple(Answer(ids(text), np.ones(len(text), bool)) for text in answers)
    return ListIds(row, ids(prompt), parts, tuple(range(len(parts))))


def letters(array):
    return "".join(map(chr, array))


FOUR = listed("ab", "xyz", "uv", "pq", "rst")


def test_four_answers_take_two_copies_of_the_prompt():
    """Two by two as at the head of streams.py."""
    one, other = streams.item(FOUR, Shape(1, 16, 1, 4, 1)).streams
    assert (letters(one.tokens), letters(other.tokens)) == ("yxabu", "pabrs")
    assert [*one.positions, *other.positions] == [3, 2, 0, 1, 2, 2, 0, 1, 2, 3]
    seen = lambda stream: [
        letters(stream.tokens[first:last])
        for first, last in zip(stream.first, stream.last, strict=True)
    ]
    assert seen(one) == ["yxab", "xab", "a", "ab", "abu"]
    assert seen(other) == ["pab", "a", "ab", "abr", "abrs"]
    scores = lambda stream: [
        letters([stream.tokens[source], target])
        for source, target in zip(stream.read_at, stream.target, strict=True)
    ]
    assert scores(one) == ["bx", "xy", "yz", "bu", "uv"]
    assert scores(other) == ["bp", "pq", "br", "rs", "st"]
    assert [*one.answer] == [0, 0, 0, 1, 1]
    assert [*other.answer] == [2, 2, 3, 3, 3]
    assert streams.stored_length(FOUR) == 10


def test_three_answers_in_a_row_of_a_micro_batch():
    three = FOUR._replace(answers=FOUR.answers[:3], ranks=(0, 1, 2))
    assert streams.stored_length(three) == 5 + 3
    shape = Shape(rows=1, row_length=10, examples=1, answers=4, few=1)
    (batch,) = batches.pack([three], shape, [0]).micro_batches
    assert letters(batch.tokens[0, :8]) == "yxabuabp"
    assert [*batch.positions[0, :8]] == [3, 2, 0, 1, 2, 0, 1, 2]
    assert [*batch.first[0]] == [0, 1, 2, 2, 2, 5, 5, 5, 8, 9]
    assert [*batch.last[0]] == [4, 4, 3, 4, 5, 6, 7, 8, 9, 10]  # padding sees itself
    assert [*batch.owner[0]] == [0, 0, 0, 1, 1, 2, 2, -1, -1, -1]
    assert letters(batch.target[0, :7]) == "xyzuvpq"
    assert batch.scored.tolist() == [[3, 2, 2, 0]]  # the fourth is not there


def test_what_does_not_fit_stands_apart():
    long = listed("abcd", "w" * 8, "x" * 8, "y", "z")
    shape = Shape(4, 12, 1, 4, 4)
    assert streams.shared(long, shape) == [False, True]
    found = streams.item(long, shape).streams
    assert [letters(one.tokens)[:4] for one in found] == ["abcd"] * 3
    assert [sorted({*one.answer.tolist()}) for one in found] == [[0], [1], [2, 3]]
    assert streams.shared(long, shape._replace(row_length=64, alike=9)) == [False, False]
    assert shapes.choose([long], per_update=1, shards=1, most=64).answers == 4


def random_lists(seed, count, answers):
    """Of two to so many answers, some of whose tokens are not scored."""
    draw = np.random.default_rng(seed)
    some = lambda: draw.integers(0, 97, draw.integers(1, 12)).astype(np.int32)
    made = []
    for row in range(count):
        parts = [some() for _ in range(draw.integers(2, answers + 1))]
        masks = [draw.random(len(part)) < 0.7 for part in parts]
        for mask in masks:
            mask[-1] = True
        both = tuple(map(Answer, parts, masks))
        ratings = tuple(float(i) for i in range(len(both))) if row % 2 else None
        ranks = (0, *sorted(draw.integers(1, 3, len(both) - 1).tolist()))
        made.append(ListIds(row, some(), both, ranks, ("tied",) * (row % 2), ratings))
    return made


def alone(model, one, answers):
    """Each answer as a text of its own; 0 for those that a list does not have."""
    found = logps_alone(model, one)
    return np.array(found + [0.0] * (answers - len(found)))


@pytest.mark.parametrize("row_length", [pytest.param(96, marks=pytest.mark.full), 24])
def test_a_list_packed_is_each_answer_alone(small_model, row_length):
    """Several to a row, and with their streams in several rows."""
    some = random_lists(0, 6, 5)
    found = packed_logps(small_model, some, Shape(5, row_length, 6, 5, 5))
    expected = np.array([alone(small_model, one, 5) for one in some])
    np.testing.assert_allclose(found, expected, atol=2e-5 * 12)
    assert (found == 0).any()
    assert np.abs(found).max() > 10


def test_a_list_of_two_is_a_pair_bit_for_bit(small_model):
    some = random_lists(1, 6, 2)
    pairs = [
        PairIds(one.row, one.prompt, a.ids, b.ids, a.scored, b.scored)
        for one in some
        for a, b in [one.answers]
    ]
    shape = Shape(2, 64, 6, 2, 1)
    one, other = (batches.pack(examples, shape, [0]) for examples in (some, pairs))
    for x, y in zip(one.micro_batches, other.micro_batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)
    np.testing.assert_array_equal(
        packed_logps(small_model, some, shape), packed_logps(small_model, pairs, shape)
    )
    assert one.ranks is None


def test_what_is_told_of_answers_that_are_not_there():
    some = random_lists(2, 5, 4)
    update = batches.pack(some, Shape(4, 64, 5, 4, 4), [0])
    for i, one in enumerate(some):
        n = len(one.answers)
        assert update.scored[i].tolist() == [int(a.scored.sum()) for a in one.answers] + [0] * (
            4 - n
        )
        assert update.ranks[i].tolist() == [*one.ranks] + [0] * (4 - n)
        assert np.isnan(update.ratings[i]).tolist() == [one.ratings is None] * n + [True] * (4 - n)


def test_lists_are_kept_as_they_are():
    some = random_lists(3, 5, 4)
    shard = shards.Shard(some, np.arange(5, dtype=np.uint64), none())
    again = shards.from_bytes(shards.to_bytes(shard)).ids
    assert [as_bytes(one) for one in again] == [as_bytes(one) for one in some]
    for x, y in zip(again, some, strict=True):
        assert (x.row, x.ranks, x.notes, x.ratings) == (y.row, y.ranks, y.notes, y.ratings)
    assert as_bytes(some[0]) != as_bytes(some[0]._replace(ranks=(0,) * len(some[0].ranks)))


def test_what_a_reference_gives_is_kept_by_the_number_of_answers():
    """A list has as many values as the longest one of its run."""
    shape = Shape(4, 64, 5, 4, 4)
    two = FOUR._replace(answers=FOUR.answers[:2], ranks=(0, 1))
    (a, b) = two.answers
    pair = PairIds(0, two.prompt, a.ids, b.ids, a.scored, b.scored)
    longer = shape._replace(answers=5)
    keys = [reference_cache.key(one, shape) for one in (FOUR, two, pair)]
    keys.append(reference_cache.key(FOUR, longer))
    keys.append(reference_cache.key(FOUR, shape._replace(row_length=6)))
    assert len({*keys}) == 5 - (streams.shared(FOUR, shape._replace(row_length=6)) == [True, True])


@pytest.mark.parametrize("alike", [None, 12])
@pytest.mark.parametrize("row_length", [14, 24, 128])
def test_an_outline_is_packed_like_what_it_is_of(row_length, alike):
    draw = np.random.default_rng(row_length)
    some = lambda least: "x" * int(draw.integers(least, 9))
    examples = [
        listed("p" * int(draw.integers(1, 5)), *(some(1) for _ in range(1 + row % 5)), row=row)
        for row in range(40)
    ]
    shape = Shape(8, row_length, len(examples), 5, few=8, alike=alike)
    whole, outlined = (
        [make(example, shape) for example in examples] for make in (streams.item, streams.outline)
    )
    sizes = lambda items: [
        [(len(one.tokens), len(one.target)) for one in item.streams] for item in items
    ]
    assert sizes(whole) == sizes(outlined)
    places = lambda items: [
        [[placed.slot for placed in row] for row in rows]
        for rows in packing.pack_rows(items, shape)
    ]
    assert places(whole) == places(outlined)

"""Rows of several answers: their order, those that are kept, and what cannot be ordered."""

import itertools
import json

import pytest

from recipes.data.chats import columns, layouts, ranked
from recipes.data.ids import examples

FIVE = {  # as UltraFeedback has them
    "instruction": "Which way?",
    "completions": [
        {"response": "Left.", "overall_score": 5.0},
        {"response": "Onwards.", "overall_score": 8.5},
        {"response": "Back.", "overall_score": 2},
        {"response": "Right.", "overall_score": 5.0},
        {"response": "Up.", "overall_score": "3"},
    ],
}


def read(row, answers=2):
    """The layout is recognised."""
    named = columns.renamed(row, {})
    return layouts.read(columns.recognised(named), named, answers)


def said(pair):
    return [turns[0]["content"] for turns in pair.answers]


@pytest.mark.parametrize(
    ("answers", "kept", "ranks"),
    [
        (2, "Onwards. Back.", None),
        (3, "Onwards. Right. Back.", (0, 1, 3)),
        (4, "Onwards. Left. Up. Back.", (0, 1, 2, 3)),
        (5, "Onwards. Left. Right. Up. Back.", (0, 1, 1, 2, 3)),
        (9, "Onwards. Left. Right. Up. Back.", (0, 1, 1, 2, 3)),
    ],
)
def test_the_best_the_worst_and_those_between(answers, kept, ranks):
    pair = read(FIVE, answers)
    assert said(pair) == kept.split()
    assert pair.ranks == ranks
    assert pair.prompt == [{"role": "user", "content": "Which way?"}]
    scores = {"Onwards.": 8.5, "Left.": 5.0, "Right.": 5.0, "Up.": 3.0, "Back.": 2.0}
    assert pair.ratings == tuple(scores[text] for text in kept.split())
    assert pair.notes == ("tied",)


@pytest.mark.parametrize("count", range(2, 12))
def test_those_between_are_chosen_evenly(count):
    for most in range(2, 12):
        kept = ranked.at_most(range(count), most)
        assert len(kept) == min(count, most)
        assert (kept[0], kept[-1]) == (0, count - 1)
        gaps = [after - before for before, after in itertools.pairwise(kept)]
        assert max(gaps) - min(gaps) <= 1


def test_a_rank_is_lower_where_a_score_is_higher():
    texts = [one["response"] for one in FIVE["completions"]]
    nectar = {"prompt": "Which way?", "answers": texts, "ranks": [2, 1, 4, 2, 3]}
    pair, other = read(nectar, 5), read(FIVE, 5)
    assert pair == other._replace(ratings=None)


def test_an_answer_without_a_rank_is_left_out_and_counted():
    row = {"prompt": "a", "responses": ["Left.", "Right.", "Back."], "scores": [2, None, 1]}
    pair = read(row, 4)
    assert said(pair) == ["Left.", "Back."]
    assert pair.notes == ("unranked",)
    assert all(note in examples.NOTES for note in ("tied", "unranked", "said_again"))


@pytest.mark.parametrize(
    ("marks", "sentence"),
    [
        ([1, 1, 1], "no answer is ranked above another"),
        ([None, "x", 1], "fewer than two answers in `answers` have a score or rank"),
        ([True, False, None], "fewer than two answers"),
    ],
)
def test_what_has_no_order_is_refused_in_a_sentence(marks, sentence):
    texts = ["Left.", "Right.", "Back."]
    with pytest.raises(ValueError, match=sentence):
        read({"prompt": "a", "answers": texts, "ranks": marks}, 4)


def test_columns_of_other_names_are_told_which_are_read():
    scored = [{"text": "On.", "pm_score": 5}, {"text": "No.", "pm_score": 1}]
    with pytest.raises(ValueError, match="each in its `overall_score`, `score`, `rating`, `rank`,"):
        read({"prompt": "a", "answers": scored})
    with pytest.raises(
        ValueError, match="its text must be in `response`, `answer`, `completion`, "
    ):
        read({"prompt": "a", "answers": [{"output": "On.", "score": n} for n in (1, 2)]})


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "Which way?"},
        {"instruction": "Which way?"},
        {"messages": [{"role": "user", "content": "Which way?"}]},
        {"conversations": [{"from": "human", "value": "Which way?"}]},
    ],
)
def test_a_chosen_answer_and_a_list_of_rejected_ones(asked):
    """These are in no order that is known: all are worse than the chosen one."""
    row = asked | {"chosen": "Onwards.", "rejected": ["Left.", "Right.", "Back."]}
    pair = read(row, 4)
    assert said(pair) == ["Onwards.", "Left.", "Right.", "Back."]
    assert pair.ranks == (0, 1, 1, 1)
    assert said(read(row)) == ["Onwards.", "Back."]
    assert (pair.notes, read(row).notes) == ((), ("left_over",))
    turns = [[{"role": "assistant", "content": text}] for text in row["rejected"]]
    assert (
        read(row | {"rejected": turns, "chosen": [dict(turns[0][0], content="Onwards.")]}, 4)
        == pair
    )
    # As a table of text has the list, which elsewhere is an answer that is a list; messages that
    # were written as text are never words.
    listed = json.dumps(row["rejected"])
    assert read(columns.renamed(row | {"rejected": listed}, {}, cells=True), 4) == pair
    assert said(read(row | {"rejected": listed}, 4)) == ["Onwards.", listed]
    for text in ('["red"]', "['red', 'blue']", '[["a", "b"], ["c"]]', "[]"):
        assert said(read(row | {"rejected": text})) == ["Onwards.", text]
    assert read(row | {"rejected": json.dumps(turns)}, 4) == pair
    # The chosen answer among them, wherever it stands, is no other.
    for again in (["Left.", "Onwards."], ["Onwards.", "Left."]):
        one = read(row | {"rejected": again})
        assert (said(one), one.notes) == (["Onwards.", "Left."], ("said_again",))
    with pytest.raises(ValueError, match="chosen equals rejected"):
        read(row | {"rejected": ["Onwards.", "Onwards."]})
    words = '["a", "b"]'  # answers that are lists are texts
    assert said(read(asked | {"chosen": '["a"]', "rejected": words})) == ['["a"]', words]
    assert read(row | {"rejected": ["Back."]}, 4) == read(row | {"rejected": "Back."})


def test_equal_answers_of_a_list_are_no_reason_to_lose_it():
    row = {"prompt": "a", "chosen": "Onwards.", "rejected": ["Onwards.", "Back."]}
    assert said(read(row, 3)) == ["Onwards.", "Back."]
    with pytest.raises(ValueError, match="chosen equals rejected"):
        read(row | {"rejected": ["Onwards.", "Onwards."]}, 3)
    with pytest.raises(ValueError, match="no text and no list of messages in `rejected`"):
        read(row | {"rejected": []}, 3)

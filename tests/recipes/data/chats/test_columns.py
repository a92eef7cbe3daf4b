"""Columns by their names: no question is left out, and sentences name what is there."""

import ast
import json

import pyarrow
import pyarrow.parquet
import pytest

from recipes.data import source_pairs
from recipes.data.chats import columns
from recipes.data.ids.encode_rows import How, Source
from recipes.data.rows import sources
from tests.conftest import TINY

HOW = How(str(TINY / "model"), None, "assistant", None, 256, "drop", max_malformed_fraction=0.5)
ANSWERS = {"chosen": "By the river.", "rejected": "Ask him."}
SO = {name: f"So: {words}" for name, words in ANSWERS.items()}
TURNS = {
    "chosen": [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "On."}],
    "rejected": [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "No"}],
}


def recognised(tmp_path, *rows, **other):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return source_pairs.recognised(Source(str(path), **other))


@pytest.mark.parametrize(
    "name",
    [
        "question", "Question", "QUESTION", "query", "input", "Input", "context", "user_prompt",
        "userPrompt", "User Prompt", "user-prompt", "Prompt", "history", "problem",
    ],
)  # fmt: skip
@pytest.mark.parametrize("answers", [ANSWERS, SO])
def test_a_question_by_another_name_is_named_with_the_flag(tmp_path, name, answers):
    flag = f"--config.data.columns=\"{{'prompt': '{name}'}}\""
    with pytest.raises(ValueError) as found:
        recognised(tmp_path, answers | {name: "Which way?"})
    assert f"a.jsonl:1: `{name}` looks like the question" in str(found.value)
    assert flag in str(found.value)
    source, _ = recognised(tmp_path, answers | {name: "Which way?"}, columns=(("prompt", name),))
    assert source.layout == "prompt_chosen_rejected"


def test_a_system_prompt_does_not_hide_the_question(tmp_path):
    with pytest.raises(ValueError, match="`input` looks like the question"):
        recognised(tmp_path, ANSWERS | {"system": "Be brief.", "input": "Which way?"})


@pytest.mark.parametrize(
    ("name", "held", "remedy"),
    [
        ("system_instruction", "You are a pirate", "{'system_prompt': 'system_instruction'}"),
        ("systemInstruction", "You are a pirate", "{'system_prompt': 'systemInstruction'}"),
        ("developer", "You are a pirate", "{'system_prompt': 'developer'}"),
        ("initial_reason_steps", "Step 1: we think.", "put it into the prompt"),
        ("article", "A long text about a river", "put it into the prompt"),
        ("options", ["By the river", "By the hill", "None"], "put it into the prompt"),
    ],
)
def test_a_part_of_the_prompt_is_not_left_out(tmp_path, name, held, remedy):
    for row, single in ((ANSWERS, False), ({"answer": "By the river."}, True)):
        with pytest.raises(ValueError, match=f"`{name}` looks like the question.*{remedy}"):
            recognised(tmp_path, row | {"prompt": "Which way?", name: held}, single=single)
    if "system_prompt" in remedy:
        told = {"columns": (("system_prompt", name),)}
        source, _ = recognised(tmp_path, ANSWERS | {"prompt": "Which way?", name: held}, **told)
        assert source_pairs.read(source, HOW).counts.used == 1
    heard = f"Which way? {' or '.join(held) if isinstance(held, list) else held}"
    assert recognised(tmp_path, ANSWERS | {"prompt": heard, name: held})[0].layout


def test_even_a_name_that_says_nothing_is_not_guessed_past(tmp_path):
    for name in ("q", "frage"):
        with pytest.raises(ValueError, match=f"`{name}` looks like the question"):
            recognised(tmp_path, ANSWERS | {name: "Which way is it?"})
    only = {k: [{"role": "assistant", "content": v}] for k, v in ANSWERS.items()}
    with pytest.raises(ValueError, match="`q` looks like the question"):
        recognised(tmp_path, only | {"q": "Which way is it?"})
    source, line = recognised(tmp_path, ANSWERS | {"id": "a-1", "n": 3})
    assert (source.layout, line[-15:]) == ("plain_transcripts", "not read: id, n")
    repeated = {k: f"Which way is it? {v}" for k, v in ANSWERS.items()}
    source, _ = recognised(tmp_path, repeated | {"q": "Which way is it?"})
    assert source.layout == "plain_transcripts"


@pytest.mark.parametrize(
    "besides",
    [
        {"trajectory": [{"from": "user", "value": "Which way?"}]},
        {"t": [{"from": "user", "value": "Which way?"}]},
        {"asked": ["Hello there.", "Hi.", "So which way is it?"]},
        {"question": {"dataset": "eli5", "full_text": "Which way?"}},
        {"q": {"full_text": "So which way is it?"}},
    ],
)
def test_a_question_in_lists_and_objects_is_not_guessed_past(tmp_path, besides):
    (name,) = besides
    with pytest.raises(ValueError, match=f"`{name}` looks like the question"):
        recognised(tmp_path, SO | besides)
    same = {k: f"Hello there. Hi. Which way? So which way is it? {v}" for k, v in ANSWERS.items()}
    assert recognised(tmp_path, same | besides)[0].layout == "plain_transcripts"
    notes = {"tags": ["open qa", "rivers of France"], "about": {"lang": "en", "topic": "way out"}}
    assert recognised(tmp_path, SO | notes)[0].layout == "plain_transcripts"


@pytest.mark.parametrize("name", ["functions", "available_tools", "Tools", "toolList"])
@pytest.mark.parametrize("write", [list, json.dumps, str])
def test_tools_by_another_name_are_named_with_the_flag(tmp_path, name, write):
    row = ANSWERS | {"prompt": "Which way?", name: write([{"name": "look", "parameters": {}}])}
    with pytest.raises(ValueError) as found:
        recognised(tmp_path, row)
    assert f"`{name}` looks like tools" in str(found.value)
    assert f"--config.data.columns=\"{{'tools': '{name}'}}\"" in str(found.value)
    source, line = recognised(tmp_path, row, columns=(("tools", name),))
    assert (source.layout, line.count("not read")) == ("prompt_chosen_rejected", 0)
    for other in ("def f(): pass", [], [1], None):
        assert recognised(tmp_path, row | {name: other})[0].layout == "prompt_chosen_rejected"
    source, _ = recognised(tmp_path, *[row | {name: []}] * 3, row)
    (reason,) = source_pairs.read(source, HOW).counts.malformed
    assert f"`{name}` looks like tools" in reason


@pytest.mark.parametrize(
    "name", ["image", "images", "Images", "video", "videos", "audio", "audios"]
)
def test_what_is_no_text_is_not_left_out(tmp_path, name):
    row = ANSWERS | {"prompt": "Which way?"}
    told = f"`{name}` does not hold text, and layout prompt_chosen_rejected only reads text"
    for held in (["a.png"], "a.png", {"path": "a.png"}, '["a.png"]'):
        with pytest.raises(ValueError, match=told):
            recognised(tmp_path, row | {name: held})
    source, _ = recognised(tmp_path, row | {name: ["a.png"]}, layout="prompt_chosen_rejected")
    assert source_pairs.read(source, HOW).counts.used == 1  # who says so leaves it out
    for nothing in (None, [], "", "[]"):
        assert recognised(tmp_path, row | {name: nothing})[0].layout == "prompt_chosen_rejected"
    source, line = recognised(tmp_path, row, row | {name: ["a.png"]}, row | {name: None})
    assert "not read" not in line
    found = source_pairs.read(source, HOW).counts
    assert (found.used, found.malformed.total()) == (2, 1)
    turns = {
        "messages": [TURNS["chosen"][0] | {"content": "<image>Which way?"}, TURNS["chosen"][1]]
    }
    with pytest.raises(ValueError, match="layout conversation only reads text"):
        recognised(tmp_path, turns | {name: ["a.png"]}, single=True)


def test_pictures_of_a_table_are_seen_and_not_read(tmp_path):
    feature = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    no_text = {"bytes": b"\x89PNG\xff", "path": None}
    for kind, held, nothing in (
        (feature, no_text, {"bytes": None, "path": None}),
        (pyarrow.list_(feature), [no_text], []),
        (pyarrow.binary(), b"\xff", None),
    ):
        table = pyarrow.Table.from_pylist([ANSWERS | {"prompt": "Which way?"}] * 3)
        table = table.append_column("image", pyarrow.array([None, nothing, held], kind))
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        source, _ = source_pairs.recognised(Source(str(tmp_path / "a.parquet")))
        found = source_pairs.read(source, HOW).counts
        assert (found.used, found.rows) == (2, 3)
        assert "`image` does not hold text" in next(iter(found.malformed))
        source = source._replace(guessed=False)
        assert source_pairs.read(source, HOW).counts.used == 3


def test_messages_that_were_written_twice_or_by_other_keys_are_no_words(tmp_path):
    twice = {name: json.dumps(json.dumps(turns)) for name, turns in TURNS.items()}
    source, _ = recognised(tmp_path, twice)
    assert source.layout == "preference_chat"
    once, _ = recognised(tmp_path, TURNS)
    both = [source_pairs.read(one, HOW).ids for one in (once, source)]
    assert source_pairs.fingerprint(both[0]) == source_pairs.fingerprint(both[1])
    asked = json.dumps(json.dumps([{"role": "user", "content": "Which way?"}]))
    assert recognised(tmp_path, ANSWERS | {"prompt": asked})[0].layout == "prompt_chosen_rejected"
    for keys in ("author text", "speaker content", "sender message"):
        who, what = keys.split()
        written = lambda said, who=who, what=what: json.dumps(
            [{who: "user", what: "Which way?"}, {who: "bot", what: said}]
        )
        with pytest.raises(ValueError, match="contains messages whose keys are not `role` and"):
            recognised(tmp_path, {name: written(said) for name, said in ANSWERS.items()})
    spoken = {name: json.dumps([{"human": "Hi", "assistant": a}]) for name, a in ANSWERS.items()}
    with pytest.raises(ValueError, match="contains messages whose keys are not `role` and"):
        recognised(tmp_path, spoken)
    turns = {name: json.dumps(["Which way?", said]) for name, said in ANSWERS.items()}
    with pytest.raises(ValueError, match="`chosen` is a list or object written as text"):
        recognised(tmp_path, turns)
    assert recognised(tmp_path, turns | {"prompt": "a"})[0].layout == "prompt_chosen_rejected"
    book = {
        name: json.dumps([{"author": "A. Pen", "text": said}]) for name, said in ANSWERS.items()
    }
    assert recognised(tmp_path, book | {"prompt": "a"})[0].layout == "prompt_chosen_rejected"


def test_an_answer_beside_a_whole_conversation_is_refused(tmp_path):
    row = {"prompt": "Which way?", "chosen": TURNS["chosen"], "rejected": TURNS["rejected"][1:]}
    source, _ = recognised(tmp_path, TURNS, row)
    (reason,) = source_pairs.read(source, HOW).counts.malformed
    assert reason == "one of `chosen` and `rejected` has user turns, but the other has none"
    source, _ = recognised(tmp_path, row, layout="prompt_chosen_rejected")
    assert source_pairs.read(source, HOW).counts.used == 1


def test_a_history_in_the_prompt_is_named_with_its_layout(tmp_path):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    with pytest.raises(ValueError, match=r"read it with .*layout=prompt_chosen_rejected"):
        recognised(tmp_path, TURNS | {"prompt": history})
    source, _ = recognised(tmp_path, TURNS | {"prompt": history}, layout="prompt_chosen_rejected")
    assert source_pairs.read(source, HOW).counts.used == 1


def test_history_that_a_table_writes_out_is_read(tmp_path):
    for write in (json.dumps, str):
        row = ANSWERS | {"instruction": "Which way?", "history": write([["Hello", "Hi, you."]])}
        assert recognised(tmp_path, row)[0].layout == "instruction"
        with pytest.raises(ValueError, match="`turns` looks like the question"):
            recognised(tmp_path, row | {"turns": write([["And then?", "Left."]])})
        assert recognised(tmp_path, row | {"turns": "[]"})[0].layout == "instruction"
        answer = write([{"role": "assistant", "content": "On."}])
        assert recognised(tmp_path, row | {"messages": answer})[0].layout == "instruction"


def test_nan_is_a_missing_cell(tmp_path):
    nan = float("nan")
    missing = {"system": nan, "history": nan, "tools": nan, "input": nan, "score_chosen": nan}
    for asked in ("prompt", "instruction"):
        source, _ = recognised(tmp_path, ANSWERS | {asked: "Which way?"} | missing)
        counts = source_pairs.read(source, HOW).counts
        assert (counts.used, dict(counts.notes)) == (1, {"unscored": 1})
    with pytest.raises(ValueError, match="`question` looks like the question"):
        recognised(tmp_path, ANSWERS | {"prompt": nan, "question": "Which way?"})


def test_who_says_the_layout_may_leave_a_column_out(tmp_path):
    row = SO | {"question": "Which way?"}
    source, line = recognised(tmp_path, row, layout="plain_transcripts")
    assert line == "layout plain_transcripts; not read: question"
    assert source_pairs.read(source, HOW).counts.used == 1


@pytest.mark.parametrize(
    "besides",
    [
        {"prompt": "Which way?"},
        {"prompt": " Which \n way? "},
        {"instruction": "Which way?", "input": ""},
        {"messages": TURNS["chosen"]},
        {"messages": [*TURNS["rejected"], {"role": "assistant", "content": "Something else."}]},
        {"prompt": json.dumps(TURNS["chosen"][:1])},
        {"prompt": "\n\nHuman: Which way?\n\nAssistant:"},
        {"conversation": [{"input": "Which way?", "output": "Left."}]},
        {"history": [["Which way?", "Left."]]},
        {"question": None, "context": [], "input": {}, "turns": 2},
    ],
)
def test_a_column_that_repeats_what_is_asked_is_fine(tmp_path, besides):
    source, _ = recognised(tmp_path, TURNS | besides)
    assert source.layout == "preference_chat"
    found = source_pairs.read(source, HOW)
    assert found.counts.used == 1
    assert found.counts.notes["asks_again"] == 0


@pytest.mark.parametrize(
    "besides",
    [
        {"prompt": "And then?"},
        {"instruction": "And then?"},
        {"context": "It rains."},
        {"messages": [{"role": "user", "content": "And then?"}]},
        {"history": [["And then?", "Left."]]},
        {"Query": [{"from": "human", "value": "And then?"}]},
    ],
)
def test_every_row_is_looked_at(tmp_path, besides):
    source, _ = recognised(tmp_path, *[TURNS] * 3, TURNS | besides)
    counts = source_pairs.read(source, HOW).counts
    assert counts.used == 3
    ((reason, number),) = counts.malformed.items()
    (name,) = besides
    assert f"`{name}` looks like the question" in reason
    assert "or leave it out with --config.data.layout=preference_chat" in reason
    assert number == 1
    source, _ = recognised(tmp_path, *[TURNS] * 3, TURNS | besides, layout="preference_chat")
    assert source_pairs.read(source, HOW).counts.used == 4


def test_a_prompt_of_two_columns_is_not_half_read(tmp_path):
    row = ANSWERS | {"prompt": "Which way?", "context": "You stand at a fork."}
    with pytest.raises(ValueError, match=r"`context` looks like .*: put it into the prompt"):
        recognised(tmp_path, row)


def test_words_do_not_hide_messages_in_a_later_row(tmp_path):
    written = {name: json.dumps(turns) for name, turns in TURNS.items()}
    source, _ = recognised(tmp_path, *[SO] * 2, written)
    assert source.layout == "plain_transcripts"
    counts = source_pairs.read(source, HOW).counts
    assert counts.used == 2
    assert "`chosen` holds messages" in next(iter(counts.malformed))


def test_a_malformed_row_does_not_decide(tmp_path):
    for first in ({"chosen": None, "rejected": None}, ANSWERS | {"chosen": ANSWERS["rejected"]}):
        assert recognised(tmp_path, first, TURNS)[0].layout == "preference_chat"
    only = {"prompt": "a", "chosen": 7, "rejected": "b"}
    assert recognised(tmp_path, only)[0].layout == "prompt_chosen_rejected"


def test_answers_that_are_ranked_alike_are_dropped_not_malformed(tmp_path):
    both = lambda *ranks: {
        "prompt": "Which way?",
        "answers": [{"answer": f"a{i}", "rank": rank} for i, rank in enumerate(ranks)],
    }
    source, _ = recognised(tmp_path, both(1, 1), both(2, 1))
    counts = source_pairs.read(source, HOW._replace(max_malformed_fraction=0.0)).counts
    assert counts.dropped == {"no answer is ranked above another": 1}
    compared = {"context": TURNS["chosen"][:1], "response1": "a", "response2": "b"}
    rows = [compared | {"overall_preference": number} for number in (0, 1)]
    source, _ = recognised(tmp_path, *rows)
    counts = source_pairs.read(source, HOW._replace(max_malformed_fraction=0.0)).counts
    assert counts.dropped == {"neither response is preferred": 1}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("question good bad", "there are no `chosen` and `rejected`: name them, as in"),
        ("prompt chosen", "is no `rejected`: name it, as in"),
        ("prompt chosen rejected_response", "name it, as in {'rejected': 'rejected_response'}"),
        ("prompt rejected chosen_answer", "is no `chosen`: name it, as in {'chosen': 'chosen_ans"),
        ("prompt Chosen Rejected", "as in {'chosen': 'Chosen', 'rejected': 'Rejected'}"),
        ("prompt win lose", "as in {'chosen': 'win', 'rejected': 'lose'}"),
        ("prompt preferred dispreferred", "{'chosen': 'preferred', 'rejected': 'dispreferred'}"),
        ("q accepted rejected", "is no `chosen`: name it, as in {'chosen': 'accepted'}"),
        ("query better worse", "{'prompt': 'query', 'chosen': 'better', 'rejected': 'worse'}"),
        ("prompt nonPreferred Preferred", "{'chosen': 'Preferred', 'rejected': 'nonPreferred'}"),
        ("prompt closed window good_answer bad_answer", "{'chosen': 'good_answer', 'rejected': 'b"),
        ("prompt chosen_score rejected_score", "there are no `chosen` and `rejected`: name them"),
        ("prompt output rejected", "is no `chosen`: name it, as in {'chosen': 'output'}"),
        ("prompt a b", "which of `a` and `b` is preferred differs from row to row"),
        ("conversation_a conversation_b winner", "which of `conversation_a` and `conversation_b`"),
        ("prompt response_0 response_1 better_id", "which of `response_0` and `response_1`"),
        ("prompt response_1 response_2 preference_strength", "which of `response_1` and `respo"),
        ("model_a model_b winner conversation_a conversation_b", "which of `conversation_a` and"),
        ("quotes_0 quotes_1 answer_0 answer_1 score_0 score_1", "which of `answer_0` and `answer"),
        ("qid response_j response_k", "which of `response_j` and `response_k`"),
        ("id response-1 response-2 preference.responses", "which of `response-1` and `response-2`"),
        ("prompt winner loser", "as in {'chosen': 'winner', 'rejected': 'loser'}"),
        ("data", "its rows are inside `data`"),
        ("columns index data", "its rows are inside `data`"),
        ("train test", "its rows are inside `train`"),
        ("type instances", "its rows are inside `instances`"),
        ("features rows", "its rows are inside `rows`"),
        ("row_idx row", "its rows are inside `row`"),
        ("0 1", "one object of rows by their numbers, as pandas writes it with orient='index'"),
        ("1 2 3 4", "write rows, with to_json(…, orient='records', lines=True)"),
        ("prompt completion label", "one answer each (`completion`), and whether it is wanted"),
        ("messages label", "one answer each (`messages`), and whether it is wanted (`label`)"),
        ("instruction output", "one answer each (`output`), not pairs: this recipe needs two"),
        ("prompt answer", "one preferred over the other; recipes/sft.py trains on one"),
        ("prompt chosen", "{'rejected': 'worse'}\"; without one, recipes/sft.py trains on `chosen"),
    ],
)
def test_missing_answers_are_a_sentence_with_what_is_there(names, sentence):
    with pytest.raises(ValueError) as found:
        columns.recognised(dict.fromkeys(names.split(), "a"))
    told = str(found.value).replace('--config.data.columns="', "")
    assert sentence in told
    assert ("--config.data.columns" in str(found.value)) == ("{" in told)
    assert ("{" in sentence or "name" in sentence) == ("{" in told)


@pytest.mark.parametrize("names", ["prompt completion label", "text", "prompt chosen worse"])
def test_another_recipe_is_named_only_for_what_it_reads(names):
    with pytest.raises(ValueError) as found:
        columns.recognised(dict.fromkeys(names.split(), "a"))
    assert "sft" not in str(found.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"query": "Which way?", "answers": "On.", "tools": "[]"}, "{'answer': 'answers'}"),
        ({"conversation": TURNS["chosen"]}, "{'messages': 'conversation'}"),
        (
            {"article": "A text", "highlights": "It"},
            "{'prompt': 'article', 'answer': 'highlights'}",
        ),
        ({"human": "Which way?", "bot": "On."}, "{'prompt': 'human', 'answer': 'bot'}"),
        ({"user_prompt": "Which way?", "response": "On."}, "{'prompt': 'user_prompt'}"),
        ({"prompt": "Which way?", "output": "On.", "response": "No."}, "{'answer': 'output'}"),
        ({"frage": "Which way?", "antwort": "On."}, "{'prompt': 'question', 'answer': 'reply'}"),
        ({"text": "### Human: Which way?### Assistant: On."}, "turns that `text` holds as one of"),
        ({"contents": [{"parts": []}]}, "{'prompt': 'question', 'answer': 'reply'}"),
        ({"id": "0", "data": ["Which way?", "On."]}, "{'prompt': 'question', 'answer': 'reply'}"),
        ({"train": [{}], "test": [{}]}, "its rows are inside `train`"),
        ({"0": {}, "1": {}}, "one object of rows by their numbers"),
    ],
)
def test_a_single_answer_is_named_by_what_is_there(tmp_path, row, told):
    with pytest.raises(ValueError) as found:
        recognised(tmp_path, row, single=True)
    assert told in str(found.value)
    if told.startswith("{") and "reply" not in told:
        named = tuple(ast.literal_eval(told).items())
        assert recognised(tmp_path, row, single=True, columns=named)[0].layout


def test_two_outputs_in_a_list_are_no_single_answer(tmp_path):
    row = {"instruction": "Which way?", "input": "", "output": ["On.", "No."]}
    with pytest.raises(ValueError, match="`output` holds several answers: write the preferred one"):
        recognised(tmp_path, row)
    with pytest.raises(ValueError, match="one answer each"):
        recognised(tmp_path, row | {"output": "On."})


def test_json_files_of_another_shape_are_named(tmp_path):
    path = tmp_path / "a.json"
    row = ANSWERS | {"prompt": "Which way?"}
    for value, indent, told in (
        ({name: {"0": cell} for name, cell in row.items()}, None, "orient='records'"),
        ({"data": [row]}, None, "its rows are inside `data`"),
        ({"data": [row]}, 1, "must be a list of objects or have one object per line"),
        (row, 1, "must be a list of objects or have one object per line"),
    ):
        path.write_text(json.dumps(value, indent=indent))
        with pytest.raises(ValueError, match=told):
            source_pairs.recognised(Source(str(path)))
    lines = path.with_suffix(".jsonl")
    for text, told in (
        (json.dumps([row, row]), ":1: not a JSON object, but a list: name the file .json, or"),
        (json.dumps([row], indent=1), ":1: not valid JSON, but a list: name the file .json, or"),
        (json.dumps(row, indent=1), ":1: not valid JSON: each line must be a whole object"),
    ):
        lines.write_text(f"\n{text}\n".removeprefix("\n"))
        with pytest.raises(ValueError, match=told):
            source_pairs.recognised(Source(str(lines)))
    path.write_text(json.dumps([row], indent=1))
    assert source_pairs.recognised(Source(str(path)))[0].layout == "prompt_chosen_rejected"


def test_what_holds_a_question():
    assert columns.holds("a\nWhich way?\nb", "Which  way?")
    assert not columns.holds("Which", "Which way?")
    assert columns.holds("", None)
    assert columns.holds("", "2") and columns.holds("", " 1.0")  # Nectar's `turns`, as CSV
    assert not columns.holds("", "2 + 2")
    assert columns.holds("", [{"role": "assistant", "content": "a"}])
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert columns.holds("a", parts)
    assert not columns.holds("b", parts)
    deep = "a"
    for _ in range(2000):
        deep = [deep]
    assert columns.holds("", deep)
    assert not columns.holds("", '[{"role": "user", "content": "cut o')
    assert columns.holds("", '[{"role": "assistant", "content": "a"}]')
    assert columns.holds("", {"id": "x1", "source": {"name": "flan"}})
    assert not columns.holds("", {"id": "x1", "source": {"name": "which way"}})


def test_columns_that_nothing_reads_are_looked_at_in_one_more_reading(tmp_path, monkeypatch):
    """However many rows are in doubt: each one anew would take the square of their number."""
    rows = [
        {f"q{i % 2}": f"what is the answer number {i}", "chosen": "It is a", "rejected": "It is b"}
        for i in range(300)
    ]
    read, readings = sources.read, []
    monkeypatch.setattr(sources, "read", lambda *given: readings.append(given) or read(*given))
    with pytest.raises(ValueError, match=r"`q0` looks like the question"):
        recognised(tmp_path, *rows)
    assert len(readings) <= 3  # and one more where a column is new

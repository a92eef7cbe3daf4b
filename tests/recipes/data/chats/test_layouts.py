"""Rows as people's datasets have them, an example of each, and rows that are no such thing."""

import copy
import datetime
import json
import math
import re

from hypothesis import given, settings, strategies
import pytest

from recipes.data.chats import columns, forming, layouts, messages, ranked
from recipes.data.chats.layouts import LAYOUTS
from recipes.data.chats.pair import Pair
from tests.conftest import ROOT


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


ULTRAFEEDBACK = {  # binarized, as it stands on the hub
    "prompt": "Which way?",
    "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
    "chosen": [
        {"content": "Which way?", "role": "user"},
        {"content": "Onwards.", "role": "assistant"},
    ],
    "rejected": [
        {"content": "Which way?", "role": "user"},
        {"content": "Back.", "role": "assistant"},
    ],
    "messages": [
        {"content": "Which way?", "role": "user"},
        {"content": "Onwards.", "role": "assistant"},
    ],
    "score_chosen": 8.5,
    "score_rejected": 7.0,
}
HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Which way?\n\nAssistant: Onwards.",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Which way?\n\nAssistant: Back. ",
}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi!"},
        {"from": "human", "value": "Which way?"},
    ],
    "chosen": {"from": "gpt", "value": "Onwards."},
    "rejected": {"from": "gpt", "value": "Back."},
}
INSTRUCTION = {
    "instruction": "Rewrite the sentence.",
    "input": "They go.",
    "output": "They went.",
    "chosen": "They went.",
    "rejected": "They gone.",
}
STRINGS = {"prompt": "Which way?", "chosen": "Onwards.", "rejected": "Back."}
MESSAGES = {
    "prompt": [user("Which way?")],
    "chosen": [assistant("Onwards.")],
    "rejected": [assistant("Back.")],
}
TRANSCRIPTS = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ONE = Pair([user("Which way?")], [assistant("Onwards.")], [assistant("Back.")])
TWO = ULTRAFEEDBACK["chosen"]
RANKING = {  # LLaMA-Factory's, in OpenAI's spelling
    "messages": [user("Which way?")],
    "chosen": assistant("Onwards."),
    "rejected": assistant("Back."),
}
ORCA = {"system": "Be brief.", "question": "Which way?", "chosen": "Onwards.", "rejected": "Back."}
OPENAI = {
    "input": {"messages": [user("Which way?")], "tools": [TOOL], "parallel_tool_calls": True},
    "preferred_output": [assistant("Onwards.")],
    "non_preferred_output": [assistant("Back.")],
}
SWIFT = {"messages": [user("Which way?"), assistant("Onwards.")], "rejected_response": "Back."}
COMPLETIONS = {  # UltraFeedback before it was made pairs
    "instruction": "Which way?",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "Perhaps left.", "overall_score": 5.0},
        {"model": "b", "response": "Onwards.", "overall_score": 8.5},
        {"model": "c", "response": "Back.", "overall_score": 2},
    ],
}
NECTAR = {
    "prompt": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Which way?\n\nAssistant: ",
    "answers": [
        {"answer": "Back.", "model": "a", "rank": 3.0},
        {"answer": "Onwards.", "model": "b", "rank": 1.0},
        {"answer": "Perhaps left.", "model": "c", "rank": 2.0},
    ],
    "turns": 2,
}
NEMO = {
    "context": [user("Which way?")],
    "completions": [
        {"rank": 1, "completion": [assistant("Back.")]},
        {"rank": 0, "completion": [assistant("Onwards.")]},
    ],
}
HELPSTEER = {
    "domain": "general",
    "context": [user("Which way?")],
    "response1": "Back.",
    "response2": "Onwards.",
    "overall_preference": 2,
}
EXAMPLES = {
    "preference_chat": ULTRAFEEDBACK, "prompt_chosen_rejected": MESSAGES, "messages": RANKING,
    "sharegpt": SHAREGPT, "instruction": INSTRUCTION, "orca": ORCA, "openai_preference": OPENAI,
    "swift": SWIFT, "best_and_worst": COMPLETIONS, "compared": HELPSTEER, "hh": HH,
    "plain_text": STRINGS, "plain_transcripts": TRANSCRIPTS,
}  # fmt: skip


def read(row, called=None):
    """As the recipe does that is told nothing of the layout."""
    named = columns.renamed(row, called or {})
    return LAYOUTS[columns.recognised(named)].read(named)


def test_arrays_of_short_messages_stand_on_one_line():
    said = 'if (it\'s) {\n} {a: "b"}'
    array = lambda answer: f"[{user('Hi')} {assistant('Oh')}\n {user('So?')} {assistant(answer)}]"
    pair = read({"chosen": array(said), "rejected": array("No.")})
    assert pair == Pair(
        [user("Hi"), assistant("Oh"), user("So?")], [assistant(said)], [assistant("No.")]
    )
    odd = "[{'role': 'user', 'content': '" + "\\'" * 2**18  # in time that grows with its length
    with pytest.raises(ValueError, match="looks like messages"):
        read({"chosen": odd, "rejected": "a"})


def test_tools_as_pandas_writes_them_and_by_their_older_name():
    assert read(MESSAGES | {"tools": str([TOOL])}).tools == [TOOL]
    given = {"messages": [user("Which way?")], "functions": [TOOL["function"]]}
    assert read(OPENAI | {"input": given}).tools == [TOOL["function"]]


def test_ultrafeedback_as_it_stands_on_the_hub():
    assert read(ULTRAFEEDBACK) == ONE._replace(ratings=(8.5, 7.0))


def test_transcripts_of_hh():
    assert read(HH) == Pair(
        [user("Hello"), assistant("Hi!"), user("Which way?")],
        [assistant("Onwards.")],
        [assistant("Back.")],
    )


def test_transcripts_without_empty_lines():
    lines = {name: said.replace("\n\n", "\n") for name, said in HH.items()}
    assert read(lines) == read(HH)
    mixed = {
        name: f"\n\nHuman: Which way?\nAssistant: is a word\n\nAssistant: {said}"
        for name, said in (("chosen", "Onwards."), ("rejected", "Back."))
    }
    assert read(mixed).prompt == [user("Which way?\nAssistant: is a word")]


def test_transcripts_of_hh_that_part_early():
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: x",
    }
    pair = read(row)
    assert pair.prompt == [user("a")]
    assert pair.chosen == [assistant("b"), user("c"), assistant("d")]
    assert pair.rejected == [assistant("x")]


def test_sharegpt_with_a_system_message():
    assert read(SHAREGPT) == Pair(
        [system("Be brief."), user("Hello"), assistant("Hi!"), user("Which way?")],
        [assistant("Onwards.")],
        [assistant("Back.")],
    )


def test_an_instruction_with_its_input():
    assert read(INSTRUCTION) == Pair(
        [user("Rewrite the sentence.\nThey go.")],
        [assistant("They went.")],
        [assistant("They gone.")],
    )
    assert read(INSTRUCTION | {"input": ""}).prompt == [user("Rewrite the sentence.")]
    assert read(INSTRUCTION | {"input": None}).prompt == [user("Rewrite the sentence.")]


def test_a_prompt_and_two_answers():
    assert read(STRINGS) == ONE
    assert read(MESSAGES) == ONE
    assert read(MESSAGES | {"chosen": assistant("Onwards."), "rejected": "Back."}) == ONE
    assert read(STRINGS | {"prompt": [user("Which way?")]}) == ONE


def test_two_answers_to_messages():
    assert read(RANKING) == ONE
    assert read(RANKING | {"chosen": "Onwards.", "rejected": "Back."}) == ONE


def test_orca_has_its_question_and_its_system_prompt():
    assert read(ORCA) == ONE._replace(prompt=[system("Be brief."), user("Which way?")])
    assert read(ORCA | {"system": ""}) == ONE


def test_openai_has_messages_and_tools_in_its_input():
    assert read(OPENAI) == ONE._replace(tools=[TOOL])
    assert read(OPENAI | {"input": {"messages": [user("Which way?")], "tools": []}}) == ONE


def test_swift_replaces_the_last_answer_or_the_conversation():
    assert read(SWIFT) == ONE
    two = {"messages": SWIFT["messages"], "rejected_messages": ULTRAFEEDBACK["rejected"]}
    assert read(two) == ONE
    assert read(two | {"rejected_messages": [assistant("Back.")]}) == ONE
    with pytest.raises(ValueError, match="the last message in `messages` is not the assistant's"):
        read(SWIFT | {"messages": [user("Which way?")]})


def test_answers_by_well_known_names():
    for names in columns.ANSWERS:
        row = {"prompt": "Which way?"} | dict(zip(names, ("Onwards.", "Back."), strict=True))
        assert read(row) == ONE
        swapped = dict(zip(("chosen", "rejected"), names[::-1], strict=True))
        assert read(row, swapped) == ONE._replace(chosen=ONE.rejected, rejected=ONE.chosen)
        with pytest.raises(ValueError, match="`rejected`"):
            read(row | {"chosen": "Onwards."})  # one is there: the others are not taken for it


def test_the_best_answer_against_the_worst():
    assert read(COMPLETIONS) == ONE._replace(ratings=(8.5, 2.0))
    assert read(NEMO) == ONE
    turns = [user("Hello"), assistant("Hi!"), user("Which way?")]
    assert read(NECTAR) == ONE._replace(prompt=turns)
    by_column = {key: [one[key] for one in COMPLETIONS["completions"]] for key in ("model",)}
    said = [one["response"] for one in COMPLETIONS["completions"]]
    by_column |= {"response": said, "overall_score": [5.0, 8.5, 2]}
    assert read(COMPLETIONS | {"completions": by_column}) == read(COMPLETIONS)
    lists = {"instruction": "Which way?", "generations": said, "ratings": [5.0, 8.5, 2]}
    assert read(lists) == read(COMPLETIONS)
    assert read({"prompt": "Which way?", "responses": said, "ranks": [2, 1, 3]}) == ONE
    unscored = {"response": "Better still.", "overall_score": None}
    some = [*COMPLETIONS["completions"], unscored]
    found = read(COMPLETIONS | {"completions": some})
    assert found == read(COMPLETIONS)._replace(notes=("unranked",))


def test_answers_of_a_table_that_keeps_all_as_text():
    for written in (json.dumps, str):
        row = {name: written(COMPLETIONS[name]) for name in ("models", "completions")}
        assert read(row | {"instruction": "Which way?"}) == read(COMPLETIONS)
        row = {name: written(value) for name, value in OPENAI.items()}
        assert read(row) == read(OPENAI)
        row = HELPSTEER | {"context": written(HELPSTEER["context"]), "overall_preference": "2"}
        assert read(row) == ONE
        history = written([["Hello", "Hi!"]])
        assert read(STRINGS | {"history": history}).prompt[1] == assistant("Hi!")


def test_of_two_responses_the_sign_says_which_is_preferred():
    assert read(HELPSTEER) == ONE
    other = ONE._replace(chosen=ONE.rejected, rejected=ONE.chosen)
    assert read(HELPSTEER | {"overall_preference": -1}) == other


def test_history_comes_before_the_question():
    before = [user("Hello"), assistant("Hi!")]
    asked = [*before, user("Which way?")]
    row = {"instruction": "Which way?", "chosen": "Onwards.", "rejected": "Back."}
    pairs = [["Hello", "Hi!"]]
    for history in (pairs, json.dumps(pairs), before):
        for name in ("instruction", "prompt"):
            row = {name: "Which way?", "chosen": "Onwards.", "rejected": "Back."}
            assert read(row | {"history": history}) == ONE._replace(prompt=asked)
    for nothing in (None, [], "[]", ""):
        assert read(row | {"history": nothing}) == ONE
    for odd in ("Hello", [["Hello"]], {"a": 1}, ["Hello", "Hi!"]):
        with pytest.raises(ValueError, match="`history` holds neither messages nor pairs"):
            read(row | {"history": odd})


WHOLE = {name: ULTRAFEEDBACK[name] for name in ("chosen", "rejected")}


@pytest.mark.parametrize(
    "besides",
    [
        {"instruction": "Which way?"},
        {"conversations": [{"from": "human", "value": "Which way?"}]},
        {"prompt": [user("Which way?")]},
        {"messages": [user("Which way?")]},
    ],
)
def test_the_question_stands_once(besides):
    assert read(WHOLE | besides) == ONE
    (name,) = besides
    layout = {"prompt": "prompt_chosen_rejected", "conversations": "sharegpt"}.get(name, name)
    assert LAYOUTS[layout].read(WHOLE | besides) == ONE  # where a person says so
    first = {k: [system("Be brief."), *turns] for k, turns in WHOLE.items()}
    assert LAYOUTS[layout].read(first | besides).prompt == [system("Be brief."), *TWO[:1]]
    other = {k: [user("And you?"), assistant(k)] for k in WHOLE}
    with pytest.raises(ValueError, match="`chosen` asks a question of its own, besides the prompt"):
        LAYOUTS[layout].read(other | besides)


def test_a_conversation_goes_on_with_a_question_of_its_own():
    row = {"prompt": [user("Hello"), assistant("Hi!")], **WHOLE}
    pair = layouts.prompt_chosen_rejected(row)
    assert pair == ONE._replace(prompt=[user("Hello"), assistant("Hi!"), user("Which way?")])
    both = {"prompt": [user("Hello"), assistant("Hi!"), user("Which way?")], **WHOLE}
    assert layouts.prompt_chosen_rejected(both) == pair
    whole = {name: [*row["prompt"], *turns] for name, turns in WHOLE.items()}
    assert layouts.prompt_chosen_rejected(row | whole) == pair


ARRAY = "[{'content': 'Which way?', 'role': 'user'}\n {'content': 'Onwards.', 'role': 'assistant'}]"


@pytest.mark.parametrize(
    "written", [json.dumps, str, lambda turns: ARRAY, lambda turns: [json.dumps(t) for t in turns]]
)
def test_messages_that_were_written_as_text_are_parsed(written):
    assert read({"chosen": written(TWO), "rejected": ULTRAFEEDBACK["rejected"]}) == ONE
    nested = {"chosen": {"messages": TWO}, "rejected": json.dumps({"messages": WHOLE["rejected"]})}
    assert read(nested) == ONE
    assert read({name: {"conversations": turns} for name, turns in WHOLE.items()}) == ONE


def test_a_prompt_and_answers_that_were_written_as_text_are_parsed():
    row = {key: json.dumps(value) for key, value in MESSAGES.items()}
    assert read(row) == ONE
    assert read(MESSAGES | {"chosen": str(assistant("Onwards."))}) == ONE


@pytest.mark.parametrize("end", [1, 40])
def test_messages_that_cannot_be_parsed_are_not_words(end):
    for name in MESSAGES:
        row = {**MESSAGES, name: json.dumps(TWO)[:-end]}
        with pytest.raises(ValueError, match=f"`{name}` looks like messages, but is not valid"):
            layouts.prompt_chosen_rejected(row)
    long = str([user("'" + "x" * messages.LONGEST_LITERAL)])
    with pytest.raises(ValueError, match="looks like messages"):
        layouts.prompt_chosen_rejected({**MESSAGES, "prompt": long})


@pytest.mark.parametrize(
    "answer",
    ['{"from": "Rome", "to": "Oslo"}', '[{"role": "admin"}]', "{'a': 1}", "[1, 2", "{x} is a set"],
)
def test_an_answer_may_be_json(answer):
    assert read(STRINGS | {"chosen": answer}).chosen == [assistant(answer)]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("User", "user"), ("USER ", "user"), ("Human", "user"), ("prompter", "user"),
        ("model", "assistant"), ("Assistant", "assistant"), ("bot", "assistant"),
        ("GPT", "assistant"), ("CHATBOT", "assistant"), ("System", "system"), ("ipython", "tool"),
    ],
)  # fmt: skip
def test_roles_by_other_names(theirs, ours):
    assert messages.read([{"role": theirs, "content": "a"}], "x")[0]["role"] == ours


def test_thoughts_in_a_typed_part():
    parts = [
        {"type": "thinking", "thinking": "It is dry.", "signature": "x"},
        {"type": "text", "text": "No."},
    ]
    thought = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "It is dry.")
    for inner in ("It is dry.", [{"type": "text", "text": "It is dry."}]):
        parts[0]["thinking"] = inner
        assert messages.read([assistant(parts)], "x") == [assistant("No.") | thought]
    parts[0] = {"type": "tool_use", "name": "weather", "input": {}}
    with pytest.raises(ValueError, match="a part that is not text, but 'tool_use'"):
        messages.read([assistant(parts)], "x")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
FLAT = {"name": "weather", "arguments": {"town": "Rome"}}


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"function": CALL["function"]}],
        [FLAT],
        [FLAT | {"arguments": json.dumps(FLAT["arguments"])}],
        [CALL | {"function": FLAT | {"arguments": json.dumps(FLAT["arguments"])}}],
        json.dumps([FLAT]),
        [json.dumps(CALL)],
    ],
)
def test_calls_have_one_form(calls):
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    assert messages.read([turn], "x") == [assistant("") | {"tool_calls": [CALL]}]


def test_calls_of_other_forms():
    called = lambda turn: messages.read([turn], "x")[0]["tool_calls"]
    old = {"role": "assistant", "content": None, "function_call": FLAT}  # OpenAI's first form
    assert called(old) == [CALL]
    assert called({"role": "tool_call", "content": json.dumps(FLAT)}) == [CALL]
    assert called(assistant("") | {"tool_calls": str([CALL])}) == [CALL]  # as pandas writes it
    for nothing in (math.nan, None, [], {}, ""):
        for name in ("tool_calls", "function_call"):
            assert "tool_calls" not in messages.read([assistant("a") | {name: nothing}], "")[0]
    for nothing in ("[]", "null", " ", "None"):  # as a table keeps it
        turn = {"tool_calls": nothing, "tool_responses": nothing, "function_call": nothing}
        assert messages.read([assistant("a") | turn], "") == [assistant("a")]
    numbered = assistant("") | {"tool_calls": [CALL | {"id": "1", "index": 0}]}
    assert called(numbered) == [CALL | {"id": "1", "index": 0}]
    words = FLAT | {"arguments": "Rome"}  # what is no object stays as it is
    assert called(assistant("") | {"tool_calls": [words]})[0]["function"] == words
    nothing = assistant("") | {"tool_calls": [{"name": "weather"}]}
    assert called(nothing)[0]["function"] == {"name": "weather", "arguments": {}}
    for empty in ("", None, "null"):
        turn = assistant("") | {"tool_calls": [{"name": "weather", "arguments": empty}]}
        assert called(turn) == called(nothing)
    for word in ("parameters", "args", "input"):  # Llama's, Cohere's and Anthropic's
        turn = assistant("") | {"tool_calls": [{"name": "weather", word: FLAT["arguments"]}]}
        assert called(turn) == [CALL]
    for odd in ({"arguments": {}}, "weather", 7):
        with pytest.raises(ValueError, match=r"is not {name, arguments}"):
            called(assistant("") | {"tool_calls": [odd]})


def test_keys_of_messages_that_nothing_reads_are_named():
    turns = [
        user("a") | {"id": "7", "weight": None},
        assistant("b") | {"tool_plan": "c", "lang": "d"},
    ]
    assert messages.unread(turns) == {"id", "lang"}
    assert messages.read(turns, "x")[1] == assistant("b") | {"tool_plan": "c"}
    assert not any(map(messages.unread, ("words", None, ["words"], [{"id": 1}], {"id": 1})))


def test_an_answer_that_the_prompt_begins():
    row = {
        "prompt": [user("Which way?"), assistant("Well: ")],
        "chosen": [assistant("Well: Onwards.")],
        "rejected": [assistant("Well: Back.")],
    }
    told = Pair([user("Which way?")], row["chosen"], row["rejected"], prefill="Well: ")
    assert read(row) == told
    whole = {name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")}
    assert read(whole) == told
    again = {name: [user("Which way?"), *row[name]] for name in ("chosen", "rejected")}
    assert layouts.prompt_chosen_rejected(row | again) == told
    ranked = [{"messages": again[name], "score": n} for n, name in enumerate(sorted(again)[::-1])]
    found = layouts.best_and_worst({"prompt": row["prompt"], "completions": ranked})
    assert found._replace(ratings=None) == told
    for answer in (row["chosen"], again["chosen"]):  # the question stands once
        single = layouts.prompt_answer({"prompt": row["prompt"], "answer": answer})
        assert single == told._replace(rejected=None)
    earlier = [user("Hello"), assistant("Hi!")]
    asked = {"prompt": [*earlier, *row["prompt"]], "answer": [*earlier, *again["chosen"]]}
    assert layouts.prompt_answer(asked) == told._replace(
        prompt=[*earlier, user("Which way?")], rejected=None
    )
    asked["answer"] = [system("Be brief."), *asked["answer"]]
    assert layouts.prompt_answer(asked).prompt == [
        system("Be brief."), *earlier, user("Which way?")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`answer` asks again what the prompt asks, and does not"):
        layouts.prompt_answer(asked | {"answer": [*earlier, user("Which way?"), assistant("On")]})
    more = {"prompt": earlier, "answer": [user("Which way?"), assistant("Onwards.")]}
    assert layouts.prompt_answer(more).prompt == earlier


def test_plain_text_is_taken_as_it_is():
    row = {"prompt": "The sky is ", "chosen": "blue.", "rejected": " black. "}
    assert layouts.plain_text(row) == Pair("The sky is ", "blue.", " black. ")


def test_whole_texts_part_before_the_space_that_leads_into_the_word():
    assert read(TRANSCRIPTS) == Pair("The sky is", " blue.", " black.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is black", "The sky is"),  # not "The sky is bl"
        ("The sky is blue", "The sky is bl", "The sky is"),
        ("The sky is", "The sky is blue", "The sky is"),
        ("Q: 2+2=4", "Q: 2+2=5", "Q: 2+2="),
        ("It costs 3.14", "It costs 3.15", "It costs"),
        ("It costs 1,000", "It costs 1,200", "It costs"),
        ("I don't", "I dont", "I"),
        ("So it's", "So it is", "So"),
        ("So it’s", "So it is", "So"),
        ("call foo_bar", "call foo_baz", "call"),
        ("a well-known", "a well-read", "a"),
        ("yes. Then", "yes. Else", "yes."),
        ("yes.\n\nThen", "yes.\n\nElse", "yes."),
        ("end. ", "end.", "end."),
        ("天空是蓝色", "天空是黑色", "天空是"),
        ("하늘은 파란", "하늘은 파랑", "하늘은"),
        ("Его дом", "Его дым", "Его"),
        ("a cafe\u0301", "a cafe", "a"),
        ("a ❤️", "a ❤", "a"),
        ("a 👩‍👩‍👧", "a 👩‍👩‍👦", "a"),
        ("a 👍🏽", "a 👍🏿", "a"),
        ("a 🇩🇪", "a 🇩🇰", "a"),
        ("a 🏴\U000e0067\U000e0062", "a 🏴\U000e0067\U000e0077", "a"),
        ("blue", "black", ""),
        ("", "black", ""),
        ("'x", "'y", "'"),
    ],
)
def test_a_prompt_never_ends_inside_a_word(chosen, rejected, prompt):
    pair = layouts.plain_transcripts({"chosen": chosen, "rejected": rejected})
    assert pair == Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_equal_texts_lose_nothing_to_an_answer():
    with pytest.raises(ValueError, match="chosen equals rejected"):
        layouts.plain_transcripts({"chosen": "The sky is blue", "rejected": "The sky is blue"})


@settings(max_examples=150, deadline=None)
@given(strategies.text(max_size=30), strategies.text(max_size=9), strategies.text(max_size=9))
def test_prompt_and_answer_are_the_whole_text(head, one, other):
    row = {"chosen": head + one, "rejected": head + other}
    try:
        pair = layouts.plain_transcripts(row)
    except ValueError as error:
        assert one == other or "Unicode" in str(error)
        return
    assert pair.prompt + pair.chosen == row["chosen"]
    assert pair.prompt + pair.rejected == row["rejected"]
    assert pair.prompt == pair.prompt.rstrip()


def test_shared_assistant_turns_are_prompt_and_later_user_turns_answer():
    head = [user("a"), assistant("b"), user("c")]
    row = {
        "chosen": [*head, assistant("d"), user("e"), assistant("f")],
        "rejected": [*head, assistant("x")],
    }
    pair = read(row)
    assert pair.prompt == head
    assert pair.chosen == [assistant("d"), user("e"), assistant("f")]
    assert pair.rejected == [assistant("x")]
    assert not pair.shares_no_user_turn


def test_conversations_that_share_nothing_are_pairs_and_said_to_be():
    row = {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}
    pair = read(row)
    assert pair.prompt == []
    assert pair.shares_no_user_turn
    only = {key: [system("s"), *turns] for key, turns in row.items()}
    assert read(only).shares_no_user_turn


def test_text_in_typed_parts():
    parts = lambda *texts: [{"type": "text", "text": text} for text in texts]
    row = {
        "chosen": [user(parts("Which ", "way?")), assistant(parts("Onwards."))],
        "rejected": [user("Which way?"), assistant([{"type": "text", "value": "Back."}])],
    }
    assert read(row) == ONE
    # As a table holds it that has pictures in other rows.
    row["chosen"][0] = user([{"type": "text", "text": "Which way?", "image": None, "value": None}])
    assert read(row) == ONE


def test_typed_parts_that_a_table_keeps_as_text():
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "way?"}]
    for written in (json.dumps(parts), str(parts)):
        assert messages.read([user(written)], "x") == [user("Which way?")]
    picture = json.dumps([{"type": "image_url", "image_url": {"url": "a"}}, *parts])
    with pytest.raises(ValueError, match="a part that is not text, but 'image_url'"):
        messages.read([user(picture)], "x")
    for words in ('[{"type": "text", "label": "Name"}]', '[{"type": "list"}]', "[]", '[{"type":'):
        assert messages.read([user(words)], "x") == [user(words)]


def test_both_spellings_in_one_table():
    both = lambda role, said: {"from": role, "value": said, "role": None, "content": None}
    row = {"prompt": [both("human", "Which way?")], "chosen": [both("gpt", "Onwards.")]}
    assert read(row | {"rejected": [{**assistant("Back."), "from": None, "value": None}]}) == ONE


def test_a_system_prompt_of_its_own_comes_first():
    told = ONE._replace(prompt=[system("Be brief."), user("Which way?")])
    for row in (ULTRAFEEDBACK, STRINGS, MESSAGES):
        for name in ("system_prompt", "system"):
            assert read(row | {name: "Be brief."})[:3] == told[:3]
        assert read(row | {"system_prompt": ""})[:3] == ONE[:3]
        assert read(row | {"system_prompt": None})[:3] == ONE[:3]
    twice = {name: [system("Be brief."), *WHOLE[name]] for name in WHOLE}
    assert read(twice | {"system": "Be brief."}) == told


@pytest.mark.parametrize(
    "tools",
    [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], json.dumps([json.dumps(TOOL)])],
)
def test_tools_are_read_as_a_list_or_as_json(tools):
    assert read(MESSAGES | {"tools": tools}) == ONE._replace(tools=[TOOL])


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools_are_none(tools):
    assert read(MESSAGES | {"tools": tools}) == ONE


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_what_the_template_is_told_besides(kwargs):
    pair = read(MESSAGES | {"chat_template_kwargs": kwargs})
    assert pair == ONE._replace(template_kwargs={"enable_thinking": False})
    for nothing in (None, {}, "", "{}", "null"):
        assert read(MESSAGES | {"chat_template_kwargs": nothing}) == ONE


def test_tool_calls_and_thoughts_stay_with_their_message():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
    row = {
        "prompt": [
            user("Rain?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "no", "name": "weather", "tool_call_id": "1", "other": 2},
        ],
        "chosen": [{**assistant("No."), "reasoning_content": "It is dry."}],
        "rejected": [{**assistant("Yes."), "tool_calls": None, "thinking": ""}],
    }
    pair = read(row)
    assert pair.prompt[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no", "name": "weather", "tool_call_id": "1"},
    ]
    thought = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "It is dry.")
    assert pair.chosen == [assistant("No.") | thought]
    assert pair.rejected == [assistant("Yes.")]
    assert not pair.has_empty_turn


def test_function_calls_as_sharegpt_has_them():
    told = {"name": "weather", "arguments": {"town": "Rome"}}
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": json.dumps(told)},
            {"from": "observation", "value": "no"},
        ],
        "chosen": {"from": "gpt", "value": "No."},
        "rejected": {"from": "gpt", "value": "Yes."},
        "tools": json.dumps([TOOL]),
    }
    pair = read(row)
    assert pair.prompt[1]["tool_calls"] == [{"type": "function", "function": told}]
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.tools == [TOOL]


def test_calls_in_messages_of_their_own_are_of_one_turn():
    """ms-swift joins them, with what is said before them; each has a message of its own."""
    told = [{"name": "weather", "arguments": {"town": town}} for town in ("Paris", "Rome")]
    called = [{"type": "function", "function": one} for one in told]
    calls = [{"role": "tool_call", "content": json.dumps(one)} for one in told]
    results = [{"role": "tool_response", "content": says} for says in ("sun", "rain")]
    row = {"messages": [user("Rain?"), *calls, *results, assistant("In Rome.")]}
    turns = layouts.whole_conversation(row).chosen
    assert turns[0] == assistant("") | {"tool_calls": called}
    assert [turn["role"] for turn in turns] == ["assistant", "tool", "tool", "assistant"]
    row["messages"].insert(1, assistant("I look."))
    turns = layouts.whole_conversation(row).chosen
    assert turns[0] == assistant("I look.") | {"tool_calls": called}
    assert [turn["content"] for turn in turns[1:]] == ["sun", "rain", "In Rome."]
    pair = layouts.swift({"messages": [user("Rain?"), *calls], "rejected_messages": [calls[0]]})
    assert [len(turns[0]["tool_calls"]) for turns in pair.answers] == [2, 1]
    apart = [assistant("") | {"tool_calls": [one]} for one in told]  # OpenAI's turns stay two
    assert [len(turn["tool_calls"]) for turn in messages.read(apart, "x")] == [1, 1]


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False},
     {"loss_weight": 0.0}, {"train": "false"}],
)  # fmt: skip
def test_turns_that_are_marked_not_to_be_trained_are_known(mark):
    turns = [user("a") | mark, assistant("b") | mark, user("c"), assistant("d") | {"weight": 1}]
    read = messages.read(turns, "x")
    quiet = assistant("b") | {messages.QUIET: True}
    assert read == [user("a"), quiet, user("c"), assistant("d")]
    assert not messages.unread(turns)
    assert messages.unread([assistant("b") | {"weight": 0.5}]) == {"weight"}
    calls = [
        {"role": "tool_call", "content": json.dumps({"name": "f"})} | one for one in (mark, {})
    ]
    assert len(messages.read([user("a"), *calls], "x")) == 3  # one is trained, the other not


def test_scores_are_kept():
    for names in (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected")):
        assert read(STRINGS | dict(zip(names, (4, 1.5), strict=True))).ratings == (4.0, 1.5)
    for odd in (math.nan, None, 10**400, "good"):
        scored = STRINGS | {"chosen_score": odd, "rejected_score": "2"}
        assert str(read(scored).ratings) == "(nan, 2.0)"
    assert read(STRINGS | {"chosen_score": None, "rejected_score": None}).ratings is None
    scored = layouts.plain_text(STRINGS | {"chosen_score": 1, "rejected_score": 0})
    assert scored.ratings == (1.0, 0.0)


def test_columns_by_other_names():
    row = {"q": "Which way?", "better": "Onwards.", "worse": "Back.", "chosen": 1, "margin": 2}
    called = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    assert columns.renamed(row, called) == {**STRINGS, "margin": 2}
    assert read(row, called) == ONE
    assert row["chosen"] == 1  # and the row is as it was


def test_columns_that_change_places():
    called = {"chosen": "rejected", "rejected": "chosen"}
    assert read(STRINGS, called) == ONE._replace(chosen=ONE.rejected, rejected=ONE.chosen)


def test_a_column_that_is_missing_is_not_replaced_by_one_of_our_name():
    called = {"chosen": "better"}
    assert columns.renamed(STRINGS, called) == {"prompt": "Which way?", "rejected": "Back."}


def test_a_well_known_name_does_not_hide_a_column_of_ours():
    row = {"system_prompt": "Be brief.", "system": None, "score_chosen": 1, "chosen_score": 2}
    assert columns.renamed(row, {}) == row
    assert columns.renamed({"system": "x"}, {}) == {"system_prompt": "x"}


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        (ULTRAFEEDBACK, "preference_chat"),
        ({key: ULTRAFEEDBACK[key] for key in ("chosen", "rejected")}, "preference_chat"),
        (ULTRAFEEDBACK | {"prompt": None}, "preference_chat"),
        (MESSAGES, "prompt_chosen_rejected"),
        (MESSAGES | {"chosen": assistant("x")}, "prompt_chosen_rejected"),
        (MESSAGES | {"chosen": [{"from": "gpt", "value": "x"}]}, "prompt_chosen_rejected"),
        (STRINGS, "prompt_chosen_rejected"),
        (STRINGS | {"prompt": [user("x")]}, "prompt_chosen_rejected"),
        (SHAREGPT, "sharegpt"),
        (SHAREGPT | {"conversations": None}, "preference_chat"),
        (INSTRUCTION, "instruction"),
        (INSTRUCTION | {"instruction": None}, "plain_transcripts"),
        (RANKING, "messages"),
        (RANKING | {"prompt": "Which way?"}, "prompt_chosen_rejected"),
        (SHAREGPT | {"chosen": SHAREGPT["conversations"]}, "preference_chat"),
        (INSTRUCTION | {"chosen": ULTRAFEEDBACK["chosen"]}, "preference_chat"),
        (INSTRUCTION | {"chosen": HH["chosen"]}, "hh"),
        (STRINGS | {"chosen": "Assistant: Onwards."}, "prompt_chosen_rejected"),
        (STRINGS | {"chosen": None}, "prompt_chosen_rejected"),
        (columns.renamed(ORCA, {}), "orca"),
        (columns.renamed(ORCA | {"system": None}, {}), "orca"),
        (OPENAI, "openai_preference"),
        (SWIFT, "swift"),
        (SWIFT | {"rejected_response": None, "rejected_messages": [user("a")]}, "swift"),
        (COMPLETIONS, "best_and_worst"),
        (NECTAR, "best_and_worst"),
        (NEMO, "best_and_worst"),
        (HELPSTEER, "compared"),
        (STRINGS | {"completions": []}, "prompt_chosen_rejected"),
        ({"chosen": json.dumps(TWO), "rejected": json.dumps(TWO)}, "preference_chat"),
        ({"chosen": str(TWO), "rejected": str(TWO)}, "preference_chat"),
        ({"chosen": {"messages": TWO}, "rejected": {"messages": TWO}}, "preference_chat"),
        ({"chosen": json.dumps({"a": 1}), "rejected": "[1]"}, "plain_transcripts"),
        (HH, "hh"),
        ({"chosen": "Human: a\n\nAssistant: b", "rejected": ""}, "hh"),
        (TRANSCRIPTS, "plain_transcripts"),
        (TRANSCRIPTS | {"prompt": None}, "plain_transcripts"),
        ({"chosen": "A Human: said", "rejected": ""}, "plain_transcripts"),
        ({"chosen": None, "rejected": None}, "preference_chat"),
    ],
)
def test_the_layout_is_recognised_by_its_columns(row, layout):
    assert columns.recognised(row) == layout


def test_a_row_without_the_columns_is_a_sentence_that_says_what_to_do():
    told = r"columns \(question, good, bad\) there are no .*--config\.data\.columns="
    with pytest.raises(ValueError, match=told):
        columns.recognised({"question": "", "good": "", "bad": ""})
    many = {f"column_{i}": i for i in range(10_000)}
    with pytest.raises(ValueError) as found:
        columns.recognised(many)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize("layout", EXAMPLES)
def test_every_layout_reads_its_example_and_leaves_it_as_it_was(layout):
    row = copy.deepcopy(EXAMPLES[layout])
    named = columns.renamed(row, {})
    before = copy.deepcopy(named)
    pair = LAYOUTS[layout].read(named)
    assert (row, named) == (EXAMPLES[layout], before)
    assert isinstance(pair.prompt, str) == (layout in layouts.PLAIN)
    assert [*pair.texts]
    assert not pair.has_empty_turn
    assert named.keys() & LAYOUTS[layout].columns


MAY_LACK = {
    "history", "context", "answers", "responses", "rejected_messages", *forming.BESIDES,
    *forming.RATINGS,
}  # fmt: skip


@pytest.mark.parametrize("layout", EXAMPLES)
def test_a_layout_needs_its_columns(layout):
    optional = MAY_LACK | ({"input"} if layout == "instruction" else set())
    for name in (LAYOUTS[layout].columns & EXAMPLES[layout].keys()) - optional:
        row = dict(EXAMPLES[layout])
        del row[name]
        ours = "prompt" if layout == "best_and_worst" and name == "instruction" else name
        with pytest.raises(ValueError, match=f"`{ours}`"):
            LAYOUTS[layout].read(row)


@pytest.mark.parametrize("layout", EXAMPLES)
def test_an_error_names_a_column_that_the_row_has(layout):
    """Whatever it becomes: who has `response1` does not look for `chosen`."""
    example, refused = EXAMPLES[layout], 0
    spoiled = [
        example | {column: value}
        for column in example.keys() & LAYOUTS[layout].columns
        for value in (5, [3], {"a": 1}, True)
    ]
    listed = next((name for name in ranked.ANSWERS if name in example), None)
    for key in ranked.SAID if listed else ():
        entries = [one | {key: 5} if key in one else one for one in example[listed]]
        spoiled.append(example | {listed: entries})
    for row in spoiled:
        try:
            LAYOUTS[layout].read(row)
        except ValueError as error:
            refused += 1
            named = re.findall(r"`(\w+)", str(error))
            assert {*named} & example.keys(), (row, error)
    assert refused


HALF = "half \ud800 a character"


def chosen_with(**other):
    return ULTRAFEEDBACK | {"chosen": [user("Which way?"), assistant("x") | other]}


@pytest.mark.parametrize(
    ("layout", "row", "sentence"),
    [
        ("preference_chat", ULTRAFEEDBACK | {"chosen": None}, "`chosen` is missing, or null"),
        ("preference_chat", ULTRAFEEDBACK | {"chosen": []}, "no list of messages in `chosen`"),
        ("preference_chat", ULTRAFEEDBACK | {"chosen": "text"}, "no list of messages in `chosen`"),
        ("preference_chat", ULTRAFEEDBACK | {"chosen": ["text"]}, "is not {role, content} of text"),
        ("preference_chat", ULTRAFEEDBACK | {"chosen": [{}]}, "a message in `chosen` has no role"),
        ("preference_chat", chosen_with(role=None), "a message in `chosen` has no role"),
        ("preference_chat", chosen_with(role="narrator"), "has the unknown role 'narrator'"),
        ("preference_chat", chosen_with(role="x" * 999), "has the unknown role 'x{40}'$"),
        ("preference_chat", chosen_with(content=None), "no text in `chosen`"),
        ("preference_chat", chosen_with(content=7), "no text in `chosen`"),
        ("preference_chat", chosen_with(content={"a": 1}), "no text in `chosen`"),
        ("preference_chat", chosen_with(content=HALF), "the text in `chosen` is not valid Unicode"),
        ("preference_chat", chosen_with(content="a \ufdd0"), "is not valid Unicode"),
        ("preference_chat", chosen_with(content=["x"]), "a part that is not text$"),
        (
            "preference_chat",
            chosen_with(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
            "a part that is not text, but 'image_url'",
        ),
        ("preference_chat", chosen_with(content=[{"type": "text"}]), "no text in `chosen`"),
        ("preference_chat", chosen_with(tool_calls=[{1, 2}]), "`tool_calls` is not JSON"),
        ("preference_chat", chosen_with(tool_calls=[HALF]), "not valid Unicode"),
        ("preference_chat", chosen_with(thinking=7), "no text in `chosen`"),
        ("preference_chat", chosen_with(role="function_call"), "is not {name, arguments}"),
        (
            "preference_chat",
            chosen_with(content="", function_calls=[FLAT]),
            "contains only `function_calls`, which is not read",
        ),
        ("preference_chat", ULTRAFEEDBACK | {"rejected": TWO}, "chosen equals rejected"),
        (
            "preference_chat",
            ULTRAFEEDBACK | {"rejected": TWO[:1]},
            "one conversation is a prefix of the other",
        ),
        (
            "preference_chat",
            ULTRAFEEDBACK | {"chosen": [system("a"), *TWO], "system_prompt": "b"},
            "one system prompt in its column and another among the messages",
        ),
        ("preference_chat", ULTRAFEEDBACK | {"system_prompt": 7}, "no text in `system_prompt`"),
        ("preference_chat", ULTRAFEEDBACK | {"tools": "{"}, "`tools` is not valid JSON"),
        ("preference_chat", ULTRAFEEDBACK | {"tools": "[" * 9999}, "`tools` is not valid JSON"),
        ("preference_chat", ULTRAFEEDBACK | {"tools": {"a": 1}}, "not a list of tool descriptions"),
        (
            "preference_chat",
            ULTRAFEEDBACK | {"tools": ["weather"]},
            "not a list of tool descriptions",
        ),
        (
            "preference_chat",
            ULTRAFEEDBACK | {"tools": [{"since": datetime.date(2026, 1, 31)}]},
            "`tools` is not JSON",
        ),
        ("preference_chat", ULTRAFEEDBACK | {"tools": [{"name": "\ufdd0"}]}, "not valid Unicode"),
        ("preference_chat", ULTRAFEEDBACK | {"chat_template_kwargs": [1]}, "is not an object"),
        (
            "preference_chat",
            ULTRAFEEDBACK | {"chat_template_kwargs": {"x": b"y"}},
            "`chat_template_kwargs` is not JSON",
        ),
        ("prompt_chosen_rejected", STRINGS | {"prompt": 7}, "no text and no list of messages in"),
        ("prompt_chosen_rejected", STRINGS | {"rejected": 7}, "no text and no list of messages in"),
        ("prompt_chosen_rejected", STRINGS | {"rejected": None}, "`rejected` is missing, or null"),
        ("prompt_chosen_rejected", STRINGS | {"rejected": "Onwards."}, "chosen equals rejected"),
        ("prompt_chosen_rejected", STRINGS | {"chosen": HALF}, "`chosen` is not valid Unicode"),
        (
            "prompt_chosen_rejected",
            MESSAGES | {"prompt": [user("a"), assistant("b")]},
            "roles out of order: two assistant turns in a row",
        ),
        (
            "sharegpt",
            SHAREGPT | {"conversations": "text"},
            "no list of messages in `conversations`",
        ),
        ("sharegpt", SHAREGPT | {"chosen": {"from": "gpt"}}, "no text in `chosen`"),
        ("instruction", INSTRUCTION | {"instruction": 7}, "no text in `instruction`"),
        ("instruction", INSTRUCTION | {"input": 7}, "no text in `input`"),
        ("openai_preference", OPENAI | {"input": "a"}, "no object with `messages` in `input`"),
        ("openai_preference", OPENAI | {"input": {}}, "`input.messages` is missing, or null"),
        ("best_and_worst", COMPLETIONS | {"completions": [1]}, "no list of ranked answers in"),
        ("best_and_worst", NEMO | {"completions": NEMO["completions"][:1]}, "fewer than two"),
        ("best_and_worst", NEMO | {"completions": [{"rank": 0}, {"rank": 1}]}, "is empty"),
        (
            "best_and_worst",
            COMPLETIONS | {"completions": COMPLETIONS["completions"][:1] * 2},
            "no answer is ranked above another",
        ),
        ("compared", HELPSTEER | {"overall_preference": 0}, "neither response is preferred"),
        ("compared", HELPSTEER | {"overall_preference": None}, "no number in `overall_preference`"),
        ("hh", HH | {"chosen": "no transcript"}, "`chosen` is not a transcript"),
        ("hh", HH | {"chosen": "Well. \n\nHuman: a\n\nAssistant: b"}, "is not a transcript"),
        ("hh", HH | {"rejected": ["a"]}, "no text in `rejected`"),
        ("hh", HH | {"rejected": HH["chosen"] + " \n"}, "chosen equals rejected"),
        (
            "hh",
            HH | {"chosen": "Human: a\n\nAssistant: b\n\nAssistant: c"},
            "two assistant turns in a row",
        ),
        ("plain_text", STRINGS | {"prompt": [user("x")]}, "no text in `prompt`"),
        ("plain_text", STRINGS | {"rejected": "Onwards."}, "chosen equals rejected"),
        ("plain_text", STRINGS | {"tools": [TOOL]}, "plain text cannot contain `tools`"),
        (
            "plain_text",
            STRINGS | {"system_prompt": "x"},
            "plain text cannot contain `system_prompt`",
        ),
        ("plain_transcripts", TRANSCRIPTS | {"chosen": None}, "no text in `chosen`"),
    ],
)
def test_a_malformed_row_is_a_sentence(layout, row, sentence):
    with pytest.raises(ValueError, match=sentence):
        LAYOUTS[layout].read(row)


def test_turns_that_say_nothing_are_seen():
    assert read(STRINGS | {"rejected": ""}).has_empty_turn
    assert read(STRINGS | {"prompt": " \n"}).has_empty_turn
    assert read(HH | {"rejected": "\n\nHuman: Hello\n\nAssistant:"}).has_empty_turn
    assert layouts.plain_text(STRINGS | {"chosen": " "}).has_empty_turn
    assert not read(STRINGS).has_empty_turn


NAMES = [
    *sorted({name for layout in LAYOUTS.values() for name in layout.columns}),
    *columns.ALSO, "role", "content", "from", "value", "type", "text", *messages.BESIDES, "x",
    "score", "rank", "response",
]  # fmt: skip
SAID = strategies.sampled_from(
    [*messages.ROLES, "text", "", "\n\nHuman: a\n\nAssistant: b", "[{}]", '{"a": "\ufdd0"}', HALF,
     json.dumps(TWO), str(TWO)[:-1], json.dumps({"messages": TWO}), str(assistant("a"))]
)  # fmt: skip
JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | SAID | strategies.text(max_size=5)
    | strategies.sampled_from([10**400, 1, assistant("a"), user("b"), b"bytes", {1}]),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
MESSAGE = strategies.fixed_dictionaries(
    {"role": SAID | strategies.sampled_from([*messages.ROLES]), "content": SAID | JSON},
    optional={name: JSON for name in messages.BESIDES},
)
VALUE = JSON | strategies.lists(MESSAGE, max_size=4) | MESSAGE
ROWS = strategies.dictionaries(strategies.sampled_from(NAMES), VALUE, max_size=8)
COLUMNS = strategies.dictionaries(
    strategies.sampled_from(NAMES), strategies.sampled_from(NAMES), max_size=3
)


def read_by_all(example, row, called):
    row = example | row
    before = repr(row)
    named = columns.renamed(row, called)
    try:
        assert columns.recognised(named) in LAYOUTS
    except ValueError as error:
        assert str(error)
    for name, layout in LAYOUTS.items():
        try:
            pair = layout.read(named)
            columns.check_question(named, pair.asked, name)
        except ValueError as error:
            assert 0 < len(str(error)) < 600
            continue
        assert pair.chosen != pair.rejected
        for text in pair.texts:
            text.encode()
        json.dumps([pair.tools, pair.template_kwargs])
        assert {pair.has_empty_turn, pair.shares_no_user_turn} <= {True, False}
    assert repr(row) == before


@settings(max_examples=200, deadline=None)
@given(strategies.sampled_from([{}, *EXAMPLES.values()]), ROWS, COLUMNS)
def test_whatever_a_row_holds_it_is_read_or_refused_with_a_sentence(example, row, called):
    read_by_all(example, row, called)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None)
@given(strategies.sampled_from([{}, *EXAMPLES.values()]), ROWS, COLUMNS)
def test_whatever_many_rows_hold_they_are_read_or_refused(example, row, called):
    read_by_all(example, row, called)


def test_every_layout_of_pairs_has_an_example():
    """Those of single answers stand in test_sft.py."""
    assert EXAMPLES.keys() == layouts.named(single=False).keys()


def test_the_docs_have_a_row_for_each():
    told = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("data.md", "sft.md"))
    rows = re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)
    without = sorted(LAYOUTS.keys() - {*rows})
    assert not without, f"write a row for {', '.join(without)} in docs/data.md"

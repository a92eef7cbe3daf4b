"""Calls and thoughts: each template is given the spelling it wants, and what it hides is named.

The templates here are the kinds that published ones are of.
"""

import json
import re
import time

import pytest

from recipes.data.chats import chat, dialect, left_out, rendering, trial
from recipes.data.chats.dialect import Dialect
from recipes.data.chats.pair import Pair
from recipes.data.ids import examples, pair_ids
from tests.conftest import TINY
from zoo.text import tokenizer

ASK = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
TURN = (
    """{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

BODY<|eot_id|>{% endfor %}"""
    + ASK
)
EACH = "{% for c in m.tool_calls or [] %}CALL{% endfor %}"


def template(body, call=""):
    return TURN.replace("BODY", body + EACH.replace("CALL", call))


PLAIN = template("{{ m.content | trim }}")  # like most of those for chat alone
AS_JSON = template(
    "{{ m.content }}", "<c>{{ c.function.name }} {{ c.function.arguments | tojson }}</c>"
)
AS_TEXT = template(
    "{{ m.content }}", "{{ '<c>' + c.function.name + c.function.arguments + '</c>' }}"
)
AS_XML = template(
    "{{ m.content }}",
    "<f={{ c.function.name }}>{% for k, v in c.function.arguments | items %}"
    "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</f>",
)
EITHER = template(
    "{{ m.content }}",
    "<c>{{ c.function.name }} {% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}</c>",
)
OF_NULL = template(  # DeepSeek's first: where there is content, calls are not looked at
    "{% if m.content is not none %}{{ m.content }}{% endif %}",
    "{% if m.content is none %}"
    "{{ '<c>' + c.function.name + c.function.arguments + '</c>' }}{% endif %}",
)
SPEAKS_TWICE = TURN.replace(  # DeepSeek's R1: an empty content is an answer behind the call
    "BODY<|eot_id|>",
    EACH.replace(
        "CALL", "<c>{{ c.function.name }}{{ c.function.arguments | tojson }}</c><|eot_id|>"
    )
    + "{% if m.content is not none %}{% if m.tool_calls %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}{{ m.content }}<|eot_id|>{% endif %}",
)
THINKING = TURN.replace(
    "BODY",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}",
)
NEEDS_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + AS_JSON


@pytest.fixture(scope="module")
def own():
    return tokenizer.load(TINY / "model")


def prepared(own, text, **other):
    given = own._replace(chat_template=text)
    return trial.prepared(given, scored_turns="assistant", date=None, **other)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **besides):
    return {"role": "assistant", "content": text} | besides


def call(arguments, name="look"):
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


WHERE = {"where": 'the "Oder"', "how": {"deep": 3}}
CALLS = Pair([user("Where?")], [assistant("", tool_calls=[call(WHERE)])], [assistant("No.")])
WRITTEN = json.dumps(WHERE, ensure_ascii=False)


def scored(rendered):
    return [rendered.text[start:stop] for start, stop in rendered.scored]


@pytest.mark.parametrize(
    ("text", "wanted", "shown"),
    [
        (AS_JSON, Dialect(), f"<c>look {WRITTEN}</c>"),
        (AS_TEXT, Dialect(text_arguments=True), f"<c>look{WRITTEN}</c>"),
        (AS_XML, Dialect(), "<f=look><where>the \"Oder\"</where><how>{'deep': 3}</how></f>"),
        (EITHER, Dialect(), f"<c>look {WRITTEN}</c>"),
        (OF_NULL, Dialect(text_arguments=True, null_content=True), f"<c>look{WRITTEN}</c>"),
        (SPEAKS_TWICE, Dialect(null_content=True), f"<c>look{WRITTEN}</c>"),
    ],
)
def test_each_template_is_given_the_spelling_it_wants(own, text, wanted, shown):
    talk = prepared(own, text)
    assert talk.dialects == {"default": wanted}
    chosen, rejected = rendering.render(CALLS, talk)
    assert scored(chosen) == [f"{shown}<|eot_id|>"]
    assert scored(rejected) == ["No.<|eot_id|>"]
    assert chosen.left_out == ()


def test_arguments_that_are_no_object_are_not_written_twice(own):
    odd = Pair(CALLS.prompt, [assistant("", tool_calls=[call("where=Oder")])], CALLS.rejected)
    assert scored(rendering.render(odd, prepared(own, AS_TEXT))[0]) == [
        "<c>lookwhere=Oder</c><|eot_id|>"
    ]
    for text in (AS_JSON, AS_XML):
        with pytest.raises(ValueError, match=r"are not a JSON object \('where=Oder'\)"):
            rendering.render(odd, prepared(own, text))


def test_an_answer_of_which_nothing_is_shown_is_refused(own):
    talk = prepared(own, PLAIN)
    assert talk.dialects == {"default": None}
    with pytest.raises(
        ValueError, match="renders nothing of an answer: it leaves out its tool_calls"
    ):
        rendering.render(CALLS, talk)
    thought = Pair([user("a")], [assistant("b")], [assistant("", reasoning_content="hm")])
    with pytest.raises(ValueError, match="it leaves out its reasoning_content"):
        rendering.render(thought, talk)
    within = [CALLS.chosen[0], {"role": "tool", "content": "seen"}, assistant("There.")]
    with pytest.raises(ValueError, match="it leaves out its tool_calls"):
        rendering.render(CALLS._replace(chosen=within), talk)


def test_what_is_hidden_beside_words_is_named(own):
    talk = prepared(own, PLAIN)
    said = Pair([user("a")], [assistant("I look.", tool_calls=[call(WHERE)])], [assistant("No.")])
    chosen, rejected = rendering.render(said, talk)
    assert (chosen.left_out, rejected.left_out) == (("tool_calls",), ())
    thought = Pair([user("a")], [assistant("b", thinking="hm, hm")], [assistant("c")])
    assert rendering.render(thought, talk)[0].left_out == ("reasoning_content",)
    assert rendering.render(thought, prepared(own, THINKING))[0].left_out == ("reasoning_content",)
    blank = Pair([user("a")], [assistant("b", reasoning_content=" ")], [assistant("c")])
    assert rendering.render(blank, talk)[0].left_out == ()
    read = Pair([user("a")], [assistant("b", reasoning_content="hm, hm")], [assistant("c")])
    assert rendering.render(read, prepared(own, THINKING))[0].left_out == ()
    prompt = Pair([user("a"), assistant("b", tool_calls=[call({})]), user("c")], *said[1:])
    ids = pair_ids.encode(prompt, own, talk, row=0, max_length=256, over_length="drop")
    assert ids.notes == ("left_out/tool_calls",)
    assert examples.described(ids.notes[0]) == "for which the chat template leaves out `tool_calls`"


def test_a_word_that_stands_elsewhere_is_no_call(own):
    """The name and the arguments are in what is said; the call itself is not shown."""
    said = assistant("Now look where: Oder.", tool_calls=[call({"where": "Oder"})])
    chosen, _ = rendering.render(
        Pair([user("a")], [said], [assistant("No.")]), prepared(own, PLAIN)
    )
    assert chosen.left_out == ("tool_calls",)


def test_answers_that_differ_in_what_is_hidden_are_said_to(own):
    given = assistant("b", reasoning_content="hm"), assistant("b", reasoning_content="bah")
    pair = Pair([user("a")], *([turn] for turn in given))
    encode = lambda talk: pair_ids.encode(
        pair, own, talk, row=0, max_length=256, over_length="drop"
    )
    with pytest.raises(ValueError, match="once the chat template has left out reasoning_content"):
        encode(prepared(own, PLAIN))
    assert encode(prepared(own, THINKING)).notes == ()


def test_what_may_be_spelled_otherwise_is_found():
    text = '<think>\nhm\nhm\n</think>\n\nSaid "so".\n{"said": "\\"so\\""}'
    assert left_out.names(assistant(' Said "so".\n', reasoning="hm\nhm"), text) == []
    assert left_out.names(assistant("<think>hm hm</think>Said"), text) == []
    assert left_out.names({"role": "tool", "content": '"so"', "name": "n"}, text) == []
    assert left_out.names({"role": "tool", "content": "so what", "name": "who"}, text) == [
        "content", "name"
    ]  # fmt: skip
    assert left_out.names(assistant("", tool_calls=[call({"said": "no"})]), text) == ["tool_calls"]


# What leads into an answer, and what ends one


def test_thoughts_under_a_prompt_that_wants_none_count(own):
    """The prompt ends with the header, and what either answer begins with is scored."""
    text = THINKING.replace(ASK, "") + (
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    text = text.replace("{% endif %}{{ m.content }}", "{% elif m.role == 'assistant' %}<think>\n\n"
                        "</think>\n\n{% endif %}{{ m.content }}")  # fmt: skip
    pair = Pair([user("a")], [assistant("b")], [assistant("c", reasoning_content="hm")])
    chosen, rejected = rendering.render(pair, prepared(own, text))
    assert scored(chosen) == ["\n</think>\n\nb<|eot_id|>"]
    assert scored(rejected) == ["hm\n</think>\n\nc<|eot_id|>"]
    for side in (chosen, rejected):
        assert side.text[: side.prompt_end].endswith("assistant<|end_header_id|>\n\n<think>\n")


def test_a_header_that_goes_on_otherwise_ends_between_tokens(own):
    """Cohere's answers begin with <|START_TEXT|>, and what is asked for with <|START_THINKING|>."""
    text = """{% for m in messages %}<|turn|>{{ m.role }}{% if m.role == 'assistant' %}\
{% if m.tool_calls %}<|START_ACTION|>{{ m.tool_calls[0].function | tojson }}\
{% else %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% endif %}\
{% else %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% endif %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|turn|>assistant<|START_THINKING|>{% endif %}"""
    special = re.compile(r"<\|\w+\|>")
    talk = prepared(own._replace(specials=special), text)
    chosen, rejected = rendering.render(CALLS, talk)
    function = json.dumps(call(WHERE)["function"], ensure_ascii=False)
    assert scored(chosen) == [f"<|START_ACTION|>{function}<|end|>"]
    assert scored(rejected) == ["<|START_TEXT|>No.<|END_TEXT|><|end|>"]
    seen = {"role": "tool", "content": "seen"}
    chain = CALLS._replace(chosen=[*CALLS.chosen, seen, assistant("There.")])
    assert scored(rendering.render(chain, talk)[0]) == [
        f"<|START_ACTION|>{function}<|end|>", "<|START_TEXT|>There.<|END_TEXT|><|end|>"
    ]  # fmt: skip


def test_a_template_that_cannot_do_without_tools_serves_rows_that_have_some(own):
    talk = prepared(own, NEEDS_TOOLS)
    tools = [{"type": "function", "function": {"name": "look"}}]
    chosen, _ = rendering.render(CALLS._replace(tools=tools), talk)
    assert scored(chosen) == [f"<c>look {WRITTEN}</c><|eot_id|>"]
    with pytest.raises(ValueError, match="refuses the messages"):
        rendering.render(CALLS, talk)


def test_what_is_written_behind_an_answer_may_not_be_a_text(own):
    """Command R+ writes a system message there, which would be learnt as a part of the answer."""
    text = (
        PLAIN.replace(ASK, "")
        + "<|start_header_id|>system<|end_header_id|>\n\nAct!<|eot_id|>"
        + ASK
    )
    with pytest.raises(
        ValueError, match=r"writes more than an end of turn after each answer \('system'\)"
    ):
        prepared(own, text)


def test_what_leads_into_another_answer_is_cut_off(own):
    """Cohere's template for tools asks again behind the last answer, told to or not."""
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    text = PLAIN.replace(ASK, "") + header + "{{ '' }}"  # or jinja drops the last newline
    ended = own._replace(named=own.named | {"eos_token": "<|eot_id|>"})
    talk = prepared(ended, text)
    assert (talk.end_of_turn, talk.surplus) == ("<|eot_id|>", header)
    pair = Pair([user("a")], [assistant("b"), user("c"), assistant("d")], [assistant("e")])
    chosen, rejected = rendering.render(pair, talk)
    assert scored(chosen) == ["b<|eot_id|>", "d<|eot_id|>"]
    assert scored(rejected) == ["e<|eot_id|>"]
    assert rejected.text[: rejected.prompt_end].endswith(header)
    assert rejected.text.endswith("e<|eot_id|>")


ENDLESS = PLAIN.replace(
    "<|eot_id|>{% endfor %}",
    "{% if m.role == 'user' or not loop.last %}<|eot_id|>{% endif %}{% endfor %}",
)


def test_an_end_of_turn_that_a_template_lacks_can_be_given(own):
    pair = Pair([user("a")], [assistant("b"), user("c"), assistant("d")], [assistant("e")])
    talk = prepared(own, ENDLESS)
    assert not chat.stops(own, talk)
    assert scored(rendering.render(pair, talk)[1]) == ["e"]
    ended = prepared(own, ENDLESS, end_of_turn="<|eot_id|>")
    assert chat.stops(own, ended)
    assert chat.stop_ids(own, ended) == (own.eos_id, own.special["<|eot_id|>"])
    chosen, rejected = rendering.render(pair, ended)
    assert "".join(scored(rejected)) == "e<|eot_id|>"
    assert "".join(scored(chosen)).endswith("d<|eot_id|>")
    ids = pair_ids.encode(pair, own, ended, row=0, max_length=256, over_length="drop")
    assert ids.rejected[-1] == own.special["<|eot_id|>"]
    assert ids.rejected_scored[-1]
    with pytest.raises(ValueError, match="is not a special token of this tokenizer"):
        prepared(own, ENDLESS, end_of_turn="</s>")
    with pytest.raises(ValueError, match=r"has no effect: .* itself ends each answer"):
        prepared(own, PLAIN, end_of_turn="<|eot_id|>")


def test_a_row_of_many_megabytes_is_one_row(own):
    """What two long texts have in common is not looked for letter by letter."""
    talk, long = prepared(own, PLAIN), "x" * 15_000_000
    pair = Pair([user(long)], [assistant("b")], [assistant("c")])
    assert scored(rendering.render(pair, talk)[0]) == ["b<|eot_id|>"]
    since = time.thread_time()
    assert chat.shared_start(f"{long}a", f"{long}b", talk) == len(long)
    assert time.thread_time() - since < 0.5  # of CPU time; letter by letter it takes two


def test_the_spelling_tried_is_no_form_of_the_question():
    """What a template prints of the question would pass for a call."""
    for word in (dialect.NAME, *dialect.ARGUMENTS, *dialect.ARGUMENTS.values()):
        assert word not in dialect.QUESTION["content"]


def test_every_stock_template_shows_calls_once_or_refuses_them(own, shared):
    shown = refused = 0
    for path in sorted((shared / "data" / "chat_templates").glob("*/*.jinja")):
        text = path.read_text("utf-8")
        date = "2026-01-31" if "strftime_now" in text else None
        talk = trial.prepared(own._replace(chat_template=text), scored_turns="assistant", date=date)
        try:
            chosen, _ = rendering.render(CALLS._replace(tools=[dialect.TOOL]), talk)
        except ValueError as error:
            assert re.search("leaves out its tool_calls|refuses the messages", str(error)), path
            refused += 1
            continue
        words = "".join(scored(chosen))
        assert chosen.left_out == (), path
        assert "look" in words
        assert "Oder" in words
        assert '\\"where' not in words, path
        assert "'where'" not in words, path
        shown += 1
    assert shown > 10
    assert refused > 10

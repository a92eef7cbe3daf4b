"""Turns in an unusual order, answers that the prompt begins, marks of other chat formats."""

import pytest

from recipes.data.chats import layouts, rendering, trial, unusual
from recipes.data.chats.pair import Pair
from recipes.data.ids import pair_ids
from tests.conftest import TINY
from zoo.text import tokenizer

CHATML = """{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Puts every system message first; writes turns of the assistant as one.
FIRST = """{% for m in messages if m.role == 'system' %}{{ m.content }}
{% endfor %}{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}\
{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}<|eot_id|>"""
# Parts an answer from what follows by a line that it does not write where it asks for an answer.
PARTED = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% if m.role == 'assistant' %}<|eot_id|>{% endif %}\
{% if m.role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
MERGED = """{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}\
{{ m.content }}{% if loop.last %}<|eot_id|>{% endif %}{% endif %}{% endfor %}"""
THINKS = """{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' and \
loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def own():
    return tokenizer.load(TINY / "model")


def turn(role, content):
    return {"role": role, "content": content}


def encoded(pair, own, template):
    talk = trial.prepared(own._replace(chat_template=template), scored_turns="assistant", date=None)
    return pair_ids.encode(pair, own, talk, row=0, max_length=512, over_length="drop")


def scored(own, ids, side="chosen"):
    return own.decode(getattr(ids, side)[getattr(ids, f"{side}_scored")])


HI = [turn("user", "Hi"), turn("assistant", "Hello.")]
ANSWERS = {"chosen": [turn("assistant", "Onwards.")], "rejected": [turn("assistant", "Back.")]}
LATER = {"prompt": [*HI, turn("system", "Be brief."), turn("user", "Which way?")]} | ANSWERS
TWICE = {
    "prompt": [turn("user", "Which way?")],
    "chosen": [turn("assistant", "Let me see."), turn("assistant", "Onwards.")],
    "rejected": [turn("assistant", "Back.")],
}


def test_a_later_system_message_is_used_where_it_is_shown_in_its_place(own):
    pair = layouts.prompt_chosen_rejected(LATER)
    ids = encoded(pair, own, CHATML)
    assert own.decode(ids.prompt).endswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich way?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert scored(own, ids) == "Onwards.<|im_end|>\n"
    for template in (FIRST, CHATML.replace("messages %}", "messages if m.role != 'system' %}")):
        with pytest.raises(ValueError, match="roles out of order: a system message after the fir"):
            encoded(pair, own, template)


def test_two_assistant_turns_are_used_where_each_is_shown(own):
    pair = layouts.prompt_chosen_rejected(TWICE)
    ids = encoded(pair, own, CHATML)
    assert scored(own, ids) == "Let me see.<|im_end|>\nOnwards.<|im_end|>\n"
    assert own.decode(ids.chosen) == (
        "Let me see.<|im_end|>\n<|im_start|>assistant\nOnwards.<|im_end|>\n"
    )
    with pytest.raises(ValueError, match="roles out of order: two assistant turns in a row"):
        encoded(pair, own, MERGED)
    shared = {k: [*TWICE["prompt"], *TWICE["chosen"][:1], *v] for k, v in ANSWERS.items()}
    ids = encoded(layouts.preference_chat(shared), own, CHATML)
    assert own.decode(ids.prompt).endswith("Let me see.<|im_end|>\n<|im_start|>assistant\n")
    assert scored(own, ids) == "Onwards.<|im_end|>\n"
    with pytest.raises(ValueError, match="roles out of order: two assistant turns in a row"):
        encoded(layouts.preference_chat(shared), own, PARTED)
    with pytest.raises(ValueError, match="roles out of order: two assistant turns in a row"):
        encoded(pair, own, THINKS)  # what it writes before the second answer would not count


@pytest.mark.parametrize("template", [CHATML, THINKS, MERGED])
def test_an_answer_that_the_prompt_begins_counts_from_where_it_goes_on(own, template):
    said = {"chosen": "Well:\nOnwards.", "rejected": "Well:\nBack."}
    answers = {name: [turn("assistant", words)] for name, words in said.items()}
    row = {"prompt": [turn("user", "Which way?"), turn("assistant", "Well:\n")]} | answers
    ids = encoded(layouts.prompt_chosen_rejected(row), own, template)
    end = "<|eot_id|>" if template == MERGED else "<|im_end|>\n"
    assert own.decode(ids.prompt).endswith("Well:\n")
    assert own.decode(ids.prompt).count("Well:") == 1
    assert own.decode(ids.chosen) == scored(own, ids) == f"Onwards.{end}"
    assert own.decode(ids.rejected) == scored(own, ids, "rejected") == f"Back.{end}"


def test_the_beginning_of_an_answer_belongs_to_the_prompt_s_text(own):
    row = {"prompt": [turn("user", "a"), turn("assistant", "Well:")]}
    row |= {k: [turn("assistant", f"Well: {k}")] for k in ANSWERS}
    pair = layouts.prompt_chosen_rejected(row)
    talk = trial.prepared(own._replace(chat_template=CHATML), scored_turns="assistant", date=None)
    for text, name in zip(
        unusual.checked(pair, rendering.render(pair, talk), talk), ANSWERS, strict=True
    ):
        assert text.text[: text.prompt_end].endswith("<|im_start|>assistant\nWell:")
        assert [text.text[a:b] for a, b in text.scored] == [f" {name}<|im_end|>\n"]


def test_a_beginning_that_is_not_shown_is_refused(own):
    pair = Pair([turn("user", "a")], ANSWERS["chosen"], ANSWERS["rejected"], prefill="Well: ")
    with pytest.raises(ValueError, match="changes the beginning of the answer"):
        encoded(pair, own, CHATML)


@pytest.mark.parametrize(
    ("asked", "marked"),
    [
        ("Which way?", False),
        ("\n\nHuman: Which way?\n\nAssistant:", True),
        ("<|im_start|>user\nWhich way?<|im_end|>\n<|im_start|>assistant\n", True),
        ("[INST] Which way? [/INST]", True),
        ("A chat. USER: Which way? ASSISTANT:", True),
        ("### Instruction:\nWhich way?\n\n### Response:\n", True),
        ("A human and an assistant: which way?", False),
    ],
)
def test_marks_of_another_format_in_a_prompt_are_counted(own, asked, marked):
    pair = layouts.prompt_chosen_rejected({"prompt": asked} | ANSWERS)
    notes = encoded(pair, own, CHATML).notes
    assert ("other_format" in notes) == marked
    assert not unusual.of_another_format(layouts.plain_text({"prompt": asked} | TEXTS))


TEXTS = {"chosen": "Onwards.", "rejected": "Back."}


@pytest.mark.parametrize(
    ("end", "marked"),
    [("</s>", True), ("<|im_end|>\n", True), ("<extra_id_1>", True), ("s>", False)],
)
def test_marks_of_another_format_behind_an_answer_are_counted(own, end, marked):
    row = {"prompt": "Which way?"} | TEXTS | {"rejected": f"Back.{end}"}
    pair = layouts.prompt_chosen_rejected(row)
    assert ("other_format" in encoded(pair, own, CHATML).notes) == marked
    assert not unusual.of_another_format(layouts.plain_text(row))


def test_answers_that_begin_with_the_question_are_counted(own):
    asked = "Which way do we go?"
    row = {"prompt": asked, "chosen": f"{asked} Onwards.", "rejected": f"{asked} Back."}
    pair = layouts.prompt_chosen_rejected(row)
    assert encoded(pair, own, CHATML).notes == ("asks_again",)
    assert not unusual.asks_again(layouts.prompt_chosen_rejected(row | {"rejected": "Back."}))
    short = {"prompt": "Hello", "chosen": "Hello! What now?", "rejected": "Hello you."}
    assert not unusual.asks_again(layouts.prompt_chosen_rejected(short))

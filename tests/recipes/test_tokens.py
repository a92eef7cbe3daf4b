"""Tokens and masks: what counts, to the letter."""

from hypothesis import given, settings, strategies
import numpy as np
import pytest

from recipes.data import chat, layouts, tokens
from recipes.data.layouts import Pair
from tests.conftest import TINY

MARKED = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}
{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>
{% endif %}"""


@pytest.fixture
def tokenizer():
    return chat.load_tokenizer(TINY / "model", None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def encoded(pair, tokenizer, **other):
    given = dict(row=0, max_length=512, over_length="drop") | other
    return tokens.encode(pair, tokenizer, **given)


def scored_text(tokenizer, ids, scored):
    return tokenizer.decode(ids[scored])


def test_an_answer_and_its_end_of_turn_are_scored(tokenizer):
    pair = layouts.preference_chat(
        {
            "chosen": [user("Which way?"), assistant("Onwards!")],
            "rejected": [user("Which way?"), assistant("Back.")],
        }
    )
    ids = encoded(pair, tokenizer)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    asked = f"<|begin_of_text|>{head.format('user')}Which way?<|eot_id|>{head.format('assistant')}"
    assert tokenizer.decode(ids.prompt) == asked
    assert tokenizer.decode(ids.chosen) == "Onwards!<|eot_id|>"
    assert tokenizer.decode(ids.rejected) == "Back.<|eot_id|>"
    assert ids.chosen_scored.all()
    assert ids.rejected_scored.all()
    assert [*ids.prompt].count(tokenizer.bos_token_id) == 1
    assert not ids.boundary_moved


def test_later_user_turns_are_stored_and_not_scored(tokenizer):
    pair = Pair([user("a")], [assistant("b"), user("c"), assistant("d")], [assistant("e")])
    ids = encoded(pair, tokenizer)
    assert "c<|eot_id|>" in tokenizer.decode(ids.chosen)
    assert scored_text(tokenizer, ids.chosen, ids.chosen_scored) == "b<|eot_id|>d<|eot_id|>"
    everything = encoded(pair, tokenizer, mask_user_turns=False)
    assert "c<|eot_id|>" in scored_text(tokenizer, everything.chosen, everything.chosen_scored)


def test_shared_assistant_turns_belong_to_the_prompt(tokenizer):
    shared_turns = [user("a"), assistant("b"), user("c")]
    row = {
        "chosen": [*shared_turns, assistant("good")],
        "rejected": [*shared_turns, assistant("bad")],
    }
    ids = encoded(layouts.preference_chat(row), tokenizer)
    assert "b<|eot_id|>" in tokenizer.decode(ids.prompt)
    assert scored_text(tokenizer, ids.chosen, ids.chosen_scored) == "good<|eot_id|>"


def test_generation_blocks_and_prefixes_agree(tokenizer):
    pair = Pair([user("a b")], [assistant("c, d!"), user("e"), assistant("f")], [assistant("g")])
    tokenizer.chat_template = MARKED
    marked = encoded(pair, tokenizer)
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace(
        "{% endgeneration %}\n", ""
    )
    plain = encoded(pair, tokenizer)
    for side in ("chosen", "rejected"):
        texts = [
            scored_text(tokenizer, getattr(ids, side), getattr(ids, f"{side}_scored"))
            for ids in (marked, plain)
        ]
        assert texts[0] == texts[1]
    assert texts[0] == "g<|eot_id|>"


def test_an_empty_answer_still_ends(tokenizer):
    ids = encoded(Pair([user("a")], [assistant("")], [assistant("b")]), tokenizer)
    assert tokenizer.decode(ids.chosen[ids.chosen_scored]) == "<|eot_id|>"


def test_a_merge_across_the_boundary_moves_it_back(tokenizer):
    # "capital" is one token or few; cut inside it the prompt's ids are no prefix of the whole.
    ids = encoded(Pair("Tell me the capi", "tal of France", "tulate"), tokenizer)
    assert ids.boundary_moved
    whole = np.concatenate([ids.prompt, ids.chosen])
    assert tokenizer.decode(whole[:-1], skip_special_tokens=False).endswith("capital of France")
    assert whole[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(np.concatenate([ids.prompt, ids.rejected])[:-1])
    assert text.endswith("capitulate")
    assert "tal of France" in tokenizer.decode(ids.chosen[ids.chosen_scored])


WORDS = strategies.text(
    strategies.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12
)


@settings(max_examples=80, deadline=None)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS)
def test_no_text_is_lost_at_the_boundary(prompt, chosen, rejected):
    tokenizer = chat.load_tokenizer(TINY / "model", None)
    try:
        ids = encoded(Pair(prompt, chosen, rejected), tokenizer)
    except ValueError as error:
        assert str(error) in ("chosen equals rejected", "the prompt is empty")
        return
    for answer, text in ((ids.chosen, chosen), (ids.rejected, rejected)):
        whole = np.concatenate([ids.prompt, answer])
        expected = tokenizer(prompt + text, add_special_tokens=False).input_ids
        assert [*whole] == [*expected, tokenizer.eos_token_id]


def test_too_long_is_dropped_or_cut(tokenizer):
    pair = Pair([user("a")], [assistant("one two three four")], [assistant("five")])
    room = len(encoded(pair, tokenizer).prompt) + 3
    with pytest.raises(ValueError, match="longer than train_seq_len"):
        encoded(pair, tokenizer, max_length=room)
    cut = encoded(pair, tokenizer, max_length=room, over_length="cut_answer")
    assert cut.truncated
    assert len(cut.prompt) + len(cut.chosen) == room
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in cut.chosen
    with pytest.raises(ValueError, match="nothing to score is left"):
        encoded(pair, tokenizer, max_length=len(cut.prompt), over_length="cut_answer")


def test_nothing_to_score_is_never_trained_on(tokenizer):
    with pytest.raises(ValueError, match="nothing to score"):
        encoded(Pair([user("a")], [user("b")], [assistant("c")]), tokenizer)


def test_a_template_that_forgets_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="changes the prompt"):
        encoded(Pair([user("a")], [assistant("b")], [assistant("c")]), tokenizer)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "no chat template"),
        ("{% for %}", "cannot be used"),
        ("{{ raise_exception('not you') }}", "not you"),
        ("{{ messages[0].content }}", "cannot be used|no part"),
    ],
)
def test_a_template_that_cannot_work_stops_the_run(tokenizer, template, told):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=told):
        chat.check_template(tokenizer)


def test_templates_run_in_a_sandbox(tokenizer):
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="refuses"):
        chat.render(Pair([user("a")], [assistant("b")], [assistant("c")]), tokenizer,
                    mask_user_turns=True)  # fmt: skip


def test_generation_ends_with_the_turn(tokenizer):
    named = tokenizer.convert_ids_to_tokens(list(chat.stop_ids(tokenizer)))
    assert named == ["<|end_of_text|>", "<|eot_id|>"]


STOCK = {
    "trl/llama3.jinja": "Onwards.<|eot_id|>",
    "trl/llama3_training.jinja": "Onwards.<|eot_id|>",
    "trl/qwen2_5.jinja": "Onwards.<|im_end|>\n",
    "chujiezheng/zephyr.jinja": "Onwards.",
    "chujiezheng/chatml.jinja": "Onwards.<|im_end|>\n",
    "chujiezheng/llama-2-chat.jinja": " Onwards. <|end_of_text|>",
    "chujiezheng/mistral-instruct.jinja": " Onwards.<|end_of_text|>",
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates(shared, tokenizer, name):
    template = (shared / "data" / "chat_templates" / name).read_text()
    if name.startswith("chujiezheng"):  # that collection is indented for readers
        template = template.replace("    ", "").replace("\n", "")
    tokenizer.chat_template = template
    rendered, _ = chat.render(
        Pair(chat.PROBE[:1], chat.PROBE[1:], [assistant("Back.")]), tokenizer, mask_user_turns=True
    )
    ((start, end),) = rendered.scored
    assert rendered.text[start:end].startswith(STOCK[name])
    assert rendered.text.count("Onwards.") == 1

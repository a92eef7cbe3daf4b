"""Chat templates as they are published: what of a pair they say, and what of it counts."""

import re

import pytest

from recipes.data.chats import chat, messages, rendering, trial
from recipes.data.chats.pair import Pair
from recipes.training import settings
from tests.conftest import TINY
from zoo.text import tokenizer


@pytest.fixture(scope="module")
def own():
    """What it says is special is here what published ones say is."""
    special = re.compile(r"</?s>|<\|\w+\|>|<(?:start|end)_of_turn>")
    tiny = tokenizer.load(TINY / "model")
    return tiny._replace(named={"bos_token": "<s>", "eos_token": "</s>"}, specials=special)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **besides):
    return {"role": "assistant", "content": text} | besides


def stock(shared, name):
    text = (shared / "data" / "chat_templates" / f"{name}.jinja").read_text()
    # That collection is indented for readers.
    return text.replace("    ", "").replace("\n", "") if name.startswith("chujiezheng") else text


def prepared(own, text, scored_turns="assistant", date=None):
    return trial.prepared(own._replace(chat_template=text), scored_turns=scored_turns, date=date)


def scored(rendered):
    return [rendered.text[start:stop] for start, stop in rendered.scored]


SINGLE = Pair([user("Which way?")], [assistant("Onwards!")], [assistant("Back.")])
SEVERAL = Pair(
    [user("a"), assistant("b"), user("c")],
    [assistant("One."), user("Why?"), assistant("Two.")],
    [assistant("Three.")],
)
DAY = "2026-01-31"

# What the prompt ends with, what comes before an answer and behind it, and what takes the place of
# the latter where another turn follows.
LLAMA3 = "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", None
CHATML = "<|im_start|>assistant\n", "", "<|im_end|>\n", None
GEMMA = "<start_of_turn>model\n", "", "<end_of_turn>\n", None
SPACED, CLOSE = ("[/INST]", " ", "</s>", None), ("[/INST]", "", "</s>", None)
PHI3 = "<|assistant|>\n", "", "<|end|>\n</s>", "<|end|>\n"
STOCK = {
    "chujiezheng/llama-2-chat": ("[/INST]", " ", " </s>", None),
    "chujiezheng/llama-3-instruct": LLAMA3,
    "trl/llama3": LLAMA3,
    "trl/llama3_1": LLAMA3,
    "trl/llama3_2": LLAMA3,
    "trl/llama3_training": LLAMA3,
    "trl/qwen2_5": CHATML,
    "trl/qwen3_instruct_2507": CHATML,
    "trl/qwen3_instruct_2507_training": CHATML,
    "chujiezheng/chatml": CHATML,
    "chujiezheng/gemma-it": GEMMA,
    "trl/gemma": GEMMA,
    "trl/gemma_training": GEMMA,
    "trl/gemma3": GEMMA,
    "trl/gemma3_training": GEMMA,
    "chujiezheng/mistral-instruct": SPACED,
    "mistral-common/v1_spm": SPACED,
    "mistral-common/v2_spm": SPACED,
    "mistral-common/v3_spm": SPACED,
    "mistral-common/v7_spm": SPACED,
    "mistral-common/v3": CLOSE,
    "mistral-common/v7": CLOSE,
    "mistral-common/v13": CLOSE,
    "chujiezheng/phi-3": ("<|assistant|>\n", "", "<|end|>\n", None),
    "trl/phi3": PHI3,
    "trl/phi3_5": PHI3,
    "other/olmo_tulu_test": ("<|assistant|>\n", "", "</s>", None),
    "other/smollm3": CHATML,
    "chujiezheng/zephyr": ("<|assistant|>\n", "", "</s>\n", None),
}
DATED = ("trl/llama3_2", "other/smollm3")


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_template_to_the_letter(shared, own, name):
    header, before, behind, within = STOCK[name]
    talk = prepared(own, stock(shared, name), date=DAY if name in DATED else None)
    assert talk.end_of_turn == behind
    for pair in (SINGLE, SEVERAL):
        for rendered, answer in zip(rendering.render(pair, talk), pair[1:3], strict=True):
            said = [turn["content"] for turn in answer if turn["role"] == "assistant"]
            ends = [behind if within is None else within] * (len(said) - 1) + [behind]
            expected = [f"{before}{a}{b}" for a, b in zip(said, ends, strict=True)]
            assert scored(rendered) == expected
            assert rendered.text[: rendered.prompt_end].endswith(header)
            assert rendered.text.endswith(expected[-1])
            assert not rendered.left_out


@pytest.mark.parametrize("name", ["trl/phi3_training", "trl/phi3_5_training"])
def test_an_end_of_text_that_is_marked_by_itself_counts(shared, own, name):
    chosen, rejected = rendering.render(SEVERAL, prepared(own, stock(shared, name)))
    assert scored(chosen) == ["One.<|end|>\n", "Two.<|end|>\n", "</s>"]
    assert scored(rejected) == ["Three.<|end|>\n", "</s>"]


def test_the_last_turn_is_more_than_the_last_mark(shared, own):
    talk = prepared(own, stock(shared, "trl/phi3_training"), scored_turns="last")
    assert scored(rendering.render(SEVERAL, talk)[0]) == ["Two.<|end|>\n", "</s>"]


def test_qwen_2_5_training_marks_a_line_of_the_header_but_not_of_the_prompt(shared, own):
    """Its block begins before the newline of the header; what is prompt never counts."""
    chosen, rejected = rendering.render(
        SEVERAL, prepared(own, stock(shared, "trl/qwen2_5_training"))
    )
    assert scored(chosen) == ["One.<|im_end|>\n", "\nTwo.<|im_end|>\n"]
    assert scored(rejected) == ["Three.<|im_end|>\n"]


def test_qwen_2_5_of_the_collection_has_lost_its_newlines(shared, own):
    """They stand in its strings, and go with those of its layout."""
    talk = prepared(own, stock(shared, "chujiezheng/qwen2.5-instruct"))
    assert scored(rendering.render(SINGLE, talk)[0]) == ["Onwards!<|im_end|>"]


def test_every_stock_template_is_looked_at(shared):
    others = {
        "trl/phi3_training", "trl/phi3_5_training", "trl/qwen2_5_training", "trl/qwen3",
        "trl/qwen3_training", "chujiezheng/qwen2.5-instruct",
    }  # fmt: skip
    folder = shared / "data" / "chat_templates"
    there = {str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/*.jinja")}
    assert there == {*STOCK, *others}


# Templates that change what they have said


def test_qwen_3_thinks_before_its_last_answer_alone(shared, own):
    """The empty thoughts stand in the answer and count: to be sampled, they must be learnt."""
    chosen, rejected = rendering.render(SEVERAL, prepared(own, stock(shared, "trl/qwen3")))
    empty = "<think>\n\n</think>\n\n"
    assert scored(chosen) == ["One.<|im_end|>\n", f"{empty}Two.<|im_end|>\n"]
    assert scored(rejected) == [f"{empty}Three.<|im_end|>\n"]
    assert chosen.text[: chosen.prompt_end].endswith("<|im_start|>assistant\n")
    assert chosen.text[: chosen.prompt_end] == rejected.text[: rejected.prompt_end]


def test_qwen_3_told_not_to_think_has_the_empty_thoughts_in_the_prompt(shared, own):
    talk = prepared(own, stock(shared, "trl/qwen3"))
    pair = SINGLE._replace(template_kwargs={"enable_thinking": False})
    chosen, _ = rendering.render(pair, talk)
    assert scored(chosen) == ["Onwards!<|im_end|>\n"]
    assert chosen.text[: chosen.prompt_end].endswith("assistant\n<think>\n\n</think>\n\n")


def test_qwen_3_for_training_thinks_before_all(shared, own):
    chosen, _ = rendering.render(SEVERAL, prepared(own, stock(shared, "trl/qwen3_training")))
    empty = "<think>\n\n</think>\n\n"
    assert scored(chosen) == [f"{empty}One.<|im_end|>\n", f"{empty}Two.<|im_end|>\n"]


def test_thoughts_that_a_template_leaves_out_of_earlier_turns_are_noted(shared, own):
    thinking = "<think>\nhm\n</think>\n\n"
    chosen = [assistant(f"{thinking}One."), user("Why?"), assistant(f"{thinking}Two.")]
    pair = Pair([user("a")], chosen, [assistant(f"{thinking}Three.")])
    first, second = rendering.render(pair, prepared(own, stock(shared, "trl/qwen3")))
    assert scored(first) == ["One.<|im_end|>\n", f"{thinking}Two.<|im_end|>\n"]
    assert first.left_out
    assert not second.left_out


def test_calls_and_thoughts_of_an_earlier_turn_count(shared, own):
    """Qwen 3 writes other thoughts before a turn once it is the last no more."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    tool = {"role": "tool", "content": "seen"}
    talk = prepared(own, stock(shared, "trl/qwen3"))
    asks = assistant("", tool_calls=[call])
    pair = Pair([user("a")], [asks, tool, assistant("b")], [assistant("c")])
    called = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>\n'
    assert scored(rendering.render(pair, talk)[0])[0] == called
    thinks = pair._replace(chosen=[asks | {"reasoning_content": "hm"}, tool, assistant("b")])
    assert scored(rendering.render(thinks, talk)[0])[0] == f"<think>\nhm\n</think>\n\n{called}"


# After DeepSeek R1: thoughts of what was said are left out, and an answer to come begins in them.
DEEPSEEK = """{{ bos_token }}{% for m in messages %}\
{% if m.role == 'user' %}<｜User｜>{{ m.content }}\
{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}\
<｜end▁of▁sentence｜>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""


@pytest.mark.parametrize("words", ["Onwards!", "<b>Onwards!</b>", "<think", "<th", "<"])
def test_deepseek_takes_the_thoughts_it_has_begun_back(own, words):
    """The prompt ends where answers begin, though both go on with `<`."""
    pair = Pair([user("Which way?")], [assistant(words)], [assistant("<i>Back.</i>")])
    for rendered, answer in zip(
        rendering.render(pair, prepared(own, DEEPSEEK)), pair[1:3], strict=True
    ):
        assert rendered.text[: rendered.prompt_end] == "<s><｜User｜>Which way?<｜Assistant｜>"
        assert scored(rendered) == [f"{answer[0]['content']}<｜end▁of▁sentence｜>"]


def test_deepseek_in_several_turns(own):
    chosen, _ = rendering.render(SEVERAL, prepared(own, DEEPSEEK))
    assert scored(chosen) == ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"]
    thought = Pair([user("a")], [assistant("<think>hm</think>b")], [assistant("c")])
    chosen, rejected = rendering.render(thought, prepared(own, DEEPSEEK))
    assert scored(chosen) == ["b<｜end▁of▁sentence｜>"]
    assert (chosen.left_out, rejected.left_out) == (("content",), ())


@pytest.mark.parametrize("name", DATED)
def test_a_template_that_prints_the_date_wants_to_be_told_which(shared, own, name):
    text = stock(shared, name)
    with pytest.raises(ValueError, match=r"prints today's date.*--config\.data\.date=2026-01-31"):
        prepared(own, text)
    first, second = (rendering.render(SINGLE, prepared(own, text, date=DAY))[0] for _ in range(2))
    assert first == second
    assert "31 Jan" in first.text
    with pytest.raises(ValueError, match="has no effect"):
        prepared(own, stock(shared, "trl/llama3"), date=DAY)


def test_a_template_that_always_begins_another_answer_is_refused(own):
    """Llama 3's first did: the header it writes behind an answer would be learnt."""
    text = """{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>

"""
    with pytest.raises(ValueError, match="it begins another answer after each one"):
        prepared(own, text)


# Blocks and comparison


@pytest.mark.parametrize(
    "name",
    ["trl/llama3_training", "trl/gemma_training", "trl/gemma3_training", "trl/qwen3_training",
     "trl/qwen3_instruct_2507_training", "trl/phi3_training", "trl/phi3_5_training"],
)  # fmt: skip
@pytest.mark.parametrize("scored_turns", ["assistant", "last"])
def test_generation_blocks_say_what_comparison_finds(shared, own, name, scored_turns):
    marked = stock(shared, name)
    no_block = lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"
    unmarked = re.sub(r"(\{%-? )(end)?generation( -?%\})", no_block, marked)
    talks = [prepared(own, text, scored_turns) for text in (marked, unmarked)]
    assert [talk.marked for talk in talks] == [True, False]
    for pair in (SINGLE, SEVERAL):
        for blocks, compared in zip(*(rendering.render(pair, talk) for talk in talks), strict=True):
            assert blocks.text == compared.text
            assert blocks.prompt_end == compared.prompt_end
            assert "".join(scored(blocks)) == "".join(scored(compared))


def test_which_turns_count(shared, own):
    text = stock(shared, "trl/llama3")
    told = {
        turns: scored(rendering.render(SEVERAL, prepared(own, text, turns))[0])
        for turns in settings.ALL["data.scored_turns"].choices
    }
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    between = f"{header.format('user')}Why?<|eot_id|>{header.format('assistant')}"
    assert told == {
        "assistant": ["One.<|eot_id|>", "Two.<|eot_id|>"],
        "last": ["Two.<|eot_id|>"],
        "all": [f"One.<|eot_id|>{between}Two.<|eot_id|>"],
    }


@pytest.mark.parametrize("name", ["trl/qwen2_5", "trl/qwen2_5_training"])
def test_a_turn_that_is_marked_not_to_be_trained_does_not_count(shared, own, name):
    """Of a template that marks what is generated, and of one that does not."""
    quiet = lambda text: assistant(text) | {messages.QUIET: True}

    def counted(*turns, how="assistant"):
        talk = prepared(own, stock(shared, name), how)
        (shown,) = rendering.render(Pair([user("a")], [*turns], None), talk)
        return [text.strip() for text in scored(shown)]

    turns = assistant("b"), user("c"), quiet("d"), user("e"), assistant("f")
    assert counted(*turns) == ["b<|im_end|>", "f<|im_end|>"]
    first = quiet("b"), user("c"), assistant("d")
    assert counted(*first) == counted(*first, how="last") == ["d<|im_end|>"]
    none = *first[:-1], quiet("d")
    assert counted(*none, how="all")[0].startswith("b<|im_end|>")
    for how in ("last", "assistant"):
        with pytest.raises(ValueError, match="is marked not to be trained"):
            counted(*none, how=how)


def test_no_template_sees_that_a_turn_is_not_to_be_trained(own):
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m | length }}\n{% endfor %}"
    turns = [assistant("b") | {messages.QUIET: True}, user("c"), assistant("d")]
    (shown,) = rendering.render(Pair([user("a")], turns, None), prepared(own, text))
    assert shown.text == "user: a 2\nassistant: b 2\nuser: c 2\nassistant: d 2\n"


def test_a_template_is_told_of_tools_and_of_what_a_row_says_besides(own):
    text = """{% for t in tools or [] %}{{ t.name }};{% endfor %}{{ mood }};\
{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls or '' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
    pair = SINGLE._replace(tools=[{"name": "look"}], template_kwargs={"mood": "calm"})
    chosen, _ = rendering.render(pair, prepared(own, text))
    assert chosen.text == "look;calm;user: Which way?\nassistant: Onwards!\n"
    assert scored(chosen) == ["Onwards!\n"]


def test_a_template_for_tools_serves_rows_that_have_some(own):
    simple = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    two = own._replace(chat_templates={"tool_use": "Tools!\n" + simple})
    talk = prepared(two, simple)
    assert rendering.render(SINGLE, talk)[0].text.startswith("user:")
    assert rendering.render(SINGLE._replace(tools=[{}]), talk)[0].text.startswith("Tools!")


# What cannot work


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no chat template: give one with --config.chat_template=FILE"),
        ("", "no chat template"),
        ("{% for %}", "the chat template cannot be read"),
        ("{{ raise_exception('not you') }}", "cannot be used: .* not you"),
        ("{{ messages[0].content }}", "cannot be used|no part"),
        ("{{ messages[-1].content }}", "changes the prompt if an answer follows"),
        ("{{ 1 / 0 }}", "cannot be used: .* division by zero"),
        ("{{ messages[0].nothing.at_all }}", "cannot be used: .* has no attribute"),
        (
            "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
            "marks no part of an assistant turn",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "."),
    ],
)
def test_a_template_that_cannot_work_stops_the_run(own, text, told):
    with pytest.raises(ValueError, match=told):
        prepared(own, text)


def test_a_template_that_writes_a_special_token_without_an_id_stops_the_run(own):
    text = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    lacking = own._replace(named={**own.named, "bos_token": "<s>"}, unknown=("<pad>", "<s>"))
    with pytest.raises(ValueError, match="it writes '<s>', which tokenizer_config"):
        prepared(lacking, text)
    prepared(lacking, text.removeprefix("{{ bos_token }}"))


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    own = tokenizer.load(TINY / "model", str(path))
    talk = trial.prepared(own, scored_turns="assistant", date=None)
    assert rendering.render(SINGLE, talk)[0].text == "user: Which way?\nassistant: Onwards!\n"
    with pytest.raises(FileNotFoundError, match="there is no chat template"):
        tokenizer.load(TINY / "model", str(tmp_path / "none.jinja"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        tokenizer.load(TINY / "model", str(path))


def test_a_template_that_refuses_one_pair_says_so(shared, own):
    talk = prepared(own, stock(shared, "trl/gemma"))
    pair = SINGLE._replace(prompt=[{"role": "system", "content": "Be brief."}, user("Which way?")])
    with pytest.raises(ValueError, match="refuses the messages: System role not supported"):
        rendering.render(pair, talk)


def test_generation_ends_with_the_turn():
    own = tokenizer.load(TINY / "model")
    talk = trial.prepared(own, scored_turns="assistant", date=None)
    named = [own.decode([i]) for i in chat.stop_ids(own, talk)]
    assert named == ["<|end_of_text|>", "<|eot_id|>"]
    assert chat.stop_ids(own._replace(ends=()), None) == (own.eos_id,)


def test_plain_text_wants_an_end_of_text(own):
    chat.check_plain(own)
    with pytest.raises(ValueError, match="plain_text ends each answer"):
        chat.check_plain(own._replace(eos_id=None))

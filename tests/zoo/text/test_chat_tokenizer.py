"""What a notebook asks of a tokenizer, held against transformers'."""

import concurrent.futures
import copy
import doctest
import json
import pickle
import shutil

import numpy as np
import pytest
import tokenizers
import transformers

from tests.conftest import ROOT, TINY
from tests.zoo.text import test_template
import zoo
from zoo.text import chat_tokenizer, tokenizer_files

TEXTS = ["Hello there", "", "  two  spaces\n", "é 日本 🤷🏽‍♀️", "a<|eot_id|>b", "don't 1234567"]


@pytest.fixture(scope="module")
def words():
    return chat_tokenizer.load_tokenizer(TINY / "model")


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoTokenizer.from_pretrained(TINY / "model")


def test_the_examples_in_its_docstring(monkeypatch):
    monkeypatch.chdir(ROOT)
    tried = doctest.testmod(chat_tokenizer)
    assert tried.attempted == 5 and tried.failed == 0


def test_texts_are_those_of_transformers(words, theirs):
    for text in TEXTS:
        assert words.encode(text) == theirs.encode(text)
        assert words.decode(words.encode(text)) == text
    assert words.vocabulary_size == len(theirs)
    assert (words.bos_id, words.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert words.special["<|eot_id|>"] in words.stop_ids
    assert words.eos_id in words.stop_ids
    assert words.chat_template == theirs.chat_template


def test_conversations_are_those_of_transformers(words, theirs):
    for turns in (test_template.TURNS, test_template.TURNS[:2], test_template.TURNS[3:4]):
        asks = turns[-1]["role"] == "user"
        for named in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": False}):
            how = {"add_generation_prompt": asks} | named
            text = theirs.apply_chat_template(turns, tokenize=False, **how)
            assert words.chat_text(turns, **named) == text
            ids = theirs.apply_chat_template(turns, return_dict=False, **how)
            assert words.chat(turns, **named) == ids


@pytest.mark.parametrize("said", ["Sure, ", "Sure", " a\n", [{"type": "text", "text": "Sure, "}]])
def test_a_message_is_continued_as_by_transformers(words, theirs, said, tmp_path):
    turns = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": said}]
    how = {"continue_final_message": True}
    before = repr(turns)
    if isinstance(said, list):
        folder = copied(tmp_path / "a", chat_template__jinja=PARTS)
        words = chat_tokenizer.load_tokenizer(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        turns[0]["content"] = [{"type": "text", "text": "Which way?"}]
        before = repr(turns)
    text = theirs.apply_chat_template(turns, tokenize=False, **how)
    assert words.chat_text(turns, **how) == text
    assert words.chat(turns, **how) == theirs.apply_chat_template(turns, return_dict=False, **how)
    assert repr(turns) == before
    assert words.chat_text(turns, continue_final_message="content") == text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(continue_final_message=True, add_generation_prompt=True), "leave one of them out"),
        (dict(continue_final_message="thoughts"), "no text 'thoughts' to continue"),
        (dict(tokenize=False), "tokenize=False is no setting of a template: chat gives ids"),
        (dict(return_tensors="np"), "return_tensors='np' is no .* chat_text the text"),
        (dict(padding=True), "padding=True is no setting"),
        (dict(max_length=9), "max_length=9 is no setting"),
    ],
)
def test_what_is_no_setting_of_a_template_is_refused(words, given, told):
    with pytest.raises(ValueError, match=told):
        words.chat([{"role": "assistant", "content": "Sure, "}], **given)
    with pytest.raises(ValueError, match="no text 'content' to continue"):
        words.chat([], continue_final_message=True)


def test_a_text_that_the_template_changes_is_not_continued(tmp_path):
    words = chat_tokenizer.load_tokenizer(copied(tmp_path / "a", chat_template__jinja=SHOUTED))
    with pytest.raises(ValueError, match="does not write 'Sure' as it is"):
        words.chat_text([{"role": "assistant", "content": "Sure"}], continue_final_message=True)


# The ids that these tokenizers put before a text of their own accord: `<s>`.
FIRST = {"mistral-v3-hf": [1]}


@pytest.mark.parametrize("name", ["qwen3-hf", "mistral-v3-hf", "phi3", "gpt2", "olmo2"])
def test_other_tokenizers(shared, name):
    folder = shared / "data" / "tokenizers" / name
    words = chat_tokenizer.load_tokenizer(folder)
    whole = chat_tokenizer.tokenizer.load(folder)
    for text in TEXTS:
        ids, _ = whole.encode(text)
        found = words.encode(text)
        assert found == [*FIRST.get(name, ()), *ids]
        assert words.decode(found) == whole.decode(found)
    if name != "gpt2":
        file = json.loads((folder / "tokenizer.json").read_text())
        names = {*file["model"]["vocab"], *(token["content"] for token in file["added_tokens"])}
        assert words.vocabulary_size == len(names)
    if words.chat_template:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        turns = test_template.TURNS[1:4]
        text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert words.chat_text(turns) == text
        assert words.chat(turns) == whole.encode(text)[0]


def copied(folder, **files):
    shutil.copytree(TINY / "model", folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_settings_of_the_template_and_tools_reach_it(tmp_path):
    text = "{{ tools | tojson }} {{ mood }} {{ messages | length }} {{ bos_token }}"
    words = chat_tokenizer.load_tokenizer(copied(tmp_path / "a", chat_template__jinja=text))
    asked = [{"role": "user", "content": "a"}]
    assert words.chat_text(asked, tools=[{"a": 1}], mood="good") == (
        '[{"a": 1}] good 1 <|begin_of_text|>'
    )
    dated = copied(tmp_path / "b", chat_template__jinja="{{ strftime_now('%Y') }}")
    assert chat_tokenizer.load_tokenizer(dated).chat_text(asked).isdecimal()


def test_a_wrong_call_is_answered_by_a_sentence(tmp_path, words):
    with pytest.raises(ValueError, match="a conversation is a list of messages, as"):
        words.chat("Name a river.")
    folder = copied(tmp_path / "a")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"the tokenizer in .* has no chat template"):
        chat_tokenizer.load_tokenizer(folder).chat([{"role": "user", "content": "a"}])
    with pytest.raises(FileNotFoundError, match="no model folder"):
        chat_tokenizer.load_tokenizer(tmp_path / "none")
    refuses = copied(tmp_path / "b", chat_template__jinja="{{ raise_exception('not you') }}")
    with pytest.raises(ValueError, match="the chat template refuses the messages: not you"):
        chat_tokenizer.load_tokenizer(refuses).chat([{"role": "user", "content": "a"}])


def test_a_tokenizer_can_be_pickled_and_copied(words):
    for again in (pickle.loads(pickle.dumps(words)), copy.deepcopy(words)):
        assert again.encode("Hello there") == words.encode("Hello there")
        assert again.stop_ids == words.stop_ids
        asked = [{"role": "user", "content": "a"}]
        assert again.chat(asked) == words.chat(asked)


def test_ids_beyond_the_vocabulary_are_no_text(words):
    assert words.decode([5, 2**40, 6]) == words.decode([5, 5000, 6]) == words.decode([5, 6])


def test_a_tokenizer_is_told_in_a_line(words):
    assert repr(words) == f"<the tokenizer of {TINY / 'model'}: 1024 tokens>"


def test_labels_and_lists_of_texts_are_no_ids(words):
    assert words.decode(np.array([5, 6])) == words.decode([5, 6])
    with pytest.raises(ValueError, match="-100 is none of a tokenizer: labels are no ids"):
        words.decode([5, -100])
    with pytest.raises(ValueError, match="the ids of one text, and not"):
        words.decode(np.array([[5, 6]]))


def test_in_other_threads(words):
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(words.encode, TEXTS * 5))
    assert found == [words.encode(text) for text in TEXTS] * 5


def test_no_pattern_of_the_file_is_compiled_here(tmp_path, monkeypatch):
    """Nor one that works on what is decoded: such a text is asked of the worker."""
    file = json.loads((TINY / "model" / "tokenizer.json").read_text())
    cut = {"type": "Split", "pattern": {"Regex": "(?<x>" + "(" * 30}, "behavior": "Isolated",
           "invert": False}  # fmt: skip
    file["pre_tokenizer"] = cut
    folder = copied(tmp_path / "a", tokenizer__json=json.dumps(file))
    elsewhere = lambda ids: pytest.fail("asked")
    own = tokenizer_files.read(folder, {}, elsewhere)  # that is no pattern at all
    assert own.decode([40, 41])
    with pytest.raises(ValueError, match="cannot be read"):
        tokenizer_files.read(folder, {})
    with pytest.raises(ValueError, match="cannot be read"):
        chat_tokenizer.load_tokenizer(folder)
    file = json.loads((TINY / "model" / "tokenizer.json").read_text())
    bare = {"type": "Replace", "pattern": {"Regex": "e+"}, "content": "E"}
    file["decoder"] = {"type": "Sequence", "decoders": [file["decoder"], bare]}
    folder = copied(tmp_path / "b", tokenizer__json=json.dumps(file))
    words = chat_tokenizer.load_tokenizer(folder)
    ids = words.encode("Hello there")
    assert words.decode(ids) == chat_tokenizer.tokenizer.load(folder).decode(ids)
    assert "E" in words.decode(ids)
    assert "e" not in words.decode(ids)


PARTS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|eot_id|>{% endfor %}"
)
SHOUTED = "<|begin_of_text|>{% for m in messages %}{{ m.content | upper }}<|eot_id|>{% endfor %}"


def test_a_template_for_tools_may_stand_in_a_folder(tmp_path):
    """As transformers 5 writes several, and as they are written again."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY / "model")
    theirs.chat_template = {
        "default": "{{ messages[0].content }}", "tool_use": "TOOLS {{ tools | length }}"
    }  # fmt: skip
    theirs.save_pretrained(tmp_path / "a")
    shutil.copy(TINY / "model" / "config.json", tmp_path / "a")
    asked = [{"role": "user", "content": "Hello"}]
    zoo.save(zoo.fresh(tmp_path / "a"), tmp_path / "b")
    for folder in ("a", "b"):
        words = chat_tokenizer.load_tokenizer(tmp_path / folder)
        assert words.chat_text(asked) == "Hello"
        assert words.chat_text(asked, tools=[{"name": "look"}]) == "TOOLS 1"


def test_a_tekken_file_alone_is_refused_by_name(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer but tekken\.json"):
        chat_tokenizer.load_tokenizer(tmp_path)


@pytest.mark.parametrize(("template", "stops"), [(PARTS, (1, 4)), (SHOUTED, (1,))])
def test_what_ends_a_turn_is_found_where_the_turn_is(template, stops, tmp_path):
    """Written of parts, as by those that see; or not at all, and then the end of text ends it."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    (tmp_path / "model" / "generation_config.json").unlink()
    assert chat_tokenizer.load_tokenizer(tmp_path / "model").stop_ids == stops


GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json", "text_config"])
def test_what_the_files_say_ends_an_answer(file, tmp_path):
    """GLM's answers end where the next turn begins, and its template writes nothing after them."""
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hi": 0, "?": 1}, unk_token="?"))
    own.add_special_tokens(["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"])
    first = [("[gMASK]", 3), ("<sop>", 4)]
    own.post_processor = tokenizers.processors.TemplateProcessing("[gMASK] <sop> $A", None, first)
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "chat_template.jinja").write_text(GLM)
    ends = {"eos_token_id": [2, 5, 99]}  # a stranger's file may name what no token has
    if file == "text_config":
        ends, file = {"text_config": ends}, "config.json"
    (tmp_path / file).write_text(json.dumps(ends))
    words = chat_tokenizer.load_tokenizer(tmp_path)
    assert words.stop_ids == (2, 5)
    assert words.encode("hi") == [3, 4, 0]  # plain text begins as transformers begins it
    words = chat_tokenizer.tokenizer.load(tmp_path)
    assert (words.first, words.ends) == ((3, 4), (2, 5))


def test_what_no_text_holds_is_refused_in_a_sentence(words):
    for ask in (words.encode, lambda text: words.chat([{"role": "user", "content": text}])):
        with pytest.raises(ValueError, match="the tokenizer cannot read it"):
            ask("caf\udce9 \ud83d")
    with pytest.raises(ValueError, match=r"what JSON can say: .*function.*described by a dict"):
        words.chat([{"role": "user", "content": "A"}], tools=[len, print])

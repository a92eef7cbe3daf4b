"""Conversations: what a model is asked, what is shown of its answer, and where two stand."""

import json
import subprocess
import sys

import pytest

from checkpoints_io.errors import BadInput, NotFound
from checkpoints_io.unseen import visible
from tests.conftest import ROOT, TINY
from tests.zoo.test_peft import with_adapters
import zoo
from zoo import chat
from zoo.chat import Options, Voice
from zoo.targets import Lora


@pytest.fixture(scope="module")
def voice():
    return chat.opened(str(TINY / "model"), Options())


@pytest.fixture
def talked(capsys):
    """What comes of lines: the status, and what is written to either stream."""
    return lambda lines, voices: (chat.talk(lines, voices, Options()), *capsys.readouterr())


def test_without_a_template_no_weights_are_read(tmp_path, monkeypatch):
    for path in (TINY / "model").iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(zoo, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match="has no chat template, so there is no way to talk"):
        chat.opened(str(tmp_path), Options())


def test_an_answer_is_the_models_turn_to_its_stop_token(voice):
    question = {"role": "user", "content": "Do you know the capital of Peru?"}
    prompt = voice.words.chat([question])
    (ids,) = zoo.generate.generate(
        voice.model, [prompt], max_new_tokens=64, stop_ids=voice.words.stop_ids
    )
    pieces = list(chat.answer(voice, [question], Options()))
    assert len(pieces) > 2
    assert "".join(pieces) == voice.words.decode(ids[:-1])
    assert "Lima" in "".join(pieces)
    cut = "".join(chat.answer(voice, [question], Options(tokens=5)))
    assert cut == voice.words.decode(ids[:5])


def test_a_conversation_that_leaves_no_room_is_told_so(voice, talked, monkeypatch):
    monkeypatch.setattr(zoo.generate, "most_new_tokens", lambda model, longest: 0)
    status, out, notes = talked(["Do you know the capital of Peru?"], [voice])
    assert (status, out.strip()) == (1, "")
    assert "tokens, and no more fit: /reset" in notes


@pytest.fixture
def heard(monkeypatch):
    """What the models were asked; each answers with its name and a number."""
    asked = []

    def answer(voice, messages, _):
        asked.append((voice.name, [(m["role"], m["content"]) for m in messages]))
        yield from (voice.name, str(len(asked)))

    monkeypatch.setattr(chat, "answer", answer)
    return asked


def test_a_question_comes_with_what_was_said_before(heard, talked):
    lines = ["one", "", "/system  Be kind. ", "two", "three", "/reset", "four", "/system", "five"]
    status, out, notes = talked(lines, [Voice("a", None, None)])
    assert (status, out.split()) == (0, ["a1", "a2", "a3", "a4", "a5"])
    kind = ("system", "Be kind.")
    assert [messages for _, messages in heard] == [
        [("user", "one")],
        [kind, ("user", "two")],
        [kind, ("user", "two"), ("assistant", "a2"), ("user", "three")],
        [kind, ("user", "four")],
        [("user", "five")],
    ]
    assert notes.splitlines() == ["a new conversation"] * 3


def test_two_models_go_on_each_from_its_own_answer(heard, talked):
    status, out, _ = talked(["one", "two"], [Voice("a", None, None), Voice("b", None, None)])
    assert status == 0
    assert [line.split() for line in out.splitlines() if "─" not in line] == [
        ["a", "│", "b"], ["a1", "│", "b2"], ["a", "│", "b"], ["a3", "│", "b4"],
    ]  # fmt: skip
    assert heard[-1] == ("b", [("user", "one"), ("assistant", "b2"), ("user", "two")])


def test_what_cannot_be_answered_is_said_and_not_kept(heard, talked, monkeypatch):
    def refuse(voice, messages, asked):
        raise BadInput("the template refuses it")

    answer = chat.answer
    status, out, notes = talked(["/rest"], [Voice("a", None, None)])
    assert (status, out) == (1, "")
    assert notes == "error: there is no /rest: /system TEXT, /reset\n"
    monkeypatch.setattr(chat, "answer", refuse)
    status, out, notes = talked(["one"], [Voice("a", None, None)])
    assert (status, out, notes) == (1, "", "error: the template refuses it\n")
    monkeypatch.setattr(chat, "answer", answer)
    assert talked(["two"], [Voice("a", None, None)])[0] == 0
    assert heard == [("a", [("user", "two")])]


def test_halves_of_a_character_wait_for_each_other(voice, talked, monkeypatch):
    """And what would act on the terminal is shown by its name."""
    ids = voice.words.encode("né\x1b[2J")
    stream = lambda *_, **how: ([[one]] for one in [*ids, voice.words.stop_ids[0]])
    monkeypatch.setattr(zoo.generate, "stream", stream)
    assert len(ids) > len("né") and "�" in voice.words.decode(ids[:2])
    pieces = list(chat.answer(voice, [{"role": "user", "content": "a"}], Options()))
    assert pieces[:2] == ["n", "é"]
    assert talked(["a"], [voice])[1] == "né␛[2J\n"


def test_columns_are_of_equal_width():
    told = chat.side_by_side(["one", "another"], ["a few words here", "日本語の文\n\nend"], 19)
    assert told.splitlines() == [
        "one      │ another",
        "──────── │ ────────",
        "a few    │ 日本語の",
        "words    │ 文",
        "here     │",
        "         │ end",
    ]


def test_a_folder_of_adapters_brings_its_weights(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone")}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(NotFound, match=r"names the weights under them: .*gone.*--base=FOLDER"):
        chat.opened(str(folder), Options())
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(BadInput, match="does not say which weights"):
        chat.opened(str(folder), Options())


@pytest.mark.full
def test_adapters_talk_through_a_pipe_beside_the_model_they_are_for(tmp_path):
    base, folder = zoo.load(TINY / "model"), tmp_path / "adapters"
    zoo.save_adapter(with_adapters(base, Lora(4, 8.0), scale=0.05), folder)
    talk = lambda *flags: subprocess.run(
        [sys.executable, "-m", "zoo", "chat", *flags, "--tokens=40"],
        cwd=ROOT, input="Do you know the capital of Peru?\n/nothing\n", capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    both = talk("recipes/tiny/model", "--against", folder)
    assert both.returncode == 1 and "there is no /nothing" in both.stderr
    assert "Of course! The capital" in both.stdout and " │ " in both.stdout
    alone = talk(folder)
    model, words = zoo.load(TINY / "model", adapter=folder), zoo.load_tokenizer(TINY / "model")
    prompt = words.chat([{"role": "user", "content": "Do you know the capital of Peru?"}])
    for one, same in ((model, True), (base, False)):
        how = dict(max_new_tokens=40, stop_ids=words.stop_ids)
        (ids,) = zoo.generate.generate(one, [prompt], **how)
        text = words.decode([token for token in ids if token not in words.stop_ids])
        assert (visible(text) + "\n" == alone.stdout) is same

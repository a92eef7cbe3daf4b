"""A `Pair` as text: rendered by the chat template, with the stretches that count marked."""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

import jinja2

from recipes.data import template
from recipes.data.layouts import Pair
from recipes.data.messages import Turns
from recipes.data.template import Span
from recipes.data.tokenizer import Tokenizer

SCORED_TURNS = ("assistant", "last", "all")  # after the prompt: answers, the last one, every word
PROBE: Turns = [
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": "Onwards."},
]
# Stands for an answer whose place is looked for: a character that no text means anything by.
STAND_IN = "\ue0d0"
NOTHING = Pair("", "", "")


class Chat(NamedTuple):
    """A chat template that has been seen to work."""

    programs: Mapping[str, jinja2.Template]  # default, and tool_use for rows with tools
    given: Mapping[str, str]  # bos_token and the like
    marked: bool  # it says itself what is generated
    scored_turns: str
    end_of_turn: str  # what it writes after an answer
    ends: tuple[str, ...] = ()  # the same, in pieces: special tokens, and what stands between them
    reads: frozenset[str] = frozenset()  # what it asks for by name


class Rendered(NamedTuple):
    """One answer behind its prompt, as text."""

    text: str
    prompt_end: int  # characters of the prompt
    scored: list[Span]  # the characters that count
    left_out: bool  # part of what was said is not in the text


def prepared(tokenizer: Tokenizer, *, scored_turns: str, date: str | None) -> Chat:
    """The tokenizer's template, tried on two turns, so that one that cannot work stops the run.

    Raises:
      ValueError: there is no template, or it fails, prints the date when none is given, or shows
        nothing of the answer.
    """
    text = tokenizer.chat_template
    if not text:
        raise ValueError(
            "the tokenizer has no chat template: give one with --config.chat_template=FILE, or use "
            "--config.data.layout=plain_text"
        )
    dated = template.prints_the_date(text)
    if dated and date is None:
        raise ValueError(
            "the chat template prints today's date, and tomorrow the same pairs would be other "
            "tokens: say which day it is to print with --config.data.date=2026-01-31"
        )
    if date is not None and not dated:
        raise ValueError(
            "--config.data.date has no effect: the chat template does not print the date"
        )
    texts = {"default": text, **tokenizer.chat_templates}
    programs = {name: template.compiled(text, date) for name, text in texts.items()}
    reads = frozenset().union(*(template.names(text) for text in texts.values()))
    marked = template.marks_answers(text)
    chat = Chat(programs, tokenizer.named, marked, scored_turns, "", reads=reads)
    try:
        whole, _ = _render(PROBE, chat, NOTHING)
        _, _, tail = whole.rpartition(PROBE[-1]["content"])
        pieces = re.split(f"({tokenizer.specials.pattern})", tail)
        chat = chat._replace(end_of_turn=tail, ends=tuple(filter(None, pieces)))
        rendered, _ = render(Pair(PROBE[:1], PROBE[1:], PROBE[1:]), chat)
        asks_again = _asks_again(chat)
    except ValueError as error:
        raise ValueError(f"the chat template cannot be used: {error}") from error
    if not any("Onwards" in whole[start:end] for start, end in rendered.scored):
        raise ValueError("the chat template marks no part of an assistant turn as generated")
    if not rendered.prompt_end or PROBE[0]["content"] not in whole[: rendered.prompt_end]:
        raise ValueError(
            "the chat template cannot be used: it changes the prompt when an answer follows"
        )
    if asks_again:
        raise ValueError(
            "the chat template cannot be used: behind each answer it begins another, whether it is "
            "asked to (`add_generation_prompt`) or not"
        )
    return chat


def _asks_again(chat: Chat) -> bool:
    """Does what follows the last answer lead into another, as what follows the last question does?

    Where it stands before a question too, it leads nowhere.
    """
    asked, _ = _render(PROBE[:1], chat, NOTHING, ask=True)
    more, _ = _render([*PROBE, PROBE[0]], chat, NOTHING)
    _, _, header = asked.rpartition(PROBE[0]["content"])
    _, _, behind = more.partition(PROBE[1]["content"])
    return header == chat.end_of_turn and not behind.startswith(header)


def render(pair: Pair, chat: Chat | None) -> tuple[Rendered, Rendered]:
    """Both answers as text. Plain text needs no template.

    What counts comes from the template's `{% generation %}` blocks. Of a template without them it
    is what an answer adds to the rendering of the turns before it; where a later turn changes an
    earlier one's text, it is what changes with the answer's words, and the end of turn behind.

    Raises:
      ValueError: the template refuses the messages, or an answer cannot be found in its text.
    """
    prompt = pair.prompt
    if isinstance(prompt, str) or chat is None:
        return _plain(pair, pair.chosen), _plain(pair, pair.rejected)
    answers = [turns for turns in (pair.chosen, pair.rejected) if not isinstance(turns, str)]
    asks = all(turns[0]["role"] == "assistant" for turns in answers)
    wholes = [prompt + turns for turns in answers]
    with template.bounded():
        asked = _render(prompt, chat, pair, ask=asks)[0] if prompt else ""
        texts = [_render(turns, chat, pair) for turns in wholes]
        end = min(_common(asked, text) for text, _ in texts)
        if end < len(asked) and asks:  # an answer takes the place of what the prompt ends with
            both = zip(wholes, texts, strict=True)
            end = min(end, *(_begin(turns, *text, end, chat, pair) for turns, text in both))
        chosen, rejected = (
            _answer(turns, *text, asked, end, chat, pair)
            for turns, text in zip(wholes, texts, strict=True)
        )
    return chosen, rejected


def _plain(pair: Pair, answer: Any) -> Rendered:
    text = f"{pair.prompt}{answer}"
    return Rendered(text, len(pair.prompt), [(len(pair.prompt), len(text))], left_out=False)


def _answer(
    turns: Turns, text: str, marks: list[Span], asked: str, end: int, chat: Chat, pair: Pair
) -> Rendered:
    begins = len(pair.prompt)
    said = [i for i in range(begins, len(turns)) if turns[i]["role"] == "assistant"]
    spoken = said[-1:] if chat.scored_turns == "last" else said
    if chat.scored_turns == "all":
        spans = [(end, len(text))]
    elif chat.marked:
        since = end if spoken == said else _place_of(spoken[0], turns, text, chat, pair)[0]
        spans = [(max(start, since), stop) for start, stop in marks if stop > since]
    elif len(turns) == begins + 1 and spoken and end == len(asked):
        spans = [(end, len(text))]
    else:
        spans = [_place_of(i, turns, text, chat, pair) for i in spoken]
    left_out = not all(turns[i]["content"].strip() in text[end:] for i in spoken)
    return Rendered(text, end, spans, left_out)


def _begin(turns: Turns, text: str, marks: list[Span], end: int, chat: Chat, pair: Pair) -> int:
    """The first character of an answer, which a shared `<` may hide from the comparison."""
    if chat.marked:
        return min((start for start, stop in marks if stop > end), default=end)
    return _place_of(len(pair.prompt), turns, text, chat, pair)[0]


def _place_of(i: int, turns: Turns, text: str, chat: Chat, pair: Pair) -> Span:
    """Where in the text of all turns the answer in turn `i` stands, its end of turn included."""
    before = _render(turns[:i], chat, pair, ask=True)[0] if i else ""
    after = _render(turns[: i + 1], chat, pair)[0]
    if after.startswith(before) and text.startswith(after):
        return len(before), len(after)
    instead = {"role": "assistant", "content": STAND_IN}  # of thoughts and calls, too
    other = [*turns[:i], instead, *turns[i + 1 :]]
    head, found, tail = _render(other, chat, pair)[0].partition(STAND_IN)
    stop = len(text) - len(tail)
    if not found or stop < len(head) or text[: len(head)] != head or text[stop:] != tail:
        raise ValueError("the chat template does not show which part of the text is the answer")
    for piece in chat.ends:
        if not text.startswith(piece, stop):
            break
        stop += len(piece)
    return len(head), stop


def _common(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next(i for i, (x, y) in enumerate(zip(a, b + "\0", strict=False)) if x != y)


def _render(turns: Turns, chat: Chat, pair: Pair, *, ask: bool = False) -> tuple[str, list[Span]]:
    """The text of some turns (with the header of an answer to come if `ask`), its marked spans."""
    named = "tool_use" if pair.tools and "tool_use" in chat.programs else "default"
    ours = {"messages": turns, "tools": pair.tools, "add_generation_prompt": ask}
    given = {**chat.given, "documents": None, **pair.template_kwargs, **ours}
    return template.render(chat.programs[named], given)


def ignores(pair: Pair, chat: Chat | None) -> bool:
    """Has the row tools, or settings of a template, that this one never looks at?"""
    given = {*pair.template_kwargs, *(["tools"] if pair.tools else [])}
    return chat is not None and not given <= chat.reads


def check_plain(tokenizer: Tokenizer) -> None:
    """Raises a sentence if plain text could not be ended."""
    if tokenizer.eos_id is None:
        raise ValueError(
            "--config.data.layout=plain_text ends each answer with the end-of-text token, and this "
            "tokenizer has none"
        )


def stop_ids(tokenizer: Tokenizer, chat: Chat | None) -> tuple[int, ...]:
    """The ids that end an answer: end of text, and the template's end of turn, if there is one."""
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if chat is not None:
        ids, _ = tokenizer.encode(chat.end_of_turn)
        special = set(tokenizer.special.values())
        ends += [i for i in ids if i in special][:1]
    return tuple(dict.fromkeys(ends))

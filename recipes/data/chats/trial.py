"""Tries a chat template on two turns before it is used, and refuses one that cannot work."""

import re

from checkpoints_io.errors import BadInput
from recipes.data.chats import dialect
from recipes.data.chats.chat import Chat, given_of, run, shared_start, write
from recipes.data.chats.dialect import Dialect
from recipes.data.chats.messages import Turns
from recipes.data.chats.pair import Pair
from recipes.data.chats.rendering import render
from zoo.text import template
from zoo.text.tokenizer import Tokenizer

PROBE: Turns = [dialect.QUESTION, {"role": "assistant", "content": "Onwards."}]
NOTHING = Pair("", "", "")
SOME_TOOLS = NOTHING._replace(tools=[dialect.TOOL])


def prepared(
    tokenizer: Tokenizer, *, scored_turns: str, date: str | None, end_of_turn: str | None = None
) -> Chat:
    """The tokenizer's template, tried on two turns, so that one that cannot work stops the run.

    `end_of_turn` is a special token to write after the last answer, for templates that write none.

    Raises:
      ValueError: there is no template, or it fails, prints the date although none is set, shows
        nothing of the answer, or ends answers itself although `end_of_turn` is given.
    """
    text = _template_of(tokenizer, date)
    texts = {"default": text, **tokenizer.chat_templates}
    programs = {name: template.compiled(text, date) for name, text in texts.items()}
    reads = frozenset().union(*(template.names(text) for text in texts.values()))
    marked = template.marks_answers(text)
    given, specials = tokenizer.named, tokenizer.specials
    chat = Chat(programs, given, marked, scored_turns, "", specials=specials, reads=reads)
    probe = NOTHING if _renders(PROBE, chat, NOTHING) else SOME_TOOLS  # some require tools
    if not _renders(PROBE, chat, probe):
        probe = NOTHING
    try:
        whole, _ = write(PROBE, chat, probe)
        if unknown := next((text for text in tokenizer.unknown if text in whole), None):
            raise BadInput(
                f"it writes {unknown[:40]!r}, which tokenizer_config.json calls special and no "
                "file of the tokenizer gives an id, so that its letters would be trained on: give "
                "a tokenizer.json that has it, or a template without it (--config.chat_template)"
            )
        _, _, tail = whole.rpartition(PROBE[-1]["content"])
        tail, surplus = _cut(tail, whole, tokenizer, chat, probe)
        added = _added(end_of_turn, tail, tokenizer)
        chat = chat._replace(
            surplus=surplus,
            end_of_turn=tail + added,
            ends=tuple(filter(None, re.split(f"({specials.pattern})", tail))),
            added=added,
            header=_header(whole, chat, probe),
            dialects={name: _dialect(name, chat) for name in programs},
        )
        example = Pair(PROBE[:1], PROBE[1:], PROBE[1:], probe.tools)
        rendered, _ = render(example, chat)
        asks_again = _asks_again(chat, probe)
    except ValueError as error:
        raise BadInput(f"the chat template cannot be used: {error}") from error
    if not any("Onwards" in whole[start:end] for start, end in rendered.scored):
        raise BadInput("the chat template marks no part of an assistant turn as generated")
    if not rendered.prompt_end or PROBE[0]["content"] not in whole[: rendered.prompt_end]:
        raise BadInput(
            "the chat template cannot be used: it changes the prompt if an answer follows"
        )
    if asks_again:
        raise BadInput(
            "the chat template cannot be used: it begins another answer after each one, with or "
            "without `add_generation_prompt`"
        )
    if words := _words_behind(chat):
        raise BadInput(
            "the chat template cannot be used: it writes more than an end of turn after each "
            f"answer ({words[:40]!r})"
        )
    return chat


def _template_of(tokenizer: Tokenizer, date: str | None) -> str:
    text = tokenizer.chat_template
    if not text:
        raise BadInput(
            "the tokenizer has no chat template: give one with --config.chat_template=FILE, or "
            "use --config.data.layout=plain_text (plain_answer for single answers)"
        )
    dated = template.prints_the_date(text)
    if dated and date is None:
        raise BadInput(
            "the chat template prints today's date, so the same rows would give other tokens "
            "tomorrow: set the date that it prints (e.g. --config.data.date=2026-01-31)"
        )
    if date is not None and not dated:
        raise BadInput(
            "--config.data.date has no effect: the chat template does not print the date"
        )
    return text


def _renders(turns: Turns, chat: Chat, pair: Pair) -> bool:
    try:
        return bool(write(turns, chat, pair)[0])
    except ValueError:
        return False


def _cut(tail: str, whole: str, tokenizer: Tokenizer, chat: Chat, probe: Pair) -> tuple[str, str]:
    """The end of turn, and what is written after it only at the conversation's end.

    Some templates start another answer, whether it is asked for or not (Cohere's for tools).
    """
    more, _ = write([*PROBE, PROBE[0]], chat, probe)
    eos = tokenizer.named.get("eos_token", "")
    end, found, surplus = tail.partition(eos) if eos else ("", "", "")
    if not found or not surplus.strip() or more.startswith(whole):
        return tail, ""
    return end + found, surplus


def _added(end_of_turn: str | None, tail: str, tokenizer: Tokenizer) -> str:
    if end_of_turn is None:
        return ""
    if end_of_turn not in tokenizer.special:
        raise BadInput(
            f"--config.data.end_of_turn={end_of_turn!r} is not a special token of this tokenizer"
        )
    if own := tokenizer.specials.search(tail):
        raise BadInput(
            f"--config.data.end_of_turn has no effect: the chat template itself ends each answer "
            f"with {own[0]!r}"
        )
    return end_of_turn


def _header(whole: str, chat: Chat, probe: Pair) -> str | None:
    """The header of an answer, the same for a requested answer and for an existing one."""
    asked, _ = write(PROBE[:1], chat, probe, ask=True)
    quiet, _ = write(PROBE[:1], chat, probe)
    end = shared_start(asked, whole, chat)
    return asked[len(quiet) : end] if end >= len(quiet) and asked.startswith(quiet) else None


def _dialect(name: str, chat: Chat) -> Dialect | None:
    """How this template program wants calls spelled, with tools to call or without."""
    for pair in (SOME_TOOLS, NOTHING):
        given = given_of(pair, chat)
        text = lambda turns, given=given: run(chat.programs[name], turns, given, ask=False)[0]
        if found := dialect.tried(text):
            return found
    return None


def _asks_again(chat: Chat, probe: Pair) -> bool:
    """Whether the text after the last answer starts another one, like that after a question.

    It does not if the same text also comes before a question.
    """
    asked, _ = write(PROBE[:1], chat, probe, ask=True)
    more, _ = write([*PROBE, PROBE[0]], chat, probe)
    _, _, header = asked.rpartition(PROBE[0]["content"])
    _, _, behind = more.partition(PROBE[1]["content"])
    again = bool(header.strip()) and chat.end_of_turn.endswith(header)
    return again and not behind.startswith(chat.end_of_turn)


def _words_behind(chat: Chat) -> str:
    """The text written after the special token that ends an answer, if it has words."""
    ended = False
    for piece in chat.ends:
        special = chat.specials.fullmatch(piece)
        if ended and not special and piece.strip():
            return piece.strip()
        ended |= bool(special)
    return ""

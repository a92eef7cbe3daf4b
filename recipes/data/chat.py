"""A `Pair` as text: rendered by the chat template, with the stretches that count marked."""

from collections.abc import Mapping, Sequence
import re
from typing import Any, NamedTuple

import jinja2

from recipes.data import dialect, left_out, template
from recipes.data.dialect import Dialect
from recipes.data.layouts import Pair
from recipes.data.messages import Message, Turns
from recipes.data.template import Span
from recipes.data.tokenizer import Tokenizer

SCORED_TURNS = ("assistant", "last", "all")  # after the prompt: answers, the last one, every word
PROBE: Turns = [dialect.QUESTION, {"role": "assistant", "content": "Onwards."}]
BLANK = {"role": "assistant", "content": ""}
# Stands for an answer whose place is looked for: a character that no text means anything by.
STAND_IN = "\ue0d0"
NOTHING = Pair("", "", "")
SOME_TOOLS = NOTHING._replace(tools=[dialect.TOOL])


class Chat(NamedTuple):
    """A chat template that has been seen to work."""

    programs: Mapping[str, jinja2.Template]  # default, and tool_use for rows with tools
    given: Mapping[str, str]  # bos_token and the like
    marked: bool  # it says itself what is generated
    scored_turns: str
    end_of_turn: str  # what follows an answer
    ends: tuple[str, ...] = ()  # the same, in pieces: special tokens, and what stands between them
    added: str = ""  # the part of it that the template does not write: `data.end_of_turn`
    surplus: str = ""  # what the template writes behind the last answer's end, and is cut off
    header: str | None = None  # what it writes before any answer
    specials: re.Pattern[str] = re.compile("(?!)")  # the tokenizer's special tokens
    reads: frozenset[str] = frozenset()  # what it asks for by name
    dialects: Mapping[str, Dialect | None] = {}


class Rendered(NamedTuple):
    """One answer behind its prompt, as text."""

    text: str
    prompt_end: int  # characters of the prompt
    scored: list[Span]  # the characters that count
    left_out: tuple[str, ...] = ()  # what the messages hold and the text does not show


def prepared(
    tokenizer: Tokenizer, *, scored_turns: str, date: str | None, end_of_turn: str | None = None
) -> Chat:
    """The tokenizer's template, tried on two turns, so that one that cannot work stops the run.

    `end_of_turn` is a special token to write after the last answer, for templates that write none.

    Raises:
      ValueError: there is no template, or it fails, prints the date when none is given, shows
        nothing of the answer, or ends answers itself and is given an `end_of_turn`.
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
    chat = Chat(
        programs,
        tokenizer.named,
        marked,
        scored_turns,
        "",
        specials=tokenizer.specials,
        reads=reads,
    )
    probe = NOTHING if _renders(PROBE, chat, NOTHING) else SOME_TOOLS  # some cannot do without
    if not _renders(PROBE, chat, probe):
        probe = NOTHING
    try:
        whole, _ = _render(PROBE, chat, probe)
        _, _, tail = whole.rpartition(PROBE[-1]["content"])
        tail, surplus = _cut(tail, whole, tokenizer, chat, probe)
        pieces = re.split(f"({tokenizer.specials.pattern})", tail)
        chat = chat._replace(
            surplus=surplus,
            end_of_turn=tail + _added(end_of_turn, tail, tokenizer),
            ends=tuple(filter(None, pieces)),
            added=_added(end_of_turn, tail, tokenizer),
            header=_header(whole, chat, probe),
            dialects={name: _dialect(name, chat) for name in programs},
        )
        example = Pair(PROBE[:1], PROBE[1:], PROBE[1:], probe.tools)
        rendered, _ = render(example, chat)
        asks_again = _asks_again(chat, probe)
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
    if words := _words_behind(chat):
        raise ValueError(
            "the chat template cannot be used: behind each answer it writes more than an end of "
            f"turn ({words[:40]!r})"
        )
    return chat


def _renders(turns: Turns, chat: Chat, pair: Pair) -> bool:
    try:
        return bool(_render(turns, chat, pair)[0])
    except ValueError:
        return False


def _cut(tail: str, whole: str, tokenizer: Tokenizer, chat: Chat, probe: Pair) -> tuple[str, str]:
    """The end of turn, and what is written behind it only where the conversation ends.

    Some templates lead into another answer, whether it is asked for or not (Cohere's for tools).
    """
    more, _ = _render([*PROBE, PROBE[0]], chat, probe)
    eos = tokenizer.named.get("eos_token", "")
    end, found, surplus = tail.partition(eos) if eos else ("", "", "")
    if not found or not surplus.strip() or more.startswith(whole):
        return tail, ""
    return end + found, surplus


def _added(end_of_turn: str | None, tail: str, tokenizer: Tokenizer) -> str:
    if end_of_turn is None:
        return ""
    if end_of_turn not in tokenizer.special:
        raise ValueError(
            f"--config.data.end_of_turn={end_of_turn!r} is no special token of this tokenizer"
        )
    if own := tokenizer.specials.search(tail):
        raise ValueError(
            f"--config.data.end_of_turn has no effect: the chat template itself ends each answer "
            f"with {own[0]!r}"
        )
    return end_of_turn


def _header(whole: str, chat: Chat, probe: Pair) -> str | None:
    """What leads into an answer, whether one is asked for or stands there."""
    asked, _ = _render(PROBE[:1], chat, probe, ask=True)
    quiet, _ = _render(PROBE[:1], chat, probe)
    end = _common(asked, whole, chat)
    return asked[len(quiet) : end] if end >= len(quiet) and asked.startswith(quiet) else None


def _dialect(name: str, chat: Chat) -> Dialect | None:
    """How this program wants calls spelled, with tools to call or without."""
    for pair in (SOME_TOOLS, NOTHING):
        given = _given(pair, chat)
        text = lambda turns, given=given: _run(chat.programs[name], turns, given, ask=False)[0]
        if found := dialect.tried(text):
            return found
    return None


def _asks_again(chat: Chat, probe: Pair) -> bool:
    """Does what follows the last answer lead into another, as what follows the last question does?

    Where it stands before a question too, it leads nowhere.
    """
    asked, _ = _render(PROBE[:1], chat, probe, ask=True)
    more, _ = _render([*PROBE, PROBE[0]], chat, probe)
    _, _, header = asked.rpartition(PROBE[0]["content"])
    _, _, behind = more.partition(PROBE[1]["content"])
    again = bool(header.strip()) and chat.end_of_turn.endswith(header)
    return again and not behind.startswith(chat.end_of_turn)


def _words_behind(chat: Chat) -> str:
    """What is written after the special token that ends an answer, if it is words."""
    ended = False
    for piece in chat.ends:
        special = chat.specials.fullmatch(piece)
        if ended and not special and piece.strip():
            return piece.strip()
        ended |= bool(special)
    return ""


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
        end = min(_common(asked, text, chat) for text, _ in texts)
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
    return Rendered(text, len(pair.prompt), [(len(pair.prompt), len(text))])


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
        quiet, _ = _render(turns[:begins], chat, pair) if begins else ("", [])
        if spoken[:1] == [begins] and text.startswith(quiet) and len(quiet) <= end:
            spans[0] = end, spans[0][1]  # what one answer writes anew counts in the other too
    prompt = text[:end] if text.startswith(asked) else text
    shown = prompt, text[end - len(chat.header or "") :]  # thoughts may be begun by the header
    left = _left_out(turns, text, shown, chat, pair, spoken)
    if chat.added and said[-1:] == [len(turns) - 1]:
        spans = [*spans, (len(text), len(text) + len(chat.added))]
        text += chat.added
    return Rendered(text, end, spans, left)


def _left_out(
    turns: Turns, text: str, shown: tuple[str, str], chat: Chat, pair: Pair, spoken: list[int]
) -> tuple[str, ...]:
    """Names of what the turns hold and their text, that of prompt and answer, does not show.

    Raises:
      ValueError: that leaves an answer of which nothing is shown.
    """
    found: dict[str, None] = {}

    def looks_the_same(i: int, instead: Message) -> bool:
        try:
            return _render([*turns[:i], instead, *turns[i + 1 :]], chat, pair)[0] == text
        except ValueError:
            return False

    for i, message in enumerate(turns):
        part = shown[i >= len(pair.prompt)]
        if len(message) == 2 and message["content"].strip() in part:
            continue  # as almost every message
        missing = left_out.names(message, part)
        for name in (left_out.THOUGHT, left_out.CALLS):  # whose words may stand elsewhere
            named = name in missing or not left_out.holds(message, name)
            if not named and looks_the_same(i, left_out.without(message, name)):
                missing.append(name)
        if missing and i in spoken and looks_the_same(i, BLANK):
            raise ValueError(
                "the chat template shows nothing of an answer: it leaves out its "
                + ", ".join(missing)
            )
        found |= dict.fromkeys(missing)
    return tuple(found)


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
    head, tail = _around(i, turns, chat, pair)
    start, stop = _header_end(turns[:i], text, chat, pair), None
    if start is None and head is not None and text.startswith(head):
        start = len(head)
    if text.startswith(after):
        stop = len(after)
    elif tail is not None and text.endswith(tail):
        stop = _behind(chat.ends, text, len(text) - len(tail))
    elif start is not None:
        stop = _next_end(turns[i + 1 :], text, start, chat)
    if start is None or stop is None or stop < start:
        raise ValueError("the chat template does not show which part of the text is the answer")
    return start, stop


def _around(i: int, turns: Turns, chat: Chat, pair: Pair) -> tuple[str | None, str | None]:
    """What stands before and behind turn `i` when it says something else; None if that fails."""
    instead = {"role": "assistant", "content": STAND_IN}  # of thoughts and calls, too
    try:
        text = _render([*turns[:i], instead, *turns[i + 1 :]], chat, pair)[0]
    except ValueError:
        return None, None
    head, found, tail = text.partition(STAND_IN)
    return (head, tail) if found else (None, None)


def _header_end(before: Turns, text: str, chat: Chat, pair: Pair) -> int | None:
    """Where the header of the turn after these ends; one that continues a turn may have none."""
    quiet = _render(before, chat, pair)[0] if before else ""
    if chat.header is None or not text.startswith(quiet):
        return None
    if shared := _common(chat.header, text[len(quiet) :], chat):
        return len(quiet) + shared
    return len(quiet) if before and before[-1]["role"] in ("assistant", "tool") else None


def _next_end(behind: Turns, text: str, start: int, chat: Chat) -> int | None:
    """The end of the answer by its special tokens, if no turn behind it begins before."""
    said = [turn["content"].strip() for turn in behind if turn["content"]]
    for i, piece in enumerate(chat.ends):
        stop = text.find(piece, start) if chat.specials.fullmatch(piece) else -1
        if stop >= 0 and not any(words and words in text[start:stop] for words in said):
            return _behind(chat.ends[i:], text, stop)
    return None


def _behind(ends: Sequence[str], text: str, stop: int) -> int:
    """The first character behind those of the pieces that stand there."""
    for piece in ends:
        if not text.startswith(piece, stop):
            break
        stop += len(piece)
    return stop


def _common(a: str, b: str, chat: Chat) -> int:
    """Characters that both begin with, up to a special token that only one of them has."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    for text in (a, b):
        for token in chat.specials.finditer(text, max(low - 256, 0), low + 256):
            if token.start() < low < token.end():
                low = token.start()
    return low


def _render(turns: Turns, chat: Chat, pair: Pair, *, ask: bool = False) -> tuple[str, list[Span]]:
    """The text of some turns (with the header of an answer to come if `ask`), its marked spans."""
    named = "tool_use" if pair.tools and "tool_use" in chat.programs else "default"
    spelled = dialect.spelled(turns, chat.dialects.get(named))
    text, marks = _run(chat.programs[named], spelled, _given(pair, chat), ask=ask)
    ends = bool(chat.surplus) and not ask and turns[-1]["role"] == "assistant"
    return (text.removesuffix(chat.surplus) if ends else text), marks


def _given(pair: Pair, chat: Chat) -> dict[str, Any]:
    return {**chat.given, "documents": None, **pair.template_kwargs, "tools": pair.tools}


def _run(
    program: jinja2.Template, turns: Turns, given: dict[str, Any], *, ask: bool
) -> tuple[str, list[Span]]:
    return template.render(program, given | {"messages": turns, "add_generation_prompt": ask})


def ignores(pair: Pair, chat: Chat | None) -> bool:
    """Has the row tools, or settings of a template, that this one never looks at?"""
    given = {*pair.template_kwargs, *(["tools"] if pair.tools else [])}
    return chat is not None and not given <= chat.reads


def stops(tokenizer: Tokenizer, chat: Chat) -> bool:
    """Does a special token end each answer, so that the model can learn to stop?"""
    return tokenizer.specials.search(chat.end_of_turn) is not None


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

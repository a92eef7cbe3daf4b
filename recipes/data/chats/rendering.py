"""Renders a `Pair` as text with the chat template, and marks the spans that are scored."""

from collections.abc import Sequence
from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.chats import left_out
from recipes.data.chats.chat import Chat, shared_start, write
from recipes.data.chats.messages import QUIET, Message, Turns
from recipes.data.chats.pair import Pair
from zoo.text.template import Span

BLANK = {"role": "assistant", "content": ""}
ALL_QUIET = (
    "each turn that would be scored is marked not to be trained (weight 0, train or loss false)"
)
# Stands in for an answer that is being located: a character without a meaning in any text.
STAND_IN = "\ue0d0"


class Rendered(NamedTuple):
    """One answer after its prompt, as text."""

    text: str
    prompt_end: int  # characters of the prompt
    scored: list[Span]  # the characters that are scored
    left_out: tuple[str, ...] = ()  # what the messages hold and the text does not show


def render(pair: Pair, chat: Chat | None) -> tuple[Rendered, ...]:
    """Each answer as text; plain text needs no template.

    What is scored comes from the template's `{% generation %}` blocks. For a template without them
    it is what an answer adds to the rendering of the turns before it; if a later turn changes an
    earlier one's text, it is what changes with the answer's words, and the end of turn after it.

    Raises:
      ValueError: the template refuses the messages, or an answer cannot be found in its text.
    """
    prompt = pair.prompt
    if isinstance(prompt, str) or chat is None:
        return tuple(_plain(pair, answer) for answer in pair.answers)
    answers = [turns for turns in pair.answers if not isinstance(turns, str)]
    asks = all(turns[0]["role"] == "assistant" for turns in answers)
    wholes = [prompt + turns for turns in answers]
    asked = write(prompt, chat, pair, ask=asks)[0] if prompt else ""
    texts = [write(turns, chat, pair) for turns in wholes]
    end = min(shared_start(asked, text, chat) for text, _ in texts)
    if end < len(asked) and asks:  # an answer replaces the end of the prompt
        both = zip(wholes, texts, strict=True)
        end = min(end, *(_begin(turns, *text, end, chat, pair) for turns, text in both))
    return tuple(
        _answer(turns, *text, asked, end, chat, pair)
        for turns, text in zip(wholes, texts, strict=True)
    )


def _plain(pair: Pair, answer: Turns | str) -> Rendered:
    text = f"{pair.prompt}{answer}"
    return Rendered(text, len(pair.prompt), [(len(pair.prompt), len(text))])


def _answer(
    turns: Turns, text: str, marks: list[Span], asked: str, end: int, chat: Chat, pair: Pair
) -> Rendered:
    begins = len(pair.prompt)
    said = [i for i in range(begins, len(turns)) if turns[i]["role"] == "assistant"]
    spoken = said[-1:] if chat.scored_turns == "last" else said
    counted = [i for i in spoken if not turns[i].get(QUIET)]
    if chat.scored_turns == "all":
        spans, counted = [(end, len(text))], spoken
    elif spoken and not counted:
        raise BadInput(ALL_QUIET)
    elif chat.marked and counted != spoken:
        places = [_place_of(i, turns, text, chat, pair) for i in counted]
        both = [(max(a, c), min(b, d)) for a, b in places for c, d in marks]
        spans = [(start, stop) for start, stop in both if start < stop]
    elif chat.marked:
        since = end if spoken == said else _place_of(spoken[0], turns, text, chat, pair)[0]
        spans = [(max(start, since), stop) for start, stop in marks if stop > since]
    elif len(turns) == begins + 1 and spoken and end == len(asked):
        spans = [(end, len(text))]
    else:
        spans = [_place_of(i, turns, text, chat, pair) for i in counted]
        quiet, _ = write(turns[:begins], chat, pair) if begins else ("", [])
        if counted[:1] == [begins] and text.startswith(quiet) and len(quiet) <= end:
            spans[0] = end, spans[0][1]  # what one answer rewrites is scored in the other too
    prompt = text[:end] if text.startswith(asked) else text
    shown = prompt, text[max(end - len(chat.header or ""), 0) :]  # it may begin the thoughts
    left = _left_out(turns, text, shown, chat, pair, counted)
    if chat.added and counted[-1:] == [len(turns) - 1]:
        spans = [*spans, (len(text), len(text) + len(chat.added))]
        text += chat.added
    return Rendered(text, end, spans, left)


def _left_out(
    turns: Turns, text: str, shown: tuple[str, str], chat: Chat, pair: Pair, spoken: list[int]
) -> tuple[str, ...]:
    """The names of the parts of turns that the text of prompt and answer does not show.

    Raises:
      ValueError: nothing at all is shown of an answer.
    """
    found: dict[str, None] = {}

    def looks_the_same(i: int, instead: Message) -> bool:
        try:
            return write([*turns[:i], instead, *turns[i + 1 :]], chat, pair)[0] == text
        except ValueError:
            return False

    for i, message in enumerate(turns):
        part = shown[i >= len(pair.prompt)]
        if len(message) == 2 and message["content"].strip() in part:
            continue  # true of almost every message
        missing = left_out.names(message, part)
        for name in (left_out.THOUGHT, left_out.CALLS):  # whose words may also be elsewhere
            named = name in missing or not left_out.holds(message, name)
            if not named and looks_the_same(i, left_out.without(message, name)):
                missing.append(name)
        if missing and i in spoken and looks_the_same(i, BLANK):
            raise BadInput(
                "the chat template renders nothing of an answer: it leaves out its "
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
    """The span of turn `i`'s answer in the text of all turns, including its end of turn."""
    before = write(turns[:i], chat, pair, ask=True)[0] if i else ""
    after = write(turns[: i + 1], chat, pair)[0]
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
        raise BadInput("the answer cannot be found in the text that the chat template renders")
    return start, stop


def _around(i: int, turns: Turns, chat: Chat, pair: Pair) -> tuple[str | None, str | None]:
    """The text before and after turn `i` when it says something else; None if that fails."""
    instead = {"role": "assistant", "content": STAND_IN}  # replaces thoughts and calls, too
    try:
        text = write([*turns[:i], instead, *turns[i + 1 :]], chat, pair)[0]
    except ValueError:
        return None, None
    head, found, tail = text.partition(STAND_IN)
    return (head, tail) if found else (None, None)


def _header_end(before: Turns, text: str, chat: Chat, pair: Pair) -> int | None:
    """The end of the header of the turn after these, if it has one."""
    quiet = write(before, chat, pair)[0] if before else ""
    if chat.header is None or not text.startswith(quiet):
        return None
    shared = shared_start(chat.header, text[len(quiet) :], chat)
    return len(quiet) + shared if shared else None


def _next_end(behind: Turns, text: str, start: int, chat: Chat) -> int | None:
    """The end of the answer by its special tokens, if no later turn begins before it."""
    said = [turn["content"].strip() for turn in behind if turn["content"]]
    for i, piece in enumerate(chat.ends):
        stop = text.find(piece, start) if chat.specials.fullmatch(piece) else -1
        if stop >= 0 and not any(words and words in text[start:stop] for words in said):
            return _behind(chat.ends[i:], text, stop)
    return None


def _behind(ends: Sequence[str], text: str, stop: int) -> int:
    """The first character after those of the pieces that are in the text."""
    for piece in ends:
        if not text.startswith(piece, stop):
            break
        stop += len(piece)
    return stop

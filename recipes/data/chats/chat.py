"""A chat template that has passed its trial, and the text that it renders for turns."""

from collections.abc import Mapping
import re
from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.chats import dialect
from recipes.data.chats.dialect import Dialect
from recipes.data.chats.messages import QUIET, Turns
from recipes.data.chats.pair import Pair
from zoo.text import template, tokenizer
from zoo.text.template import Span
from zoo.text.tokenizer import Tokenizer
from zoo.text.traced import Program


class Chat(NamedTuple):
    """A chat template that has passed its trial."""

    programs: Mapping[str, Program]  # default, and tool_use for rows with tools
    given: Mapping[str, str]  # bos_token and the like
    marked: bool  # it marks what is generated
    scored_turns: str  # after the prompt: assistant, the last of them, or all (every word)
    end_of_turn: str  # what follows an answer
    ends: tuple[str, ...] = ()  # the same in pieces: special tokens, and the text between them
    added: str = ""  # the part of it from `data.end_of_turn`, not from the template
    surplus: str = ""  # what the template writes after the last answer's end, cut off here
    header: str | None = None  # what it writes before any answer
    specials: re.Pattern[str] = re.compile("(?!)")  # the tokenizer's special tokens
    reads: frozenset[str] = frozenset()  # the variable names that it reads
    dialects: Mapping[str, Dialect | None] = {}


def write(turns: Turns, chat: Chat, pair: Pair, *, ask: bool = False) -> tuple[str, list[Span]]:
    """The text of some turns (with the next answer's header if `ask`), and its marked spans."""
    named = "tool_use" if pair.tools and "tool_use" in chat.programs else "default"
    turns = [{key: x for key, x in turn.items() if key != QUIET} for turn in turns]
    spelled = dialect.spelled(turns, chat.dialects.get(named))
    text, marks = run(chat.programs[named], spelled, given_of(pair, chat), ask=ask)
    ends = bool(chat.surplus) and not ask and turns[-1]["role"] == "assistant"
    return (text.removesuffix(chat.surplus) if ends else text), marks


def given_of(pair: Pair, chat: Chat) -> dict[str, object]:
    """Everything a template is given besides the messages."""
    return {**chat.given, "documents": None, **pair.template_kwargs, "tools": pair.tools}


def run(
    program: Program, turns: Turns, given: dict[str, object], *, ask: bool
) -> tuple[str, list[Span]]:
    """The text that one program renders for the turns, and its marked spans."""
    return template.render(program, given | {"messages": turns, "add_generation_prompt": ask})


def shared_start(a: str, b: str, chat: Chat) -> int:
    """The length of the common prefix, up to a special token that only one of them has."""
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


def ignores(pair: Pair, chat: Chat | None) -> bool:
    """Whether the row has tools or template settings that this template never reads."""
    given = {*pair.template_kwargs, *(["tools"] if pair.tools else [])}
    return chat is not None and not given <= chat.reads


def stops(tokenizer: Tokenizer, chat: Chat) -> bool:
    """Whether a special token ends each answer, so that the model can learn to stop."""
    return tokenizer.specials.search(chat.end_of_turn) is not None


def check_plain(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer without an end-of-text token, with which plain text must end."""
    if tokenizer.eos_id is None:
        raise BadInput(
            "--config.data.layout=plain_text ends each answer with the end-of-text token, but "
            "this tokenizer has none: choose another layout or --config.tokenizer"
        )


def stop_ids(own: Tokenizer, chat: Chat | None) -> tuple[int, ...]:
    """The ids that end an answer: end of text, and the template's end of turn, if there is one."""
    return tokenizer.stop_ids(own, chat.end_of_turn if chat else "")

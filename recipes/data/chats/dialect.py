"""How a chat template wants tool calls spelled: found by trial, applied to every row.

OpenAI writes the arguments of a call as JSON text, most templates want them as an object, some as
text, and a few print calls only if a message's content is null. Given the wrong spelling, a
template prints JSON within JSON, fails, or prints nothing.
"""

from collections.abc import Callable
import json
from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.chats.messages import Message, Turns

QUESTION: Message = {"role": "user", "content": "Which way?"}
# Mistral's templates refuse ids that are not nine letters or digits.
CALL = {"id": "call00001", "type": "function"}
NAME, ARGUMENTS = "find_way", {"town": "Onwards"}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Finds the way.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Where to."}},
            "required": ["town"],
        },
    },
}


class Dialect(NamedTuple):
    """How a template's spelling differs from our own: object arguments, text content."""

    text_arguments: bool = False  # a call's arguments as JSON text
    null_content: bool = False  # null if a message with calls has no text


DIALECTS = tuple(Dialect(text, null) for null in (False, True) for text in (False, True))


def tried(render: Callable[[Turns], str]) -> Dialect | None:
    """The first spelling in which a call is printed once and whole; None if there is none.

    If a template prints an empty content after the call, as an answer of its own, it is given null.
    `render` returns the text of a conversation and raises ValueError if the template fails.
    """
    call = CALL | {"function": {"name": NAME, "arguments": ARGUMENTS}}
    answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}

    def behind_question(turns: Turns) -> str:
        try:  # the tools before it also contain every word of the call
            return render(turns).rpartition(QUESTION["content"])[2]
        except ValueError:
            return ""

    texts = {it: behind_question(spelled([QUESTION, answer], it)) for it in DIALECTS}
    whole = [it for it, text in texts.items() if _shows_call(text)]
    if not whole:
        return None
    found, null = whole[0], whole[0]._replace(null_content=True)
    words = {"role": "assistant", "content": "Onwards."}
    end = behind_question([QUESTION, words]).rpartition(words["content"])[2]
    rest = texts[found].removeprefix(texts[null])
    again = null in whole and rest != texts[found] and bool(rest)
    return null if again and end.strip() and texts[null].endswith(end) else found


def _shows_call(text: str) -> bool:
    escaped_or_python = '\\"town' in text or "'town'" in text
    return all(word in text for word in (NAME, "town", "Onwards")) and not escaped_or_python


def spelled(turns: Turns, dialect: Dialect | None) -> Turns:
    """The conversation as the template wants it; unchanged if no spelling was found.

    Raises:
      ValueError: a call's arguments are text other than the JSON object that is wanted.
    """
    if dialect is None or not any("tool_calls" in message for message in turns):
        return turns
    return [_spelled(message, dialect) if "tool_calls" in message else message for message in turns]


def _spelled(message: Message, dialect: Dialect) -> Message:
    calls = [_call(call, dialect) for call in message["tool_calls"]]
    says_nothing = dialect.null_content and not message["content"]
    return message | {"tool_calls": calls} | ({"content": None} if says_nothing else {})


def _call(call: object, dialect: Dialect) -> object:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if dialect.text_arguments:
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str):
        raise BadInput(
            f"the arguments of a tool call are not a JSON object ({arguments[:40]!r}), which the "
            "chat template requires"
        )
    return call | {"function": function | {"arguments": arguments}}

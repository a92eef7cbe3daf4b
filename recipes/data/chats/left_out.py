"""The names of the parts of a message that its rendering does not show."""

import json

from recipes.data.chats.messages import THOUGHTS, Message

THOUGHT, CALLS = "reasoning_content", "tool_calls"
# Who speaks, and what links a result to its call: no part of what is said.
NOT_SAID = ("role", "tool_call_id")


def names(message: Message, text: str) -> list[str]:
    """The parts of the message that are not in the text, in any spelling a template may use.

    A word that also stands elsewhere in the text counts as found.
    """
    held = _held(message).items()
    return [name for name, value in held if not all(_shown(x, text) for x in _texts(value, name))]


def holds(message: Message, name: str) -> bool:
    """Whether a message has anything under this name."""
    return any(map(str.strip, _texts(_held(message).get(name), name)))


def without(message: Message, name: str) -> Message:
    """The message without the named part: its thoughts, or its calls."""
    dropped = THOUGHTS if name == THOUGHT else (name,)
    return {key: value for key, value in message.items() if key not in dropped}


def _held(message: Message) -> dict[str, object]:
    """The parts of a message by name; thoughts, which have three names, are under one."""
    named = {THOUGHT if name in THOUGHTS else name: value for name, value in message.items()}
    return {name: value for name, value in named.items() if name not in NOT_SAID}


def _shown(said: str, text: str) -> bool:
    """Whether a text contains a part: templates strip texts, write JSON, and move line breaks."""
    said = said.strip()
    if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
        return True
    squeeze = lambda whole: "".join(whole.split())
    return squeeze(said) in squeeze(text)


def _texts(held: object, name: str) -> list[str]:
    """All texts in a value; for calls the names, and the keys and texts of the arguments."""
    if name == CALLS and isinstance(held, list):
        functions = [call.get("function", call) for call in held if isinstance(call, dict)]
        return [text for function in functions for text in _of_call(function)]
    return _leaves(held)


def _of_call(function: object) -> list[str]:
    if not isinstance(function, dict):
        return _leaves(function)
    arguments = function.get("arguments")
    return [str(function.get("name", "")), *_leaves(arguments)]


def _leaves(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (str(key), *_leaves(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in _leaves(inner)]
    return [value] if isinstance(value, str) else []

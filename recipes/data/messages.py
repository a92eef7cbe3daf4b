"""A conversation as datasets spell it -> a list of messages, or a sentence about what is wrong."""

import json
import re
from typing import Any

Message = dict[str, Any]  # role, content, and what else a template may read: tool_calls, name
Turns = list[Message]

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant",
    "tool": "tool", "human": "user", "gpt": "assistant", "chatgpt": "assistant",
    "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
# What a message may hold besides; a template that knows nothing of it ignores it.
BESIDES = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")
THOUGHTS = BESIDES[3:]  # one thing, spelled in three ways

# What would steer a terminal or a page, or not be seen there, is shown by name.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def read(value: Any, name: str, role: str | None = None) -> Turns:
    """The messages in a column; with `role`, a string is one message of that role.

    Both spellings are read, `{role, content}` and `{from, value}`, and content in typed parts.

    Raises:
      ValueError: it holds something else.
    """
    if role and isinstance(value, str):
        return [{"role": role, "content": text(value, name)}]
    if isinstance(value, dict):  # ShareGPT's answers
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"no list of messages in `{name}`")
    return [_message(message, name) for message in value]


def text(value: Any, name: str) -> str:
    """A string that can be tokenised.

    Raises:
      ValueError: it is none, or holds half a character.
    """
    if not isinstance(value, str):
        raise ValueError(f"no text in `{name}`")
    if re.search("[\ud800-\udfff\ufdd0\ufdd1]", value):
        raise ValueError(f"the text in `{name}` is not valid Unicode")
    return value


def check_data(value: Any, name: str) -> None:
    """Refuses what a template could not write as JSON, or only as half a character.

    Raises:
      ValueError: it is such.
    """
    try:
        written = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` is not JSON") from error
    text(written, name)


def visible(said: str) -> str:
    """The text, with characters that would act, or not be seen, replaced by their names."""
    name = lambda code: chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩"
    return UNSEEN.sub(lambda found: name(ord(found[0])), said)


def one_line(said: str, most: int = 300) -> str:
    """The same on one line, with a long text cut."""
    said = visible(said).replace("\n", "␊").replace("\t", " ")
    return said if len(said) <= most else f"{said[:most]}…"


def check_order(turns: Turns) -> None:
    """Refuses what no conversation looks like.

    Raises:
      ValueError: an instruction stands in the middle, or one assistant turn follows another.
    """
    spoken = False
    for before, message in zip([None, *turns], turns, strict=False):
        if message["role"] in ("system", "developer") and spoken:
            raise ValueError("roles out of order: a system message after the first turn")
        spoken |= message["role"] not in ("system", "developer")
        twice = before and before["role"] == message["role"] == "assistant"
        if before and twice and "tool_calls" not in before:
            raise ValueError("roles out of order: two assistant turns in a row")


def is_blank(message: Message) -> bool:
    """Says it nothing, nor calls a tool?"""
    return not message["content"].strip() and "tool_calls" not in message


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"a message in `{name}` is not {{role, content}} of text")
    role, said = _either(message, "role", "from"), _either(message, "content", "value")
    if not isinstance(role, str):
        raise ValueError(f"a message in `{name}` has no role")
    if role not in ROLES:
        raise ValueError(f"a message in `{name}` has the role {role[:40]!r}")
    besides = {key: message[key] for key in BESIDES if message.get(key) not in (None, [], "")}
    for key, value in besides.items():
        check_data(value, key)
    if thought := next((besides[key] for key in THOUGHTS if key in besides), None):
        besides |= dict.fromkeys(THOUGHTS, text(thought, name))
    if role == "function_call":
        said, besides = "", besides | {"tool_calls": [_call(said, name)]}
    if said is None and "tool_calls" in besides:
        said = ""
    if isinstance(said, list):
        said = "".join(_part(part, name) for part in said)
    return {"role": ROLES[role], "content": text(said, name)} | besides


def _part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        other = f", but {kind[:40]!r}" if isinstance(kind, str) else ""
        raise ValueError(f"a message in `{name}` has a part that is not text{other}")
    return text(_either(part, "text", "value"), name)


def _either(given: dict[str, Any], one: str, other: str) -> Any:
    """Tables that mix both spellings hold both, one of them null."""
    found = given.get(one)
    return given.get(other) if found is None else found


def _call(said: Any, name: str) -> dict[str, Any]:
    try:
        call = json.loads(said)
        told = {"type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"a function call in `{name}` is not {{name, arguments}}") from error
    check_data(told, name)
    return told

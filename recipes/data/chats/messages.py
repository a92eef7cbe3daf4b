"""Reads a conversation, as datasets spell it, into a list of messages, or says what is wrong."""

import ast
import json
import re
from typing import Any

from checkpoints_io.errors import BadInput
from checkpoints_io.unseen import visible

Message = dict[str, Any]  # role, content, and what else a template may read: tool_calls, name
Turns = list[Message]

# A key of the assistant's messages that are not to be trained; no template sees it.
QUIET = "quiet"

ROLES = {  # in lower case; upper case is read too
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant",
    "tool": "tool", "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles whose content is a call, as JSON text
LONGEST_LITERAL = 2**20  # characters of a Python literal: its parser takes a hundred times as much
# Other keys that a message may have: all that published templates read.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # three names for the same thing
BESIDES = ("tool_calls", "tool_call_id", "name", *THOUGHTS, "tool_plan", "tool_responses")
READ = frozenset({"role", "from", "content", "value", "function_call", *BESIDES})
# Keys that say whether a turn is to be trained: OpenAI's, axolotl's, ms-swift's, LLaMA-Factory's.
TRAINED = ("weight", "train", "training", "loss", "loss_weight")
NO, YES = ("0", "0.0", "false"), ("1", "1.0", "true")
EMPTY = (None, "", [], {})
LISTS = ("tool_calls", "tool_responses")  # keys that a table may keep as text
ARGUMENTS = ("arguments", "parameters", "args", "input")  # names for the arguments of a call
TEXT_PARTS = ("text", "input_text", "output_text")  # chat completions, and OpenAI's responses
OTHER_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url",
               "input_audio", "file", "input_file", "thinking")  # fmt: skip
NOTHING = ("", "[]", "{}", "null", "none", "nan")  # how text in a table says that there is nothing

NESTED = ("messages", "conversations", "conversation")  # keys under which an object holds messages
# Other names for the column of an answer.
ANSWER_WORDS = ("response", "answer", "completion", "output", "messages", "conversation", "text")

# A string in Python's quotes (to the end if they do not close), or a gap between array objects.
QUOTED_OR_PARTED = re.compile(
    r"""'[^'\\]*+(?:\\.[^'\\]*+)*+(?:'|\Z)|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)|\}\s+\{""",
    re.DOTALL,
)
WHO = ("author", "speaker", "sender")  # other names for a role
# How a text that may hold messages begins, and what one that surely does contains.
WRITTEN = re.compile(r"""\s*(?:\[\s*)?\{|\s*"\s*(?:\[\s*)?\{\s*\\+\"""")
PARTS = re.compile(r"""\s*\[\s*\{[^{}]*["']type["']\s*:""")  # the same for typed parts
KEYS = [re.compile(rf"""["'](?:{keys})["']\s*:""") for keys in ("role|from", "content|value")]


def read(value: object, name: str, role: str | None = None) -> Turns:
    """The messages in a column; with `role`, a string is one message of that role.

    Both spellings are read, `{role, content}` and `{from, value}`, and content in typed parts.
    Messages that were written as text are parsed, never trained on as text.

    Raises:
      ValueError: it holds something else.
    """
    if value is None:
        raise BadInput(f"`{name}` is missing, or null")
    value = unwritten(value, name)
    if role and isinstance(value, str):
        return [{"role": role, "content": text(value, name)}]
    value = unnested(value)
    value = [value] if isinstance(value, dict) else value  # an answer in ShareGPT format
    if not isinstance(value, list) or not value:
        text_or = "text and no " if role else ""
        raise BadInput(f"no {text_or}list of messages in `{name}`")
    turns: Turns = []
    for message in (unwritten(message, name) for message in value):
        turn = _message(message, name)
        if turns and _is_call(message) and _joins(turns[-1], turn):
            calls = [*turns[-1].get("tool_calls", ()), *turn["tool_calls"]]
            turns[-1] = turn | turns[-1] | {"tool_calls": calls}
        else:
            turns.append(turn)
    return turns


def _is_call(message: object) -> bool:
    """Whether it is a call in a message of its own, as ShareGPT and ms-swift write it."""
    role = _either(message, "role", "from") if isinstance(message, dict) else None
    return isinstance(role, str) and role.strip().lower() in CALLS


def _joins(before: Message, call: Message) -> bool:
    """Whether a call belongs to the same turn as the assistant's message or call before it."""
    both = (before.keys() & call.keys()) - {"role", "content", "tool_calls", QUIET}
    alike = before.get(QUIET) == call.get(QUIET)
    return before["role"] == "assistant" and alike and not both


def unnested(value: object) -> object:
    """The messages, if the value is an object with nothing but messages; else the value."""
    key = next((key for key in NESTED if isinstance(value, dict) and key in value), None)
    return value[key] if key and isinstance(value, dict) else value


def unwritten(value: object, name: str) -> object:
    """The messages, if the value is messages written as JSON or Python text; else the value.

    Raises:
      ValueError: it looks like messages, but cannot be parsed.
    """
    if not isinstance(value, str) or not WRITTEN.match(value):
        return value
    found = parsed(value)
    found = None if found is value else found
    if are_messages(found):
        return found
    if _are_turns(found):
        raise BadInput(
            f"the text in `{name}` contains messages whose keys are not `role` and `content`"
        )
    if found is None and all(key.search(value) for key in KEYS):
        raise BadInput(f"the text in `{name}` looks like messages, but is not valid JSON")
    return value  # an answer may well be JSON


def are_messages(found: object) -> bool:
    """Whether it is a list of messages, an object that holds one, or a message."""
    found = unnested(found)
    if isinstance(found, dict):
        return role_of(found) is not None and bool(found.keys() & {"content", "value"})
    if not isinstance(found, list) or not found:
        return False
    held = [one.keys() if isinstance(one, dict) else set() for one in found]
    return all(
        {"from", "value"} <= keys or ("role" in keys and bool(keys & {"content", "tool_calls"}))
        for keys in held
    )


def role_of(message: object) -> str | None:
    """The usual name of a message's role; None if it is not a message or the role is unknown."""
    role = _either(message, "role", "from") if isinstance(message, dict) else None
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def unread(value: object) -> set[str]:
    """Keys of the messages in a column that nothing here reads, and that hold something."""
    found: set[str] = set()
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or READ.issuperset(message):
            continue  # as almost every one
        if "role" in message or "from" in message:
            found |= {key for key in message.keys() - READ if message[key] not in EMPTY}
            found -= {key for key in TRAINED if _said(message, key) in (*NO, *YES)}
    return found


def text(value: object, name: str) -> str:
    """A string that can be tokenised.

    Raises:
      ValueError: it is not text, or holds half a character.
    """
    if not isinstance(value, str):
        raise BadInput(f"no text in `{name}`")
    if re.search("[\ud800-\udfff\ufdd0\ufdd1]", value):
        raise BadInput(f"the text in `{name}` is not valid Unicode")
    return value


def unquoted(value: object) -> object:
    """The value in JSON text; anything else unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def parsed(value: object) -> object:
    """The list or object that a text encodes, as JSON or as pandas writes it; else the value.

    JSON may have been encoded twice, as a string within JSON.
    """
    start = value.lstrip()[:1] if isinstance(value, str) else ""
    if not isinstance(value, str) or not start or start not in '[{"':
        return value
    found = unquoted(value)
    if start == '"':
        inner = parsed(found) if isinstance(found, str) and found != value else found
        return value if isinstance(inner, str) else inner
    found = _literal(value) if found is value else found
    return value if found is None else found


def check_data(value: object, name: str) -> None:
    """Refuses a value that a template could not write as JSON, or only with half a character.

    Raises:
      ValueError: the value is one of these.
    """
    try:
        written = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"`{name}` is not JSON") from error
    text(written, name)


def one_line(said: str, most: int = 300) -> str:
    """A text on one line, cut if it is long."""
    said = visible(said).replace("\n", "␊").replace("\t", " ")
    return said if len(said) <= most else f"{said[:most]}…"


def is_blank(message: Message) -> bool:
    """Whether a message is empty and has no tool call."""
    return not message["content"].strip() and "tool_calls" not in message


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        raise BadInput(f"a message in `{name}` is not {{role, content}} of text")
    role, said = _either(message, "role", "from"), _either(message, "content", "value")
    if not isinstance(role, str):
        raise BadInput(f"a message in `{name}` has no role")
    known = role_of(message)
    if known is None:
        raise BadInput(f"a message in `{name}` has the unknown role {role[:40]!r}")
    empty = lambda x: x in EMPTY or x != x  # pandas turns missing values into NaN
    besides = {key: message[key] for key in BESIDES if key in message and not empty(message[key])}
    besides = {key: x for key, x in besides.items() if key not in LISTS or not _says_nothing(x)}
    for key, value in besides.items():
        check_data(value, key)
    said = _typed_parts(said)
    if isinstance(said, list):
        said, thought = _parts(said, name)
        if thought and not besides.keys() & {*THOUGHTS}:
            besides["thinking"] = thought
    if thought := next((besides[key] for key in THOUGHTS if key in besides), None):
        besides |= dict.fromkeys(THOUGHTS, text(thought, name))
    calls = besides.get("tool_calls") or message.get("function_call")  # OpenAI's older form
    if _is_call(message):
        calls, said = said, None
    if not empty(calls) and not _says_nothing(calls):
        besides["tool_calls"] = _calls(calls, name)
        said = "" if said is None else said
    found = {"role": known, "content": text(said, name)} | besides
    lost = [key for key in sorted(unread([message])) if isinstance(message[key], list | dict)]
    if lost and known == "assistant" and is_blank(found):
        raise BadInput(f"a message in `{name}` contains only `{lost[0]}`, which is not read")
    if known == "assistant" and any(_said(message, key) in NO for key in TRAINED):
        found[QUIET] = True
    return found


def _said(message: Message, key: str) -> str:
    return str(message.get(key)).strip().lower()


def _says_nothing(written: object) -> bool:
    return isinstance(written, str) and written.strip().lower() in NOTHING


def _typed_parts(said: object) -> object:
    """The typed parts, if the content is these written as text, as in tables; else the content."""
    if not isinstance(said, str) or not PARTS.match(said):
        return said
    found = parsed(said)
    whole = lambda part: (
        isinstance(part, dict)
        and (
            part.get("type") in OTHER_PARTS
            or (part.get("type") in TEXT_PARTS and isinstance(_either(part, "text", "value"), str))
        )
    )
    return found if isinstance(found, list) and found and all(map(whole, found)) else said


def _parts(parts: list, name: str) -> tuple[str, str]:
    """The text in typed parts, and the thoughts in them."""
    said, thought = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS:
            said.append(text(_either(part, "text", "value"), name))
        elif kind == "thinking":
            inner = part.get("thinking")
            inner = _parts(inner, name)[0] if isinstance(inner, list) else inner
            thought.append(text(inner, name))
        else:
            other = f", but {kind[:40]!r}" if isinstance(kind, str) else ""
            raise BadInput(f"a message in `{name}` has a part that is not text{other}")
    return "".join(said), "".join(thought)


def _either(given: dict[str, object], one: str, other: str) -> object:
    """The value under one of two spellings: tables that mix them hold both, one of them null."""
    found = given.get(one)
    return given.get(other) if found is None else found


def _with_comma(found: re.Match[str]) -> str:
    return found[0] if found[0][0] in "'\"" else "}, {"


def _literal(written: str) -> object:
    """Parses a list as pandas writes it: like Python's, or a numpy array's, without commas."""
    if len(written) > LONGEST_LITERAL:
        return None
    try:
        return ast.literal_eval(QUOTED_OR_PARTED.sub(_with_comma, written.strip()))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _are_turns(found: object) -> bool:
    """Whether it is a list of turns under other keys: `speaker`, or `human` and `assistant`."""
    if not isinstance(found, list) or not all(isinstance(one, dict) and one for one in found):
        return False
    spoken = lambda one: any(role_of({"role": one.get(who)}) for who in WHO)
    pair = lambda one: {role_of({"role": key}) for key in one} >= {"user", "assistant"}
    return bool(found) and (all(map(spoken, found)) or all(map(pair, found)))


def _calls(calls: object, name: str) -> list[dict[str, object]]:
    """Tool calls in OpenAI's form, `{type, function: {name, arguments}}`, arguments as objects."""
    calls = parsed(calls)
    return [_call(unquoted(call), name) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: object, name: str) -> dict[str, object]:
    call = call if isinstance(call, dict) else {}
    inner = call.get("function")
    flat = inner if isinstance(inner, dict) else call  # bare {name, arguments}
    if not isinstance(flat.get("name"), str):
        raise BadInput(f"a function call in `{name}` is not {{name, arguments}}")
    key = next((key for key in ARGUMENTS if flat.get(key) not in (None, "")), "arguments")
    taken = ("function", "name", "arguments", key)
    besides = {key: value for key, value in call.items() if key not in taken}
    given = flat.get(key) or {}
    given = {} if _says_nothing(given) else given
    read = unquoted(given)
    function = {"name": flat["name"], "arguments": read if isinstance(read, dict) else given}
    if flat is not call:
        function |= {key: value for key, value in flat.items() if key not in taken}
    told = besides | {"type": "function", "function": function}
    check_data(told, name)
    return told

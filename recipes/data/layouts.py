"""One function per dataset layout: a raw row in, a `Pair` out."""

from collections.abc import Callable, Iterable
import json
import math
import re
from typing import Any, NamedTuple
import unicodedata

from recipes.data import messages
from recipes.data.messages import Turns

Row = dict[str, Any]


class Pair(NamedTuple):
    """Two answers to one prompt, of which `chosen` was preferred.

    All three are lists of messages, to be rendered by a chat template, or all three are plain text.
    """

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str
    tools: list[Any] | None = None  # what the template is told of tools
    template_kwargs: dict[str, Any] = {}  # noqa: RUF012, never changed
    scores: tuple[float, float] | None = None  # of chosen and rejected, by whoever preferred


def preference_chat(row: Row) -> Pair:
    """Columns `chosen` and `rejected`: two whole conversations, lists of `{role, content}`.

    What both begin with is the prompt, assistant turns included. A column `prompt` is not read:
    in UltraFeedback it repeats the first message.

    Raises:
      ValueError: a column is missing or malformed, or the two are equal.
    """
    return _forked(row, messages.read(row.get("chosen"), "chosen"), _rejected(row))


def prompt_chosen_rejected(row: Row) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: messages, or strings that become one turn each.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    return _answered(row, messages.read(row.get("prompt"), "prompt", role="user"))


def sharegpt(row: Row) -> Pair:
    """Column `conversations`: the messages so far, `{from, value}`; `chosen` and `rejected` answer.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    return _answered(row, messages.read(row.get("conversations"), "conversations"))


def instruction(row: Row) -> Pair:
    """Columns `instruction`, `chosen`, `rejected`, and `input`, which follows on a line of its own.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    asked = messages.text(row.get("instruction"), "instruction")
    if row.get("input"):
        asked += "\n" + messages.text(row["input"], "input")
    return _answered(row, [{"role": "user", "content": asked}])


def hh(row: Row) -> Pair:
    r"""Columns `chosen` and `rejected`: transcripts with `\n\nHuman:` and `\n\nAssistant:`.

    As in Anthropic's hh-rlhf. White space around what is said is not part of it.

    Raises:
      ValueError: a column is missing or no such transcript, or the two are equal.
    """
    return _forked(row, *(_transcript(row.get(name), name) for name in ("chosen", "rejected")))


def plain_text(row: Row) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: strings taken as they are, without a chat template.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    names = ("prompt", "chosen", "rejected")
    return _plain(row, *(messages.text(row.get(name), name) for name in names))


def plain_transcripts(row: Row) -> Pair:
    """Columns `chosen` and `rejected`: whole texts. The prompt is what both begin with.

    It ends before the white space that leads into the first differing word, never inside one.

    Raises:
      ValueError: a column is missing or not text, or the two are equal.
    """
    chosen, rejected = (messages.text(row.get(name), name) for name in ("chosen", "rejected"))
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    while end and any(_inside_a_word(whole, end) for whole in (chosen, rejected)):
        end -= 1
    end = len(chosen[:end].rstrip())
    return _plain(row, chosen[:end], chosen[end:], rejected[end:])


class Layout(NamedTuple):
    """How rows of one kind are read."""

    read: Callable[[Row], Pair]
    columns: frozenset[str]


# Columns that any layout reads, where a row has them.
BESIDES = ("system_prompt", "tools", "chat_template_kwargs", "chosen_score", "rejected_score")
# What a row may not say to its template: the rest of the row and the recipe do.
TAKEN = ("messages", "tools", "documents", "add_generation_prompt")
# Names that well-known datasets give them.
ALSO = {
    "score_chosen": "chosen_score",
    "score_rejected": "rejected_score",
    "system": "system_prompt",
}


def _layout(read: Callable[[Row], Pair], columns: str) -> Layout:
    return Layout(read, frozenset([*columns.split(), "chosen", "rejected", *BESIDES]))


LAYOUTS: dict[str, Layout] = {
    "preference_chat": _layout(preference_chat, ""),
    "prompt_chosen_rejected": _layout(prompt_chosen_rejected, "prompt"),
    "sharegpt": _layout(sharegpt, "conversations"),
    "instruction": _layout(instruction, "instruction input"),
    "hh": _layout(hh, ""),
    "plain_text": _layout(plain_text, "prompt"),
    "plain_transcripts": _layout(plain_transcripts, ""),
}
PLAIN = ("plain_text", "plain_transcripts")
COLUMNS = frozenset().union(*(layout.columns for layout in LAYOUTS.values()))  # of any of them


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row by our names: `columns` says what the dataset calls them."""
    named = {o: t for t, o in ALSO.items() if t in row and o not in row} | columns
    kept = {k: v for k, v in row.items() if k not in named and k not in named.values()}
    return kept | {ours: row[theirs] for ours, theirs in named.items() if theirs in row}


def wanted(columns: dict[str, str]) -> frozenset[str]:
    """The columns that any layout might read, by the names that the dataset gives them."""
    return COLUMNS | {*ALSO, *columns.values()}


def recognised(row: Row) -> str:
    """The layout whose columns the row has.

    Raises:
      ValueError: there is none.
    """
    chosen, prompt = row.get("chosen"), row.get("prompt")
    if not {"chosen", "rejected"} <= row.keys():
        named = ", ".join(map(str, row))[:300]
        raise ValueError(
            f"among its columns ({named}) are no `chosen` and `rejected`: name them, as in "
            "--config.data.columns=\"{'chosen': 'better', 'rejected': 'worse'}\""
        )
    for name in ("conversations", "instruction"):
        if row.get(name) is not None:
            return {"conversations": "sharegpt"}.get(name, name)
    if isinstance(chosen, str):
        if prompt is not None:
            return "prompt_chosen_rejected"
        return "hh" if re.match(r"\s*(Human|Assistant):", chosen) else "plain_transcripts"
    first = chosen[0] if isinstance(chosen, list) and chosen else chosen
    role = (first.get("role") or first.get("from")) if isinstance(first, dict) else None
    if prompt is None or messages.ROLES.get(str(role)) != "assistant":
        return "preference_chat"
    return "prompt_chosen_rejected"


def has_empty_turn(pair: Pair) -> bool:
    """Is there a turn, or a plain answer, without a word?"""
    answers = pair.chosen, pair.rejected
    if isinstance(pair.prompt, str):
        return any(isinstance(answer, str) and not answer.strip() for answer in answers)
    turns = (turn for part in (pair.prompt, *answers) for turn in part)
    return any(not isinstance(turn, str) and messages.is_blank(turn) for turn in turns)


def shares_no_user_turn(pair: Pair) -> bool:
    """Do the two conversations part before anything was asked?"""
    return not isinstance(pair.prompt, str) and not any(m["role"] == "user" for m in pair.prompt)


def texts(pair: Pair) -> Iterable[str]:
    """All that is said in it."""
    for part in pair[:3]:
        if isinstance(part, str):
            yield part
        else:
            yield from (message["content"] for message in part)


def _rejected(row: Row) -> Turns:
    return messages.read(row.get("rejected"), "rejected")


def _answered(row: Row, prompt: Turns) -> Pair:
    chosen = messages.read(row.get("chosen"), "chosen", role="assistant")
    rejected = messages.read(row.get("rejected"), "rejected", role="assistant")
    return _forked(row, prompt + chosen, prompt + rejected)


def _forked(row: Row, chosen: Turns, rejected: Turns) -> Pair:
    if row.get("system_prompt"):
        system = messages.text(row["system_prompt"], "system_prompt")
        if "system" in (chosen[0]["role"], rejected[0]["role"]):
            raise ValueError("a system prompt in its column, and another among the messages")
        chosen, rejected = ([{"role": "system", "content": system}, *t] for t in (chosen, rejected))
    if chosen == rejected:
        raise ValueError("chosen equals rejected")
    for turns in (chosen, rejected):
        messages.check_order(turns)
    fork = 0
    while fork < min(len(chosen), len(rejected)) and chosen[fork] == rejected[fork]:
        fork += 1
    if fork == min(len(chosen), len(rejected)):
        raise ValueError("one conversation is only the beginning of the other")
    return Pair(chosen[:fork], chosen[fork:], rejected[fork:], *_besides(row))


def _plain(row: Row, prompt: str, chosen: str, rejected: str) -> Pair:
    if chosen == rejected:
        raise ValueError("chosen equals rejected")
    for name in BESIDES[:3]:
        if row.get(name):
            raise ValueError(f"plain text has no place for `{name}`")
    return Pair(prompt, chosen, rejected, *_besides(row))


def _besides(row: Row) -> tuple[list[Any] | None, dict[str, Any], tuple[float, float] | None]:
    tools = _parsed(row.get("tools"), "tools") or None
    kwargs = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    listed = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not listed:
        raise ValueError("`tools` is not a list of descriptions")
    if not isinstance(kwargs, dict):
        raise ValueError("`chat_template_kwargs` is not an object")
    if taken := sorted(name for name in kwargs if name in TAKEN or name.endswith("_token")):
        raise ValueError(f"`chat_template_kwargs` may not say `{taken[0][:40]}`")
    for name, value in (("tools", tools), ("chat_template_kwargs", kwargs)):
        if value:
            messages.check_data(value, name)
    return tools, kwargs, _scores(row)


def _scores(row: Row) -> tuple[float, float] | None:
    """Of both answers, NaN for what is no number; None where the row says nothing of them."""
    chosen, rejected = (row.get(name) for name in BESIDES[3:])
    return None if chosen is rejected is None else (_number(chosen), _number(rejected))


def _number(value: Any) -> float:
    try:
        return float(value)  # also of text: cells of CSV are
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` is not valid JSON") from error


def _transcript(value: Any, name: str) -> Turns:
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", messages.text(value, name).lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"`{name}` is no transcript that begins with Human: or Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


JOINERS = "'’._,-"  # between letters or digits they belong to a word or number


def _inside_a_word(whole: str, i: int) -> bool:
    """Do the characters before and at `i` belong together? Ideographs are words of their own."""
    if i >= len(whole):
        return False
    left, right = whole[i - 1], whole[i]
    if unicodedata.category(right) in ("Mn", "Mc", "Me", "Cf"):
        return True  # accents, variants, what joins
    if left == "\u200d" or "\U0001f3fb" <= right <= "\U0001f3ff":  # families; the colour of a skin
        return True
    if all("\U0001f1e6" <= half <= "\U0001f1ff" for half in (left, right)):  # flags
        return True
    if right in JOINERS:
        right = whole[i + 1 : i + 2]
    elif left in JOINERS:
        left = whole[max(i - 2, 0) : i - 1]
    both = left.isalnum() and right.isalnum()
    return both and not ("\u2e80" <= left <= "\u9fff" or "\u2e80" <= right <= "\u9fff")

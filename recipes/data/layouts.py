"""One function per dataset layout: a raw row in, a `Pair` out."""

from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, str]  # role, content
Turns = list[Message]


class Pair(NamedTuple):
    """Two answers to one prompt, of which `chosen` was preferred.

    All three are lists of messages, to be rendered by a chat template, or all three are plain text.
    """

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str


def preference_chat(row: dict[str, Any]) -> Pair:
    """Columns `chosen` and `rejected`: two whole conversations, lists of `{role, content}`.

    What both begin with is the prompt, assistant turns included.

    Raises:
      ValueError: a column is missing or malformed, or the two are equal.
    """
    return _forked(_turns(row, "chosen"), _turns(row, "rejected"))


def prompt_chosen_rejected(row: dict[str, Any]) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: messages, or strings that become one turn each.

    Raises:
      ValueError: a column is missing or malformed, or the answers are equal.
    """
    prompt = _turns(row, "prompt", role="user")
    chosen = _turns(row, "chosen", role="assistant")
    rejected = _turns(row, "rejected", role="assistant")
    return _forked(prompt + chosen, prompt + rejected)


def plain_text(row: dict[str, Any]) -> Pair:
    """Columns `prompt`, `chosen`, `rejected`: strings taken as they are, without a chat template.

    Raises:
      ValueError: a column is missing or not text, or the answers are equal.
    """
    prompt, chosen, rejected = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen equals rejected")
    return Pair(prompt, chosen, rejected)


Layout = Callable[[dict[str, Any]], Pair]
LAYOUTS: dict[str, Layout] = {
    "preference_chat": preference_chat,
    "prompt_chosen_rejected": prompt_chosen_rejected,
    "plain_text": plain_text,
}


def has_empty_answer(pair: Pair) -> bool:
    """Is there no word in the first turn of an answer?"""
    texts = [a if isinstance(a, str) else a[0]["content"] for a in (pair.chosen, pair.rejected)]
    return not all(text.strip() for text in texts)


def _forked(chosen: Turns, rejected: Turns) -> Pair:
    if chosen == rejected:
        raise ValueError("chosen equals rejected")
    fork = 0
    while fork < min(len(chosen), len(rejected)) and chosen[fork] == rejected[fork]:
        fork += 1
    if fork == min(len(chosen), len(rejected)):
        raise ValueError("one conversation is only the beginning of the other")
    return Pair(chosen[:fork], chosen[fork:], rejected[fork:])


def _turns(row: dict[str, Any], name: str, role: str | None = None) -> Turns:
    value = row.get(name)
    if role and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"no list of messages in `{name}`")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"a message in `{name}` is not {{role, content}} of text")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"no text in `{name}`")
    return row[name]

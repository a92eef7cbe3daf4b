"""Joins turns into one conversation: the history, the question, the answer."""

import itertools

from checkpoints_io.errors import BadInput
from recipes.data.chats import messages
from recipes.data.chats.messages import Message, Turns


def continued(prompt: Turns, value: object, name: str) -> Turns:
    """The conversation of a prompt and the answer in a column, which may hold the whole of it.

    Raises:
      ValueError: the column is malformed, or asks something that the prompt does not.
    """
    answer = messages.read(value, name, role="assistant")
    last, first = prompt[-1], answer[0]
    if first["role"] != "assistant":
        for n in range(min(len(prompt), len(answer)), 0, -1):
            if prompt[-n:] == answer[:n]:  # the question is in both
                return prompt[:-n] + answer
        if last["role"] == "assistant" and (begun := _begun(prompt, answer, name)):
            return begun
        if last["role"] != "assistant" and all(turn in answer for turn in prompt):
            return answer  # after a system message of its own
        if last["role"] != "assistant":
            raise BadInput(f"`{name}` asks a question of its own, besides the prompt")
    elif last["role"] == "assistant" and "tool_calls" not in last and not goes_on(last, first):
        raise BadInput(
            "roles out of order: two assistant turns in a row: the prompt ends with an assistant "
            f"turn, and `{name}` does not begin with it"
        )
    return prompt + answer


def _begun(prompt: Turns, answer: Turns, name: str) -> Turns:
    """Joins an answer that repeats the question and continues the turn that ends the prompt."""
    *asked, last = prompt
    i = next((i for i, turn in enumerate(answer) if goes_on(last, turn)), 0)
    for n in range(min(len(asked), i), 0, -1):
        if asked[-n:] == answer[i - n : i] and n in (i, len(asked)):
            return [*(asked[:-n] if n == i else []), *answer[:i], last, *answer[i:]]
    asked, again = ([t for t in turns if t["role"] != "system"] for turns in (asked, answer))
    if asked and again[: len(asked)] == asked:
        raise BadInput(
            f"`{name}` asks again what the prompt asks, and does not begin with what the assistant "
            "says at the prompt's end"
        )
    return []


def history(given: object) -> Turns:
    """Earlier turns, given as messages or as pairs of question and answer, if any.

    Raises:
      ValueError: it holds something else.
    """
    given = messages.parsed(given)
    if not given:
        return []
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        return messages.read(given, "history")
    pairs = isinstance(given, list) and all(isinstance(x, list) and len(x) == 2 for x in given)
    if not pairs:
        raise BadInput("`history` holds neither messages nor pairs of question and answer")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": messages.text(said, "history")}
        for pair in given
        for role, said in zip(roles, pair, strict=True)
    ]


def goes_on(begun: Message, answer: Message) -> bool:
    """Whether an assistant turn is the beginning of another one, which contains all of it."""
    said = begun["content"]
    plain = begun["role"] == answer["role"] == "assistant" and len(begun) == 2
    return plain and bool(said.strip()) and answer["content"].startswith(said)


def odd(turns: Turns) -> str:
    """What is unusual in the order of the turns, which few templates support; or ''."""
    spoken = False
    for before, message in zip([None, *turns], turns, strict=False):
        if message["role"] in ("system", "developer") and spoken:
            return "a system message after the first turn"
        spoken |= message["role"] not in ("system", "developer")
        twice = before and before["role"] == message["role"] == "assistant"
        if before and twice and "tool_calls" not in before:
            return "two assistant turns in a row"
    return ""


def asks_twice(turns: Turns) -> bool:
    """Whether two user turns follow each other."""
    return any(a["role"] == b["role"] == "user" for a, b in itertools.pairwise(turns))


def in_order(turns: Turns, text: str) -> bool:
    """Whether the text shows every turn in its place, and no two answers as one."""
    at, before = 0, ""
    for turn in turns:
        said = turn["content"].strip()
        start = text.find(said, at)
        merged = before == turn["role"] == "assistant" and not text[at:start].strip()
        if start < 0 or merged:
            return False
        at, before = start + len(said), turn["role"]
    return True

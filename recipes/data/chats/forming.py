"""The building blocks of layouts, which turn the columns of a row into the parts of a Pair."""

from collections.abc import Mapping
import json
import math
from typing import Any

from checkpoints_io.errors import BadInput
from recipes.data.chats import columns, conversation, messages, ranked, transcripts
from recipes.data.chats.messages import Turns
from recipes.data.chats.pair import Pair, Worth

Row = dict[str, object]

# Columns that any layout reads if a row has them, and those that any layout of pairs reads.
BESIDES = ("system_prompt", "tools", "chat_template_kwargs")
RATINGS = ("chosen_score", "rejected_score")
LABEL = ("label",)  # whether a single answer is wanted
# Template settings that a row may not give: the rest of the row and the recipe do.
TAKEN = ("messages", "tools", "documents", "add_generation_prompt")
# Reasons to drop a sound row.
EQUAL = "chosen equals rejected"
UNWANTED = "its `label` is false: the answer is not wanted"


def prompted(row: Row) -> Turns:
    """The prompt as messages: `prompt`, after `history`."""
    prompt = messages.read(row.get("prompt"), "prompt", role="user")
    return conversation.history(row.get("history")) + prompt


def asked(row: Row) -> Turns:
    """The question of a ranked row as messages, whatever its column is called, after `history`."""
    name = next((name for name in ranked.ASKED if row.get(name) is not None), "prompt")
    question = row.get(name)
    if isinstance(question, str) and (turns := transcripts.turns(question)):
        while len(turns) > 1 and not turns[-1]["content"]:  # "Assistant:" leads into the answer
            turns.pop()
        question = turns
    return conversation.history(row.get("history")) + messages.read(question, name, role="user")


def answered(
    row: Row, prompt: Turns, chosen: str = "chosen", rejected: str = "rejected", answers: int = 2
) -> Pair:
    """The chosen and the rejected answer, or a list of rejected ones, all worse than the first."""
    best, others = row.get(chosen), row.get(rejected)
    if isinstance(others, str) and are_conversations(found := messages.parsed(others)):
        others = found
    if isinstance(others, list) and others and _are_answers(others):
        worse = [one for one in others if one != best]
        kept = ranked.at_most([best, *(worse or others)], answers)
        names = [chosen, *(rejected for _ in kept[1:])]
        pair = listed(row, prompt, kept, (0, *(1 for _ in kept[1:])), names)
        left = ("left_over",) if len(kept) <= len(worse) else ()
        again = ("said_again",) if 0 < len(worse) < len(others) else ()
        return pair._replace(notes=left + again)
    return forked(
        row, *(conversation.continued(prompt, row.get(name), name) for name in (chosen, rejected))
    )


def _are_answers(held: list) -> bool:
    """Whether it is a list of answers (texts or message lists); messages alone are one answer."""
    return any(all(isinstance(one, kind) for one in held) for kind in (str, list))


def are_conversations(held: object) -> bool:
    """Whether it is a list of answers that are messages."""
    one = lambda turns: isinstance(turns, list) and messages.are_messages(turns)
    return isinstance(held, list) and bool(held) and all(map(one, held))


def listed(
    row: Row, prompt: Turns, said: list[object], ranks: tuple[int, ...], names: list[str]
) -> Pair:
    """The pair or list of answers, from the best to the worst; `names` are of their columns."""
    named = zip(said, names, strict=True)
    pair = forked(row, *(conversation.continued(prompt, one, name) for one, name in named))
    if not pair.more:
        return pair
    return pair._replace(ranks=ranks, ratings=None)  # its rating columns are for two answers


def forked(row: Row, *conversations: Turns) -> Pair:
    """The pair in conversations whose common beginning is the prompt, and the rest the answers."""
    first, *others = _with_system_prompt(row, *conversations)
    if all(other == first for other in others):
        raise BadInput(EQUAL)
    shortest = min(map(len, (first, *others)))
    fork = 0
    while fork < shortest and all(other[fork] == first[fork] for other in others):
        fork += 1
    if fork == shortest:
        raise BadInput("one conversation is a prefix of the other")
    prompt, (chosen, rejected, *more) = first[:fork], [turns[fork:] for turns in (first, *others)]
    begun, prefill = prompt[-1] if prompt else None, ""
    if begun and all(conversation.goes_on(begun, one[0]) for one in (chosen, rejected, *more)):
        prompt, prefill = prompt[:-1], begun["content"]
    return Pair(prompt, chosen, rejected, *besides(row), _ratings(row), prefill, tuple(more))


def _with_system_prompt(row: Row, *conversations: Turns) -> list[Turns]:
    """The messages with the system prompt of its column; it may be in both places."""
    if not row.get("system_prompt"):
        return [*conversations]
    system = {"role": "system", "content": messages.text(row["system_prompt"], "system_prompt")}
    first = [turns[0] for turns in conversations]
    if all(turn == system for turn in first):
        return [*conversations]
    if "system" in (turn["role"] for turn in first):
        raise BadInput("one system prompt in its column and another among the messages")
    return [[system, *turns] for turns in conversations]


def instructed(row: Row) -> Turns:
    """The prompt as messages: `instruction`, with `input` on a line of its own, after `history`."""
    asked = messages.text(row.get("instruction"), "instruction")
    if row.get("input"):
        asked += "\n" + messages.text(row["input"], "input")
    return [*conversation.history(row.get("history")), {"role": "user", "content": asked}]


def single(row: Row, prompt: Turns, turns: Turns, name: str) -> Pair:
    """A conversation that ends with an answer; without a prompt, all before the first answer."""
    if turns[-1]["role"] != "assistant":
        raise BadInput(f"the last message in `{name}` is not the assistant's: there is no answer")
    begins = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    ends = range(len(prompt), len(turns)) if prompt else ()  # a system message may come before it
    begins = next((n for n in ends if turns[n - len(prompt) : n] == prompt), begins)
    answer, before = turns[begins:], len(turns) - begins
    (turns,) = _with_system_prompt(row, turns)
    prompt = turns[: len(turns) - before]
    if prompt and conversation.goes_on(prompt[-1], answer[0]):
        begun = prompt[-1]["content"]
        return Pair(prompt[:-1], answer, None, *besides(row), label(row), prefill=begun)
    return Pair(prompt, answer, None, *besides(row), label(row))


def plain(row: Row, prompt: str, chosen: str, rejected: str) -> Pair:
    """A pair of answers to a prompt, all three plain texts."""
    if chosen == rejected:
        raise BadInput(EQUAL)
    refuse_beside_plain(row)
    return Pair(prompt, chosen, rejected, *besides(row), _ratings(row))


def refuse_beside_plain(row: Row) -> None:
    """Refuses, in rows of plain text, columns that only a chat template could use."""
    for name in BESIDES:
        if row.get(name):
            raise BadInput(f"plain text cannot contain `{name}`")


def besides(row: Row) -> tuple[list | None, dict[str, object]]:
    """The tools and template settings that a row may have in any layout."""
    tools = _parsed(row.get("tools"), "tools") or None
    if isinstance(tools, list):  # each may be written as text, so that all have one type
        written = lambda tool: isinstance(tool, str) and tool.lstrip().startswith("{")
        tools = [_parsed(tool, "tools") if written(tool) else tool for tool in tools]
    kwargs = _parsed(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    listed = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not listed:
        raise BadInput("`tools` is not a list of tool descriptions")
    if not isinstance(kwargs, dict):
        raise BadInput("`chat_template_kwargs` is not an object")
    if taken := sorted(name for name in kwargs if name in TAKEN or name.endswith("_token")):
        raise BadInput(f"`chat_template_kwargs` may not set `{taken[0][:40]}`")
    for name, value in (("tools", tools), ("chat_template_kwargs", kwargs)):
        if value:
            messages.check_data(value, name)
    return tools, kwargs


def _ratings(row: Row) -> tuple[float, float] | None:
    """The ratings of both answers, NaN if one is not a number; None if the row has none."""
    chosen, rejected = (row.get(name) for name in RATINGS)
    return None if chosen is rejected is None else (_number(chosen), _number(rejected))


def label(row: Row) -> tuple[float] | None:
    """1 if the answer is wanted, 0 if it is not, NaN if the value is not a label."""
    said = row.get("label")
    if said is None:
        return None
    known = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
    return (known.get(str(said).strip().lower(), math.nan),)


def _number(value: Any) -> float:
    try:
        return float(value)  # also of text: cells of CSV are
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _parsed(value: object, name: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        found = messages.parsed(value)  # as pandas writes it
        if found is value:
            raise BadInput(f"`{name}` is not valid JSON") from error
        return found


def transcript(value: object, name: str) -> Turns:
    """The turns of a transcript, which must begin with the name of a speaker."""
    said = transcripts.turns(messages.text(value, name))
    if not said:
        raise BadInput(f"`{name}` is not a transcript that begins with Human: or Assistant:")
    if odd := conversation.odd(said):
        raise BadInput(f"roles out of order: {odd}")
    return said


def worth(row: Row, named: Mapping[str, str]) -> Worth:
    """The weight and margin of a pair in a row; `named` maps our column names to the dataset's.

    Raises:
      ValueError: one of them is not a number, or the weight is below 0.
    """
    found = {}
    for name in columns.WORTH:
        if name in named:
            found[name] = _number(row.get(named[name]))
            if not math.isfinite(found[name]):
                raise BadInput(f"no number in `{named[name]}`, the {name} of the pair")
    if found.get("weight", 0.0) < 0:
        raise BadInput(f"a negative number in `{named['weight']}`, the weight of the pair")
    return Worth(**found)


def check_label(row: Row, pair: Pair, *, labelled: bool, named: bool) -> None:
    """Refuses an answer without a label if the loss needs labels, and an unwanted one if not.

    A number in a column that was not `named` as the label may be the class of something else.

    Raises:
      ValueError: it is one of these.
    """
    if not labelled:
        said = str(row.get("label")).strip().lower()  # cells of CSV are text
        if pair.ratings == (0.0,) and (named or said == "false"):
            raise BadInput(UNWANTED)
    elif pair.ratings is None:
        raise BadInput(
            f"no `label`, which says whether the answer is wanted; if it has another name: "
            f"{columns.flag({'label': 'liked'})}"
        )
    elif math.isnan(pair.ratings[0]):
        raise BadInput("`label` is neither true nor false")

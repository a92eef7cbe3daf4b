"""Reads prompts from any source, rows of prompts, conversations or pairs, as messages and ids."""

import contextlib
import itertools
from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.chats import columns, layouts, messages
from recipes.data.chats.messages import Turns
from recipes.data.chats.pair import Pair
from recipes.data.rows import sources
from zoo.text.chat_tokenizer import ChatTokenizer

HOLDING = ("messages", "conversations", "prompt")
REMEDY = "put it into `prompt`, `system_prompt` or `tools`, or leave the column out"


class Prompt(NamedTuple):
    """A prompt that a model is to answer."""

    row: int  # its number in the source
    turns: Turns
    tools: list | None
    template_kwargs: dict[str, object]  # the row's settings for the chat template
    ids: tuple[int, ...]  # as the chat template writes them before an answer


class Read(NamedTuple):
    """The prompts of a source, and why some rows have none."""

    prompts: list[Prompt]
    left_out: dict[int, str]


def read(source: str, tokenizer: ChatTokenizer, most: int | None) -> Read:
    """The distinct prompts of a source, each of at most `most` tokens (None: of any number).

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: none of its rows holds a prompt, or the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise BadInput(
            f"the tokenizer in {tokenizer.source} has no chat template for prompts: use a model "
            "that was trained for conversations"
        )
    prompts, left_out, rows = [], {}, {}
    for number, row in enumerate(sources.read(source)):
        try:
            if row.fields is None:
                raise BadInput(row.reason)
            turns, tools, given = asked(row.fields)
            ids = tuple(tokenizer.chat(turns, tools=tools, add_generation_prompt=True, **given))
            if most is not None and len(ids) > most:
                raise BadInput(
                    f"a prompt of {len(ids)} tokens leaves no room for an answer, which needs "
                    f"at most {most}"
                )
            if ids in rows:
                raise BadInput(f"the same prompt as row {rows[ids]}")
        except ValueError as error:
            left_out[number] = str(error)
            continue
        rows[ids] = number
        prompts.append(Prompt(number, turns, tools, given, ids))
    if not prompts:
        why = f": row 0: {left_out[0]}" if left_out else ""
        raise BadInput(f"--prompts={source} holds no prompt to answer{why}")
    return Read(prompts, left_out)


def asked(fields: dict[str, object]) -> tuple[Turns, list | None, dict[str, object]]:
    """The messages to be answered, the tools that go with them, and settings of the template.

    For a pair they are what both answers answer. An answer at the end of a conversation is left
    out.

    Raises:
      ValueError: there are none, or part of what is asked would not be read.
    """
    row, layout = columns.renamed(fields, {}), None
    with contextlib.suppress(BadInput):
        layout = columns.recognised(row)
    try:
        pair = layouts.read(layout, row) if layout else _unanswered(row)
    except BadInput as error:  # the prompt is sound even if the answers are empty
        if layout is None or str(error) not in layouts.SAYS_NOTHING:
            raise
        pair = _unanswered(row)
    unread = (
        columns.unheard(row, pair.asked),
        columns.unread_tools(row),
        columns.unread_media(row),
    )
    for name in itertools.chain(*unread):
        raise BadInput(f"`{name}` looks like part of the prompt but is not read: {REMEDY}")
    turns = _question(pair.prompt if isinstance(pair.prompt, list) else [])
    return turns, pair.tools, pair.template_kwargs


def _unanswered(row: dict[str, object]) -> Pair:
    """A row with only a prompt, as if something had answered it."""
    row = columns.renamed(row, {}, single=True)
    if row.get("instruction") is not None:
        return layouts.read("instruction_answer", row | {"answer": "."})
    name = next((one for one in HOLDING if row.get(one) is not None), None)
    if name is None:
        held = ", ".join(sorted(row)) or "it has none"
        raise BadInput(f"no prompt in any of its columns: {held}")
    turns = _question(messages.read(row[name], name, role="user"))
    return layouts.read("prompt_answer", row | {"prompt": turns, "answer": "."})


def _question(turns: Turns) -> Turns:
    """The turns up to the last one that is not the assistant's."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] != "assistant"), default=-1)
    if all(turn["role"] == "system" for turn in turns[: last + 1]):
        raise BadInput("it asks nothing")
    return turns[: last + 1]

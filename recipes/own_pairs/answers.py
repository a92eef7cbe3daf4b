"""Samples several answers to each prompt from a model, a batch of prompts at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from checkpoints_io import places
from recipes import terminal
from recipes.own_pairs import kept
from recipes.own_pairs.prompts import Prompt
import zoo
from zoo.sampling import Sampling
from zoo.text.chat_tokenizer import ChatTokenizer
from zoo.text.tokenizer import said

FILE = "answers.jsonl"
ROOM = 2**16  # tokens in all rows that are generated at a time
ROWS = 256  # the most rows that are generated at a time


class Drawing(NamedTuple):
    """How the answers to a prompt are sampled."""

    answers: int  # per prompt
    most: int  # tokens of an answer
    sampling: Sampling
    seed: int


def batches(prompts: Sequence[Prompt], how: Drawing) -> list[list[Prompt]]:
    """Prompts that are answered together: they fit the same programs, and follow in their order."""
    by_room: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_room.setdefault(zoo.generate.room_for(len(prompt.ids) + how.most), []).append(prompt)
    found = []
    for room, some in sorted(by_room.items()):
        count = max(1, min(ROOM // room, ROWS) // how.answers)
        found += [some[i : i + count] for i in range(0, len(some), count)]
    return found


def missing(
    directory: places.Place, every: Sequence[list[Prompt]]
) -> tuple[list[kept.Line], Sequence[list[Prompt]]]:
    """The lines of the batches that have been answered, and the batches that have not."""
    lines, done, count = kept.lines(directory, FILE), 0, 0
    while done < len(every) and count + len(every[done]) <= len(lines):
        count += len(every[done])
        done += 1
    return lines[:count], every[done:]


def draw(
    model: zoo.Model,
    tokenizer: ChatTokenizer,
    directory: places.Place,
    every: Sequence[list[Prompt]],
    how: Drawing,
) -> None:
    """Answers the batches that have none; a batch has the same answers whenever it is drawn.

    A line of the file has `row`, `prompt` (messages), `tools` and `chat_template_kwargs`, and for
    each answer its text, its token ids, and whether it ended (with a stop token, which is not in
    the text).
    """
    lines, left = missing(directory, every)
    with kept.adding(directory, FILE, lines) as add:
        for batch in terminal.bar(left, initial=len(every) - len(left), total=len(every)):
            rows = [prompt.ids for prompt in batch for _ in range(how.answers)]
            seed = np.random.SeedSequence([how.seed, batch[0].row]).generate_state(1)[0]
            texts = zoo.generate.generate(
                model, rows, max_new_tokens=how.most, stop_ids=tokenizer.stop_ids,
                sampling=how.sampling, seed=int(seed),
            )  # fmt: skip
            of = [texts[i : i + how.answers] for i in range(0, len(texts), how.answers)]
            add([_line(prompt, some, tokenizer) for prompt, some in zip(batch, of, strict=True)])


def _line(prompt: Prompt, answers: Sequence[list[int]], tokenizer: ChatTokenizer) -> kept.Line:
    return {
        "row": prompt.row,
        "prompt": prompt.turns,
        "tools": prompt.tools,
        "chat_template_kwargs": prompt.template_kwargs,
        "answers": [said(tokenizer.own, prompt.ids, ids) for ids in answers],
        "tokens": answers,
        "finished": [bool(ids) and ids[-1] in tokenizer.stop_ids for ids in answers],
    }

"""Beside every answer an answer to another prompt, from which KTO knows its reference point.

Both stand behind the prompt like the answers of a pair, so that the prompt is computed once.
"""

from collections.abc import Sequence
import math

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.ids.pair_ids import Answer, AnswerIds, LabelledIds


def beside(answers: Sequence[AnswerIds], keys: Sequence[int], max_length: int) -> list[LabelledIds]:
    """Each with the nearest answer before it that is to another prompt; the first with the last.

    `keys` are equal where prompts are. The other answer is cut at `max_length` with the prompt.

    Raises:
      ValueError: all prompts are the same.
    """
    found = []
    for one, at in zip(answers, _others(keys), strict=True):
        assert one.ratings is not None
        other = _fitted(answers[at].answers[0], max_length - len(one.prompt))
        ratings = *one.ratings, math.nan
        found.append(LabelledIds(one.row, one.prompt, (one.answers[0], other), ratings, one.notes))
    return found


def _others(keys: Sequence[int]) -> list[int]:
    """For each the last place before it, round the end, with another key."""
    found: list[int | None] = [None] * len(keys)
    for i in [*range(len(keys))] * 2:  # the first of them knows the last in the second round
        found[i] = i - 1 if keys[i - 1] != keys[i] else found[i - 1]
    if None in found:
        raise BadInput(
            "--config.loss=kto compares answers with answers to other prompts, and all rows have "
            "the same prompt"
        )
    return [i for i in found if i is not None]


def _fitted(answer: Answer, room: int) -> Answer:
    """Its beginning, which ends with a scored token; all of it is scored where nothing else is."""
    ids, scored = answer.ids[:room], answer.scored[:room]
    if not scored.any():
        return Answer(ids, np.ones(len(ids), bool))
    stop = int(np.flatnonzero(scored)[-1]) + 1
    return Answer(ids[:stop], scored[:stop])

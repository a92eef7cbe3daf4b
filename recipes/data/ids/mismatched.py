"""Adds to every answer an answer to another prompt, from which KTO estimates its reference point.

Both follow the prompt like the answers of a pair, so that the prompt is computed once.
"""

from collections.abc import Sequence
import math

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.ids.examples import Answer, AnswerIds, LabelledIds


def beside(answers: Sequence[AnswerIds], max_length: int) -> list[LabelledIds]:
    """Each example with an answer to another prompt, chosen by `partners`.

    Raises:
      ValueError: all prompts are the same.
    """
    prompts = [one.prompt.tobytes() for one in answers]
    found = partners(prompts)
    return [joined(one, answers[at], max_length) for one, at in zip(answers, found, strict=True)]


def joined(one: AnswerIds, other: AnswerIds, max_length: int) -> LabelledIds:
    """One answer with the other, which is cut so that with the prompt it fits `max_length`."""
    assert one.ratings is not None
    fitted = _fitted(other.answers[0], max_length - len(one.prompt))
    ratings = *one.ratings, math.nan
    return LabelledIds(one.row, one.prompt, (one.answers[0], fitted), ratings, one.notes)


def partners(prompts: Sequence[bytes]) -> list[int]:
    """For each prompt the index of a different one: the nearest before it in a shuffled order.

    Files are often sorted by prompt or by label, so that neighbours are alike. The order is fixed.

    Raises:
      ValueError: all prompts are the same.
    """
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    found: dict[int, int] = {}
    for i in [*range(len(order))] * 2:  # in the second round the last precedes the first
        own, before = order[i], order[i - 1]
        if prompts[before] != prompts[own]:
            found[own] = before
        elif before in found:
            found[own] = found[before]
    if len(found) < len(prompts):
        raise BadInput(
            "--config.loss=kto compares answers with answers to other prompts, but all rows have "
            "the same prompt: add rows with other prompts, or choose another loss"
        )
    return [found[i] for i in range(len(prompts))]


def _fitted(answer: Answer, room: int) -> Answer:
    """The beginning of an answer, up to a scored token; if it has none, all of it is scored."""
    ids, scored = answer.ids[:room], answer.scored[:room]
    if not scored.any():
        return Answer(ids, np.ones(len(ids), bool))
    stop = int(np.flatnonzero(scored)[-1]) + 1
    return Answer(ids[:stop], scored[:stop])

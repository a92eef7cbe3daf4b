"""Orders answers that were scored, ranked or compared, from the best to the worst."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple, TypeVar

from checkpoints_io.errors import BadInput
from recipes.data.chats import messages

Row = dict[str, object]
One = TypeVar("One")

ASKED = ("context", "instruction", "prompt", "question")  # names for the question
ANSWERS = ("completions", "answers", "responses", "generations")  # names for the list of answers
SAID = ("response", "answer", "completion", "content", "text", "messages")  # an entry's text
SCORES = ("overall_score", "score", "rating")  # names for an entry's score; higher is better
RANK = "rank"  # name for an entry's rank; 1 or 0 is the best
# Columns with a list of scores or ranks, one for each answer.
LISTS = {"scores": "score", "ratings": "rating", "rewards": "score", "ranks": RANK}
TIE = "no answer is ranked above another"
NO_PREFERENCE = "neither response is preferred"


class Ranked(NamedTuple):
    """Answers to one question, from the best to the worst."""

    name: str  # of their column
    answers: list[object]
    ranks: tuple[int, ...]  # of each answer: 0 the best, equal if ranked alike
    scores: tuple[float, ...] | None
    notes: tuple[str, ...]  # as in a `Pair`


def best_to_worst(row: Row, most: int) -> Ranked:
    """At most `most` of the answers in a row; two are the first best one and the last worst one.

    Rows are as in UltraFeedback (`overall_score`), Nectar and NeMo RL (`rank`).

    Raises:
      ValueError: there is no list of two or more ranked answers, or all are ranked alike.
    """
    name = next((name for name in ANSWERS if row.get(name) is not None), ANSWERS[0])
    answers = _listed(row, name)
    marks = {key: [_number(answer.get(key)) for answer in answers] for key in (*SCORES, RANK)}
    by = next((key for key, numbers in marks.items() if any(n is not None for n in numbers)), RANK)
    sign = 1 if by == RANK else -1
    scored = [(sign * n, a) for n, a in zip(marks[by], answers, strict=True) if n is not None]
    if len(scored) < 2:
        known = ", ".join(f"`{key}`" for key in (*SCORES, RANK))
        beside = ", ".join(f"`{key}`" for key in LISTS)
        raise BadInput(
            f"fewer than two answers in `{name}` have a score or rank: each in its {known}, or all "
            f"in a list beside them, {beside}"
        )
    scored.sort(key=lambda both: both[0])
    if scored[0][0] == scored[-1][0]:
        raise BadInput(TIE)
    different = sorted({mark for mark, _ in scored})
    kept = at_most(scored, most)
    said = {"unranked": len(scored) < len(answers), "tied": len(different) < len(scored)}
    return Ranked(
        name,
        [_said(answer, name) for _, answer in kept],
        tuple(different.index(mark) for mark, _ in kept),
        None if by == RANK else tuple(-mark for mark, _ in kept),
        tuple(note for note, holds in said.items() if holds),
    )


def at_most(ranked: Sequence[One], most: int) -> list[One]:
    """The first, the last and those between, chosen evenly if there are more than `most`."""
    n = len(ranked)
    if n <= most:
        return list(ranked)
    return [ranked[(2 * i * (n - 1) + most - 1) // (2 * (most - 1))] for i in range(most)]


def preferred(row: Row) -> tuple[str, str]:
    """The names of the better and of the worse response; the first is better below 0.

    Rows are as in HelpSteer3: `response1`, `response2`, `overall_preference`.

    Raises:
      ValueError: the preference is not a number or is 0, or a response is missing.
    """
    preference = _number(row.get("overall_preference"))
    if preference is None:
        raise BadInput("no number in `overall_preference`")
    if preference == 0:
        raise BadInput(NO_PREFERENCE)
    for name in ("response1", "response2"):
        if row.get(name) is None:
            raise BadInput(f"no response in `{name}`")
    return ("response1", "response2") if preference < 0 else ("response2", "response1")


def _listed(row: Row, name: str) -> list[Row]:
    """The answers as objects, each with its values from the columns beside the list."""
    answers = messages.parsed(row.get(name))
    if isinstance(answers, dict) and all(isinstance(one, list) for one in answers.values()):
        answers = [
            dict(zip(answers, one, strict=False)) for one in zip(*answers.values(), strict=False)
        ]
    for other, key in LISTS.items():
        marks = messages.parsed(row.get(other))
        if isinstance(answers, list) and isinstance(marks, list) and len(marks) == len(answers):
            both = zip(answers, marks, strict=True)
            return [{"response": answer, key: mark} for answer, mark in both]
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        raise BadInput(f"no list of ranked answers in `{name}`")
    return answers


def _said(answer: Row, name: str) -> object:
    for key in SAID:
        if answer.get(key) is not None:
            return answer[key]
    known = ", ".join(f"`{key}`" for key in SAID)
    raise BadInput(f"an answer in `{name}` is empty: its text must be in {known}")


def _number(value: Any) -> float | None:
    """A finite number, or the text of one: cells of CSV are text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None

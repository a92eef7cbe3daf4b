"""Makes pairs of answers and their scores: for each prompt the best answer and the worst."""

import collections
from collections.abc import Mapping
import re

from checkpoints_io import places
from recipes.own_pairs import answers, judges, kept

FILE, LEFT_OUT = "pairs.jsonl", "left_out.jsonl"
# Why a prompt has no pair.
TOO_FEW = "fewer than two distinct answers were finished"
TOO_FEW_JUDGED = "the judge scored fewer than two answers"
ALIKE = "all answers have the same score"


def write(directory: places.Place, left_out: Mapping[int, str]) -> str:
    """Writes the pairs, and why rows of the prompts have none; returns a summary of both.

    A pair has `prompt`, `chosen`, `rejected` (messages), both scores, `tools` and
    `chat_template_kwargs` if there are any, and `row`. `left_out` are the rows without a prompt.
    """
    pairs, without = [], [{"row": row, "reason": why} for row, why in left_out.items()]
    both = (kept.lines(directory, name) for name in (answers.FILE, judges.FILE))
    for line, judged in zip(*both, strict=True):
        pair = pair_of(line, judged["scores"])
        if isinstance(pair, str):
            without.append({"row": line["row"], "reason": pair})
        else:
            pairs.append(pair)
    of_row = lambda line: line["row"]
    for name, some in ((FILE, pairs), (LEFT_OUT, without)):
        directory.write_whole(name, kept.written(sorted(some, key=of_row)))
    return _told(directory, len(pairs), [line["reason"] for line in without])


def pair_of(line: kept.Line, scores: list[float | None]) -> kept.Line | str:
    """The pair of a prompt, or why it has none; of equal scores the first answer is taken."""
    judged = [(i, score) for i, score in enumerate(scores) if score is not None]
    if len(judged) < 2:
        return TOO_FEW_JUDGED if len(judges.usable(line)) > 1 else TOO_FEW
    best = max(judged, key=lambda both: both[1])
    worst = min(judged, key=lambda both: both[1])
    if best[1] == worst[1]:
        return ALIKE
    said = lambda i: [{"role": "assistant", "content": line["answers"][i]}]
    return {
        "prompt": line["prompt"],
        "chosen": said(best[0]),
        "rejected": said(worst[0]),
        "score_chosen": best[1],
        "score_rejected": worst[1],
        **({"tools": line["tools"]} if line["tools"] else {}),
        **({"chat_template_kwargs": kept.given(line)} if kept.given(line) else {}),
        "row": line["row"],
    }


def _told(directory: places.Place, count: int, reasons: list[str]) -> str:
    lines = [f"{count} pairs, one per line, in {directory}/{FILE}"]
    if reasons:
        lines.append(
            f"{len(reasons)} rows gave no pair; the reasons, one per line, in "
            f"{directory}/{LEFT_OUT}:"
        )
    kinds = collections.Counter(re.sub(r"\d+", "…", why) for why in reasons)
    return "\n".join([*lines, *(f"  {n:>6}  {why}" for why, n in kinds.most_common())])

"""A judge of answers to the embedded prompts, by rules alone: `--judge=recipes.tiny.judge:manner`.

The wanted manner is that of make_pairs.py: what the prompt asks for, or else courtesy and doubt.
"""

from collections.abc import Sequence

KIND = ("glad to help", "Of course", "I am sorry", "cannot know", "only be guessing", "nice day")
UNKIND = ("Everybody knows", "waste my time", "completely sure", "I do not care", "look yourself")


def manner(prompt: Sequence[dict[str, str]], answers: Sequence[str]) -> list[float]:
    """A score of each answer: how much of it is in the manner that the prompt wants."""
    asked = prompt[-1]["content"]
    return [_score(asked, answer) for answer in answers]


def _score(asked: str, answer: str) -> float:
    lines = answer.strip().splitlines()
    listed = sum(line.startswith("- ") for line in lines)
    if asked.endswith("one on each line."):
        return float(listed)
    if asked.endswith("in one sentence."):
        return float(len(lines) == 1 and answer.strip().endswith(".")) - listed
    if asked.endswith("Be brief."):
        return -float(len(answer.split()))
    if asked.endswith("Tell me more."):
        return float(len(answer.split()))
    return float(sum(word in answer for word in KIND) - sum(word in answer for word in UNKIND))

"""Whole texts: where two of them differ, and the turns of one that names its speakers."""

import re
import unicodedata

from recipes.data.chats.messages import Turns

JOINERS = "'’._,-"  # part of a word or number if between letters or digits


def shared(one: str, other: str) -> int:
    """The length of the common prefix, up to a word's end, without the white space after it."""
    end = 0
    while end < min(len(one), len(other)) and one[end] == other[end]:
        end += 1
    while end and any(_inside_a_word(whole, end) for whole in (one, other)):
        end -= 1
    return len(one[:end].rstrip())


def turns(said: str) -> Turns:
    r"""The turns of a text with `\n\nHuman:` and `\n\nAssistant:`; none if it has another form.

    If these give no answer, a single line break may stand in for the empty line.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", said.lstrip())
    if len(parts) == 3:
        parts = re.split(r"(?:^|\n)(Human|Assistant):", said.lstrip())
    if parts[0].strip() or len(parts) < 3:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    both = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in both]


def _inside_a_word(whole: str, i: int) -> bool:
    """Whether the characters before and at `i` are in one word; an ideograph is its own word."""
    if i >= len(whole):
        return False
    left, right = whole[i - 1], whole[i]
    if unicodedata.category(right) in ("Mn", "Mc", "Me", "Cf"):
        return True  # accents, variants, joiners
    if left == "\u200d" or "\U0001f3fb" <= right <= "\U0001f3ff":  # families; skin tones
        return True
    if all("\U0001f1e6" <= half <= "\U0001f1ff" for half in (left, right)):  # flags
        return True
    if right in JOINERS:
        right = whole[i + 1 : i + 2]
    elif left in JOINERS:
        left = whole[max(i - 2, 0) : i - 1]
    both = left.isalnum() and right.isalnum()
    return both and not ("\u2e80" <= left <= "\u9fff" or "\u2e80" <= right <= "\u9fff")

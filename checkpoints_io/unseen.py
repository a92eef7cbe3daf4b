"""Untrusted text made safe to show: characters that act on a terminal or page become names."""

import re

# What would control a terminal or a page, or be invisible there; not line breaks and tabs.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def visible(said: str) -> str:
    """The text with control and invisible characters replaced by their names."""
    name = lambda code: chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩"
    return UNSEEN.sub(lambda found: name(ord(found[0])), said)

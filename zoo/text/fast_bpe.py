"""Byte-level BPE with a cache of words: the ids of `tokenizers`, several times as fast.

GPT-2's kind of tokenizer splits a text into words by a pattern and merges the bytes of each word
separately. The ids of words seen before are looked up. Words are split by `regex`, as in OpenAI's
encoder.py; each new word's bytes are merged by `tokenizers`.
"""

from collections.abc import Callable, Iterable
import json
import re
from typing import Any
import unicodedata

import regex
import tokenizers
from tokenizers.pre_tokenizers import Split

# OpenAI's gpt-2/src/encoder.py; what a ByteLevel pre-tokenizer means by `use_regex`.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Meta's llama3/tokenizer.py, and tokenization_qwen.py of Qwen 1.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
MOST, LONG = 2**18, 64  # cached words, and characters of one
# Other patterns are untrusted: `tokenizers` stops runaway backtracking, `regex` would not.
SECONDS = 3.0  # of CPU time, as `regex` counts it, for one text


def encoder(own: tokenizers.Tokenizer) -> Callable[[str], list[int] | None] | None:
    """A function from text to ids (None for an unsupported text); None for such a tokenizer."""
    pattern = _pattern(own) if _merges_bytes(own) else None
    if pattern is None:
        return None
    composed = own.normalizer is not None
    seconds = None if pattern.pattern in (GPT2, LLAMA, QWEN) else SECONDS  # a timeout costs time
    added = own.get_added_tokens_decoder().items()
    special: dict[str, list[int]] = {token.content: [i] for i, token in added}
    between = any_of(special)
    model, spelled = own.model, str.maketrans(bytes_as_text())
    known: dict[str, list[int]] = {}  # words
    short: dict[str, list[int]] = {}  # what stands between special tokens: most is the template's
    alike = _alike(pattern.pattern)

    def merged(word: str) -> list[int]:
        if len(known) >= MOST:
            known.clear()
        spelling = word.encode().decode("latin-1").translate(spelled)
        found = [token.id for token in model.tokenize(spelling)]
        if len(word) <= LONG:
            known[word] = found
        return found

    def cut(part: str) -> list[int] | None:
        """The ids of words between special tokens."""
        nonlocal pattern
        assert pattern is not None
        try:
            words = pattern.findall(part, timeout=seconds)
        except TimeoutError:
            pattern = None  # nor for the texts to come
            return None
        if sum(map(len, words)) != len(part):
            return None
        ids = []
        for word in words:
            ids += known.get(word) or merged(word)
        if len(part) <= LONG:
            if len(short) >= MOST:
                short.clear()
            short[part] = ids
        return ids

    def encode(text: str) -> list[int] | None:
        if pattern is None or not (text.isascii() or alike(text)):
            return None
        if composed and not unicodedata.is_normalized("NFC", text):
            return None
        ids: list[int] = []
        for i, part in enumerate(between.split(text)):
            if i % 2:
                ids += special[part]
                continue
            found = short.get(part)
            if found is None and (found := cut(part)) is None:
                return None
            ids += found
        return ids

    return encode


def _alike(pattern: str) -> Callable[[str], bool]:
    """Tests whether `tokenizers` and `regex` classify all of a text alike, for a pattern's classes.

    Its characters must also be known to Python, which says whether they are composed, and whole.
    """
    met: set[str] = set()  # characters that have passed
    classes = sorted(set(re.findall(r"\\[swdSWD]|\\[pP]\{\^?\w+\}", pattern)))
    both = [
        (regex.compile(one), Split(tokenizers.Regex(one), "removed", invert=True))
        for one in classes
    ]

    def passes(characters: str) -> bool:
        return all(unicodedata.category(one) not in ("Cn", "Cs") for one in characters) and all(
            "".join(ours.findall(characters))
            == "".join(word for word, _ in theirs.pre_tokenize_str(characters))
            for ours, theirs in both
        )

    def alike(text: str) -> bool:
        if met.issuperset(text):
            return True
        unmet = set(text) - met
        if not passes("".join(unmet)):
            return False
        met.update(unmet)
        return True

    return alike


def _settings(part: Any) -> dict[str, Any]:
    """The settings of one part of a tokenizer, as in its file, which has megabytes of words."""
    return {} if part is None else json.loads(part.__getstate__())


def _merges_bytes(own: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer does nothing to a text but merge the bytes of its words."""
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    plain = isinstance(own.model, tokenizers.models.BPE) and not any(
        getattr(own.model, name) for name in (*unusual, "byte_fallback")
    )
    strips = any(
        token.normalized or token.lstrip or token.rstrip or token.single_word
        for token in own.get_added_tokens_decoder().values()
    )
    normal = _settings(own.normalizer) in ({}, {"type": "NFC"})
    return plain and normal and not strips and _leaves_ids(_settings(own.post_processor))


def _pattern(own: tokenizers.Tokenizer) -> regex.Pattern | None:
    """The pattern by which a tokenizer of bytes cuts words; None if it has steps of other kinds."""
    steps = _settings(own.pre_tokenizer)
    steps = steps.get("pretokenizers", [steps])
    last = {"type": "ByteLevel", "add_prefix_space": False}
    if not steps[-1].items() >= last.items():
        return None
    if len(steps) == 1 and steps[0]["use_regex"]:
        return regex.compile(GPT2)
    cut = steps[0]
    how = (cut.get("type"), cut.get("behavior"), cut.get("invert"))
    all_of_it = how in (("Split", "Isolated", False), ("Split", "Removed", True))
    if len(steps) != 2 or steps[1]["use_regex"] or not all_of_it or "Regex" not in cut["pattern"]:
        return None
    try:
        return regex.compile(cut["pattern"]["Regex"])
    except regex.error:
        return None


def _leaves_ids(step: dict[str, Any]) -> bool:
    """Whether a post-processor leaves a text's ids unchanged without special tokens."""
    if "processors" in step:
        return all(_leaves_ids(one) for one in step["processors"])
    pieces = step.get("single", [{"Sequence": {}}])
    return sum("Sequence" in piece for piece in pieces) == 1


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these texts, the longest that matches, as a group."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def bytes_as_text() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself, or the next character from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}

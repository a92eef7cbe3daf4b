"""Word by word a text has the ids that `tokenizers` gives it, whatever its characters."""

import itertools
import json

from hypothesis import given, settings, strategies
import pytest
import tokenizers

from tests.conftest import TINY
from zoo.text import byte_files, fast_bpe


def tiny(**other):
    """The tiny model's tokenizer, with something else in its file."""
    told = json.loads((TINY / "model" / "tokenizer.json").read_text())
    return tokenizers.Tokenizer.from_str(json.dumps(told | other))


def of_others(shared):
    folder = shared / "data" / "tokenizers"
    read = tokenizers.Tokenizer.from_file
    yield byte_files.gpt2(folder / "gpt2")
    yield from (read(str(folder / name / "tokenizer.json")) for name in ("qwen3-hf", "olmo2"))


def agree(own, texts):
    """Where ours gives ids at all, which it does for nearly all texts."""
    encode, skipped = fast_bpe.encoder(own), 0
    for text in texts:
        ids = encode(text)
        skipped += ids is None
        if ids is not None:
            assert ids == own.encode(text, add_special_tokens=False).ids, ascii(text)
    return skipped


def around(step):
    """Every character, or some of them: within a word, alone, twice, at a line's end, quoted."""
    codes = itertools.chain(range(0x3000), range(0x3000, 0x110000, step))
    for c in (chr(code) for code in codes if not 0xD800 <= code < 0xE000):
        yield f"a{c}b {c} 1{c}{c}\n{c}'{c}"


def test_some_of_all_characters():
    assert agree(tiny(), around(997)) == 0


@pytest.mark.full
def test_every_character_of_every_tokenizer(shared):
    for own in (tiny(), *of_others(shared)):
        # Qwen's are composed first: what is not composed yet is left to `tokenizers`.
        assert agree(own, around(1)) < 2000


@settings(max_examples=200, deadline=None)
@given(strategies.text(strategies.characters(codec="utf-8")))
def test_any_text(text):
    assert agree(tiny(), [text]) == 0


def test_special_tokens_are_met_everywhere_the_longest_first():
    own = tiny()
    own.add_tokens([tokenizers.AddedToken("<|eot_id|>more", normalized=False)])
    texts = ["<|eot_id|>", "a<|eot_id|>more<|eot_id|>b", "<|eot_id|", "<|eot_id|><|eot_id|>mor"]
    assert agree(own, texts) == 0


def test_what_a_tokenizer_composes_first_is_left_to_it():
    texts = ["e\u0301", "\u00e9", "a\u0308 b", "plain"]
    assert agree(tiny(normalizer={"type": "NFC"}), texts) == 2


def test_words_that_were_forgotten_are_merged_again(monkeypatch):
    monkeypatch.setattr(fast_bpe, "MOST", 3)
    assert agree(tiny(), ["one two three four five six one two three", "six one"]) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {
            "post_processor": {
                "type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {},
            }
        },
    ],
)  # fmt: skip
def test_what_does_more_than_merge_bytes_is_left_to_tokenizers(other):
    assert fast_bpe.encoder(tiny(**other)) is None


def test_tokens_that_swallow_spaces_are_left_to_tokenizers():
    own = tiny()
    own.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
    assert fast_bpe.encoder(own) is None


def test_a_pattern_that_tries_everything_is_given_up(monkeypatch):
    """What `regex` would think about for days is left to `tokenizers`, from then on."""
    cut = {"type": "Split", "pattern": {"Regex": r"(?:a|a)+[bc]|[\s\S]"}, "behavior": "Isolated",
           "invert": False}  # fmt: skip
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}  # fmt: skip
    own = tiny(pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, by_byte]})
    monkeypatch.setattr(fast_bpe, "SECONDS", 0.1)
    encode = fast_bpe.encoder(own)
    assert encode("aab") == own.encode("aab", add_special_tokens=False).ids
    assert encode("a" * 40) is None
    assert encode("aab") is None

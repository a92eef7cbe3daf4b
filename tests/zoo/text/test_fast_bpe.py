"""Word by word a text has the ids that `tokenizers` gives it, whatever its characters."""

import itertools
import json
import unicodedata

from hypothesis import given, settings, strategies
import pytest
import tokenizers

from tests.conftest import TINY
from tests.long_forms import full_but
from zoo.text import byte_files, fast_bpe, tokenizer_files


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


def is_new(text):
    """Has it characters that have no meaning in Python's Unicode? They are left to `tokenizers`."""
    return any(unicodedata.category(c) == "Cn" for c in text)


def test_some_of_all_characters():
    texts = [*around(997)]
    assert agree(tiny(), texts) == sum(map(is_new, texts))


def with_pattern(pattern):
    """A tokenizer of bytes, and of ":A", which is a token where a pattern leaves it one word."""
    letters = [*fast_bpe.bytes_as_text().values(), ":A"]
    model = tokenizers.models.BPE({one: i for i, one in enumerate(letters)}, [(":", "A")])
    own, steps = tokenizers.Tokenizer(model), tokenizers.pre_tokenizers
    own.pre_tokenizer = steps.Sequence([
        steps.Split(tokenizers.Regex(pattern), "isolated"),
        steps.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return own


def test_a_character_is_not_a_letter_to_one_and_none_to_the_other():
    """Seal script is new in Unicode 18: letters to `regex`, and nothing to `tokenizers` yet."""
    own = with_pattern(fast_bpe.QWEN)
    colon, letter = (own.token_to_id(one) for one in ":A")
    for read in (own, tokenizer_files._fast(own)):
        ids = read.encode("\U0003d000:A")
        assert (ids.ids if read is own else ids[0])[-2:] == [colon, letter]
    ids, offsets = tokenizer_files._fast(own).encode("\U0003d000:A")
    assert offsets[len(ids) - 1] == (2, 3)
    assert own.encode("a:A").ids[-1] == own.token_to_id(":A")


@pytest.mark.parametrize("step", full_but([1, 97], 97))
@pytest.mark.parametrize("named", ["L", "Lo", "N", "M", "P"])
def test_words_are_cut_at_the_same_characters(named, step):
    """At some of all characters, and at one that went from one class of letters to another."""
    own = with_pattern(rf"\p{{{named}}}:?A?|[^\p{{{named}}}]+")
    codes = (0x295, *range(0x80, 0x110000, step))
    texts = [f"{chr(code)}:A" for code in codes if not 0xD800 <= code < 0xE000]
    assert agree(own, texts) < len(texts)


@pytest.mark.full
def test_every_character_of_every_tokenizer(shared):
    new = sum(map(is_new, around(1)))
    for own in (tiny(), *of_others(shared)):
        # Qwen's are composed first: what is not composed yet is left to `tokenizers`.
        assert agree(own, around(1)) < new + 2000


@settings(max_examples=200, deadline=None)
@given(strategies.text(strategies.characters(codec="utf-8")))
def test_any_text(text):
    assert agree(tiny(), [text]) == is_new(text)


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

"""Each tokenizer against its original, on texts as strange as people write them.

The originals: `sentencepiece` itself for SentencePiece models, and `tiktoken` for what merges
bytes. Where only a tokenizer.json is here, the original is built again from its vocabulary: ranks
are ids, and scores are minus ids, but for runs of spaces, as in Mistral's published model.

What transformers 5.24 reads differs from the originals, of the 622 texts of the default run, on

* mistral-v1, 263: it merges spaces in another order, puts no space before a text that begins with
  one nor behind a special token, and takes `<unk>` for a token;
* phi3, 90: the same, as it builds a Llama tokenizer of the file in place of what the file says;
* the small SentencePiece models, 600 to 615, and those of Gemma, 273 and 275: unknown characters
  vanish, and nothing of the models' normalisation is done;
* the small tiktoken file, 13: it knows none of the special tokens.

Ours agrees with the original on all. One difference is the file's own: Mistral v3's tokenizer.json
puts no space before a text that begins with one (56 of these), where SentencePiece always does. A
rendered chat begins with <s>, and there the two agree.
"""

import base64
import functools
import itertools
import json
import pathlib
import random
import re
import shutil
import unicodedata

from hypothesis import given, settings, strategies
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
import tokenizers

from tests.conftest import TINY
from zoo.text import byte_files, fast_bpe, tokenizer

tiktoken = pytest.importorskip("tiktoken")

GPT2_WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # OpenAI's gpt-2
)
SMALL = [
    "gemma3_test_vocab.spm", "gemma_test_vocab.spm", "llama_test_vocab.spm", "phi3_test_vocab.spm",
    "sentencepiece_test_1000.model", "torchtune_m_2000.model",
]  # fmt: skip
ODD = [
    "", " ", "  ", "\n", "\t", "\r\n", " \n ", "\x00", "\x07", "\x7f", "\x85", "\xa0", "\u3000",
    "\u200b", "\ufeff", "é", "e\u0301", "Å", "\u212b", "가", "\u1100\u1161", "ﬁ", "ſ", "ß", "İ",
    "Ａｂｃ", "①", "한국어", "中文。", "日本語カナ", "العربية", "हिन्दी", "ไทย", "Привет",
    "ελληνικά", "🤷🏽‍♀️", "👨‍👩‍👧", "🇩🇪", "❤️", "\U0010ffff", "\ue000", "▁", "Ġ", "Ċ",
    "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<start_of_turn>", "[INST]", "[/INST]",
    "[TOOL_CALLS]", "<|im_start|>",
    "<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|user|>\n", "<|end|>", "<|eot_id|>",
    "<|begin_of_text|>", "<0x0A>", "<| im_end |>", "< s>", "[INST", "<|im_", "don't", "I'LL", "'S",
    "1234567890", "3.14e-10", "0x1F", "1,000,000", "def f(x):\n    return x**2\n\n", "{'a': [1]}",
    "https://a.b/c?d=%20&e=1#f", "\\n\\t", "```py\n", "a" * 60, " " * 60, "\n" * 30, "ab" * 40,
    "!" * 50, "中" * 50, "🙂" * 20, "ha " * 30, *(f"x{' ' * n}y" for n in range(1, 36)),
]  # fmt: skip


def texts(shared, count, seed=0):
    """The odd ones, and so many of words that people wrote with odd ones between."""
    draw = random.Random(seed)
    folder = shared / "data" / "preference"
    names = ["llms-from-scratch/instruction-data-with-preference", "llama-factory/dpo_zh_demo"]
    said = [
        json.dumps(json.loads((folder / f"{name}.json").read_text("utf-8")), ensure_ascii=False)
        for name in [*names, "llama-factory/dpo_en_demo"]
    ]

    def some():
        whole = draw.choice(said)
        start = draw.randrange(len(whole))
        words = whole[start : start + draw.randrange(1, 60)]
        form = draw.choice(["NFC", "NFC", "NFC", "NFD"])
        part = draw.choice([unicodedata.normalize(form, words), words, draw.choice(ODD)])
        return part + draw.choice(["", "", "", " ", "\n", "\t"])

    made = ["".join(some() for _ in range(draw.randrange(1, 12))) for _ in range(count)]
    return [*ODD, *made]


def between(specials, text):
    """Ordinary text and special tokens, in turns."""
    if not specials:
        return [text]
    longest_first = sorted(map(re.escape, specials), key=len, reverse=True)
    return re.split(f"({'|'.join(longest_first)})", text)


def joined(lists):
    return [*itertools.chain.from_iterable(lists)]


def as_bytes(vocabulary, but=()):
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
    return {bytes(map(byte.__getitem__, t)): i for t, i in vocabulary.items() if t not in but}


def bytes_original(words, ranks, special):
    own = tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: own.encode(text, allowed_special="all")


def bytes_of_json(path, normal_form=None):
    file = json.loads(path.read_text("utf-8"))
    added = {token["content"]: token["id"] for token in file["added_tokens"]}
    words = file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    whole = bytes_original(words, as_bytes(file["model"]["vocab"], added), added)
    if normal_form is None:
        return whole
    normal = lambda text: text if text in added else unicodedata.normalize(normal_form, text)
    return lambda text: joined(whole(normal(part)) for part in between(added, text))


def pieces_of_model(path):
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    control = {own.id_to_piece(i): i for i in range(own.get_piece_size()) if own.is_control(i)}

    def encode(text):
        parts = between(control, text)
        return joined([control[p]] if p in control else own.encode(p) for p in parts)

    return encode


def pieces_of_json(path, *, space_first_only):
    """The model that a tokenizer.json was made of; `space_first_only`: as Mistral v3's says."""
    file = json.loads(path.read_text("utf-8"))
    added = {token["content"]: token for token in file["added_tokens"]}
    own = {}
    for space in (True, False):
        model = sentencepiece_model_pb2.ModelProto()
        model.trainer_spec.model_type = model.trainer_spec.BPE
        model.trainer_spec.byte_fallback = True
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = space
        model.normalizer_spec.remove_extra_whitespaces = False
        kinds = model.SentencePiece
        for piece, i in sorted(file["model"]["vocab"].items(), key=lambda item: item[1]):
            kind, score = kinds.NORMAL, -1e9 if set(piece) == {"▁"} else -i
            if piece in added:
                kind, score = kinds.UNKNOWN if i == 0 else kinds.CONTROL, 0
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                kind, score = kinds.BYTE, 0
            model.pieces.add(piece=piece, type=kind, score=score)
        own[space] = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode(text):
        ids, strips = [], False
        for n, part in enumerate(between(added, text)):
            if n % 2:
                ids.append(added[part]["id"])
                strips = added[part]["rstrip"]
                continue
            part = part.lstrip() if strips else part
            space = not (n or part.startswith((" ", "▁"))) or not space_first_only
            ids += own[space].encode(part) if part else []
        return ids

    return encode


def gpt2_original(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    end = {"<|endoftext|>": 50256}
    return bytes_original(GPT2_WORDS, as_bytes(vocabulary, end), end)


ORIGINALS = {
    "gpt2": gpt2_original,
    "olmo2": lambda folder: bytes_of_json(folder / "tokenizer.json"),
    "qwen3-hf": lambda folder: bytes_of_json(folder / "tokenizer.json", "NFC"),
    "phi3": lambda folder: pieces_of_json(folder / "tokenizer.json", space_first_only=False),
    "mistral-v3-hf": lambda folder: pieces_of_json(
        folder / "tokenizer.json", space_first_only=True
    ),
    "mistral-v1": lambda folder: pieces_of_model(folder / "tokenizer.model"),
}
LOSSLESS = ("gpt2", "olmo2")


@functools.cache
def loaded(folder):
    return tokenizer.load(folder)


def agreeing(own, original, some):
    """How many texts, after a look at the first that differs."""
    differ = [text for text in some if own.encode(text)[0] != original(text)]
    assert not differ, (differ[0], own.encode(differ[0])[0], original(differ[0]))
    return len(some)


def covered(text, offsets):
    """Is every character some token's, in order?"""
    at = before = 0
    for begin, end in offsets:
        assert before <= begin <= end <= len(text)
        if begin > at:
            return False
        before, at = begin, max(at, end)
    return at == len(text)


def small(shared, tmp_path, name):
    shutil.copy(shared / "data" / "tokenizers" / "small" / name, tmp_path / "tokenizer.model")
    return tmp_path


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_tokenizer_agrees_with_its_original(shared, name):
    folder = shared / "data" / "tokenizers" / name
    assert agreeing(loaded(folder), ORIGINALS[name](folder), texts(shared, 500)) >= 600


@pytest.mark.parametrize("name", SMALL)
def test_a_small_sentencepiece_model_agrees_with_sentencepiece(shared, tmp_path, name):
    own = tokenizer.load(small(shared, tmp_path, name))
    original = pieces_of_model(tmp_path / "tokenizer.model")
    assert agreeing(own, original, texts(shared, 500)) >= 600


def test_a_published_tiktoken_file_agrees_with_tiktoken(shared, tmp_path):
    own = tokenizer.load(small(shared, tmp_path, "torchtune_tiktoken_small.model"))
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, lines)}
    special = {name: 2000 + i for i, name in enumerate(byte_files.SPECIAL["llama"])}
    original = bytes_original(byte_files.WORDS["llama"], ranks, special)
    assert agreeing(own, original, texts(shared, 500)) >= 600


@pytest.mark.full
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_tokenizer_agrees_with_its_original_on_many_texts(shared, name):
    folder = shared / "data" / "tokenizers" / name
    agreeing(loaded(folder), ORIGINALS[name](folder), texts(shared, 5000, 1))


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_a_small_sentencepiece_model_agrees_with_sentencepiece_on_many_texts(
    shared, tmp_path, name
):
    own = tokenizer.load(small(shared, tmp_path, name))
    agreeing(own, pieces_of_model(tmp_path / "tokenizer.model"), texts(shared, 5000, 1))


@pytest.mark.parametrize("name", ORIGINALS)
def test_offsets_cover_the_text_and_ids_say_it(shared, name):
    own = loaded(shared / "data" / "tokenizers" / name)
    for text in texts(shared, 150):
        if name == "qwen3-hf":  # which composes accents, and forgets where they stood
            text = unicodedata.normalize("NFC", text)
        ids, offsets = own.encode(text)
        assert covered(text, offsets), text
        plain = not own.specials.search(text) and "▁" not in text
        if name in (*LOSSLESS, "qwen3-hf") or (plain and not text.startswith(" ")):
            assert own.decode(ids) == text


def test_offsets_are_those_of_the_library(shared):
    for name in ("qwen3-hf", "phi3", "mistral-v3-hf"):
        folder = shared / "data" / "tokenizers" / name
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in texts(shared, 100):
            found = theirs.encode(text, add_special_tokens=False).offsets
            assert [*loaded(folder).encode(text)[1]] == found


def test_a_text_begins_with_its_own_spaces_where_the_model_adds_one(shared):
    folder = shared / "data" / "tokenizers"
    for name in ("mistral-v1", "phi3"):
        own = loaded(folder / name)
        for text in ("  x", " ", " \n", "   a b"):
            assert own.decode(own.encode(text)[0]) == text


@pytest.mark.parametrize("name", SMALL)
def test_offsets_grow_where_a_model_changes_its_text(shared, tmp_path, name):
    own = tokenizer.load(small(shared, tmp_path, name))
    for text in texts(shared, 150):
        ids, offsets = own.encode(text)
        assert len(ids) == len(offsets)
        covered(text, offsets)


def test_a_byte_of_a_character_stands_for_all_of_it(shared):
    own = loaded(shared / "data" / "tokenizers" / "mistral-v1")
    ids, offsets = own.encode("a\U00013000b")
    assert len(ids) == 6
    assert offsets == [(0, 1), *[(1, 2)] * 4, (2, 3)]


def test_special_tokens_are_read_as_such_and_look_alikes_are_not(shared):
    folder = shared / "data" / "tokenizers"
    for name, text, special in (
        ("qwen3-hf", "a<|im_end|>b<| im_end|>", 151645),
        ("mistral-v1", "a</s>b< /s>", 2),
        ("mistral-v3-hf", "a[INST]b[INST", 3),
        ("phi3", "a<|end|>b<|end>", 32007),
        ("olmo2", "a<|im_end|>b<|im_end>", 100265),
        ("gpt2", "a<|endoftext|>b<|endoftext>", 50256),
    ):
        own = loaded(folder / name)
        ids, offsets = own.encode(text)
        assert [*own.special.values()].count(special) == 1
        assert ids.count(special) == 1
        begin, end = offsets[ids.index(special)]
        assert own.special[text[begin:end]] == special
        assert len(own.specials.findall(text)) == 1


def test_where_a_text_may_be_cut_its_ids_are_those_of_the_parts(shared):
    folder = shared / "data" / "tokenizers"
    for name in ("qwen3-hf", "mistral-v1", "phi3", "olmo2"):
        own = loaded(folder / name)
        for text in texts(shared, 150, seed=5):
            for found in own.cuts.finditer(text):
                head, tail = text[: found.start()], text[found.start() :]
                assert own.encode(text)[0] == own.encode(head)[0] + own.encode(tail)[0]


def test_beginning_and_end_are_those_of_the_files(shared):
    folder = shared / "data" / "tokenizers"
    for name, bos, eos, first in (
        ("gpt2", 50256, 50256, ()),
        ("mistral-v1", 1, 2, (1,)),
        ("mistral-v3-hf", 1, 2, (1,)),
        ("phi3", 1, 32000, ()),
        ("qwen3-hf", None, 151645, ()),
        ("olmo2", None, None, ()),  # this folder holds no tokenizer_config.json
    ):
        own = loaded(folder / name)
        assert (own.bos_id, own.eos_id, own.first) == (bos, eos, first), name


def rank_file(path, words=("th", "he", "the", " t", " the", "in", "ing", "  ")):
    """A small tiktoken file: all bytes, and a few words, each after its parts."""
    ranks = [*(bytes([b]) for b in range(256)), *(word.encode() for word in words)]
    lines = [f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(ranks)]
    path.write_text("".join(lines))
    return {word: i for i, word in enumerate(ranks)}


LITERAL = [
    "the thing", "  the\n\n the", "1234567", "你好 🙂 é e\u0301", "<|im_start|>u\nthe<|im_end|>\n",
    "<|begin_of_text|>the<|eot_id|>", "\x00\x07", "", "thethethe" * 20, "I'LL don't", " \t x  ",
]  # fmt: skip


def test_llama_3s_tiktoken_file(tmp_path):
    ranks = rank_file(tmp_path / "tokenizer.model")
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    own = tokenizer.load(tmp_path)
    special = {name: len(ranks) + i for i, name in enumerate(byte_files.SPECIAL["llama"])}
    original = bytes_original(byte_files.WORDS["llama"], ranks, special)
    agreeing(own, original, [*LITERAL, *ODD])
    assert len(own.special) == 256
    # As in Llama 3.1, where the first of them is 128000.
    n = len(ranks)
    assert own.bos_id == n and own.eos_id == n + 9 and own.first == (n,)
    assert own.special["<|start_header_id|>"] == n + 6
    assert own.special["<|reserved_special_token_247|>"] == n + 255
    assert own.encode("the 1234")[0] == [258, 32, 49, 50, 51, 52]
    assert own.decode(own.encode("the 1234")[0]) == "the 1234"


def test_absurd_tokenizer_files_are_bounded(tmp_path):
    """A token of a million bytes has as many halves; a gap of ids is filled at once, or not."""
    rank_file(tmp_path / "tokenizer.model", words=("x" * 5000,))
    with pytest.raises(ValueError, match="has a token of 5000 bytes: 1024 at most are read"):
        tokenizer.load(tmp_path)
    ranks = rank_file(tmp_path / "tokenizer.model")
    far = {"<|a|>": len(ranks), "<|b|>": len(ranks) + 20_000}
    (tmp_path / "added_tokens.json").write_text(json.dumps(far))
    assert tokenizer.load(tmp_path).special["<|b|>"] == len(ranks) + 20_000
    (tmp_path / "chat_template.jinja").write_text("x" * (tokenizer.MOST_TEMPLATE + 1))
    with pytest.raises(ValueError, match="a chat template may have 1024 at most"):
        tokenizer.load(tmp_path)


def test_qwens_tiktoken_file(tmp_path):
    ranks = rank_file(tmp_path / "qwen.tiktoken")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    own = tokenizer.load(tmp_path)
    special = {name: len(ranks) + i for i, name in enumerate(byte_files.SPECIAL["qwen"])}
    agreeing(own, bytes_original(byte_files.WORDS["qwen"], ranks, special), [*LITERAL, *ODD])
    assert (own.bos_id, own.eos_id, own.first) == (None, len(ranks) + 2, ())


def test_tokens_that_a_config_names_are_special(tmp_path):
    ranks = rank_file(tmp_path / "tokenizer.model")
    listed = {str(len(ranks) + 2): {"content": "<|one|>"}, str(len(ranks)): {"content": "<|two|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    own = tokenizer.load(tmp_path)
    assert own.encode("a<|one|><|two|>")[0] == [97, len(ranks) + 2, len(ranks)]
    assert own.special["<|unused_265|>"] == 265


def test_gpt_2s_two_files(tmp_path):
    vocabulary = {text: i for i, text in enumerate(fast_bpe.bytes_as_text().values())}
    for word in ("th", "the", "Ġthe"):
        vocabulary[word] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    own = tokenizer.load(tmp_path)
    special = {"<|endoftext|>": len(vocabulary)}
    agreeing(own, bytes_original(GPT2_WORDS, as_bytes(vocabulary), special), [*LITERAL, *ODD])
    n = len(vocabulary)  # and what was added to them, in either file
    added = {"<|im_start|>": n + 1, "<think>": n + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    listed = {str(n): {"content": "<|endoftext|>", "special": True},
              str(n + 4): {"content": "<|im_end|>", "special": True}}  # fmt: skip
    (tmp_path / GIVEN).write_text(
        json.dumps({"added_tokens_decoder": listed, "extra_special_tokens": ["<|im_start|>"]})
    )
    own = tokenizer.load(tmp_path)
    assert own.encode("<|im_start|>the<think>a<|im_end|>")[0] == [n + 1, n - 2, n + 2, 64, n + 4]
    assert own.special == special | added | {"<|unused_262|>": n + 3, "<|im_end|>": n + 4}
    assert own.control == {n, n + 1, n + 3, n + 4}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="do not say how words are cut"):
        tokenizer.load(tmp_path)


def test_what_an_older_file_calls_the_special_tokens(tmp_path):
    """As in transformers: only where tokenizer_config.json lists no added tokens, and above it."""
    tiny_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|eot_id|>"}}')
    named = lambda config: (
        (tmp_path / GIVEN).write_text(json.dumps(config)) and tokenizer.load(tmp_path).named
    )
    assert named({"bos_token": None}) == {"bos_token": "<|eot_id|>"}
    assert named({"bos_token": "<|end_of_text|>"}) == {"bos_token": "<|eot_id|>"}
    assert named({"bos_token": "<|a|>", "added_tokens_decoder": {}}) == {"bos_token": "<|a|>"}


def test_special_tokens_without_an_id_are_known(tmp_path):
    tiny_tokenizer(tmp_path)
    config = {"bos_token": "<s>", "eos_token": "<|eot_id|>", "extra_special_tokens": ["<a>"],
              "additional_special_tokens": [{"content": "<b>"}, "<|eot_id|>"]}  # fmt: skip
    (tmp_path / GIVEN).write_text(json.dumps(config))
    assert tokenizer.load(tmp_path).unknown == ("<a>", "<b>", "<s>")


def test_text_after_keeps_the_space_of_a_first_piece(shared):
    own = loaded(shared / "data" / "tokenizers" / "mistral-v1")
    before, after = own.encode("one")[0], own.encode("two")[0]
    assert own.decode(after) == "two"
    assert tokenizer.text_after(own, before, after) == " two"


GIVEN = "tokenizer_config.json"
BROKEN = {
    "nothing at all": ({}, "holds no tokenizer"),
    "an empty tokenizer.json": ({"tokenizer.json": ""}, "cannot be read"),
    "a torn tokenizer.json": ({"tokenizer.json": '{"version": "1.0", "mod'}, "cannot be read"),
    "a tokenizer.json of something else": ({"tokenizer.json": "[1, 2]"}, "cannot be read"),
    "rubbish as tokenizer.json": ({"tokenizer.json": b"\xff\x00\x81"}, "cannot be read"),
    "an empty SentencePiece model": ({"tokenizer.model": b""}, "not a SentencePiece model"),
    "rubbish as SentencePiece": ({"tokenizer.model": b"\x00\xff" * 99}, "not a SentencePiece mod"),
    "a tiktoken line that is torn": ({"tokenizer.model": "IQ== 0\nIg="}, "not a whole tiktoken"),
    "a tiktoken file of words": ({"a.tiktoken": "IQ== 0\nIg== one\n"}, "not a whole tiktoken"),
    "a tiktoken file without some bytes": ({"a.tiktoken": "IQ== 0\nIg== 1\n"}, "bytes are missing"),
    "a tiktoken file of another family": (
        {"a.tiktoken": "IQ== 0\n", "config.json": '{"model_type": "gemma"}'}, "not for gemma",
    ),
    "a vocabulary that is torn": ({"vocab.json": '{"a', "merges.txt": ""}, "cannot be read"),
    "a vocabulary of lists": ({"vocab.json": "[]", "merges.txt": ""}, "cannot be read"),
    "merges of unknown words": ({"vocab.json": '{"a": 0}', "merges.txt": "x y"}, "cannot be read"),
    "a config that is torn": ({GIVEN: "{", "tokenizer.json": ""}, "not valid JSON"),
    "a config that is a list": ({GIVEN: "[]", "tokenizer.json": ""}, "should hold a JSON object"),
    "a config that is not text": ({GIVEN: b"\xff", "tokenizer.json": ""}, "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_a_sentence(tmp_path, what):
    files, sentence = BROKEN[what]
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        tokenizer.load(tmp_path)


def tiny_tokenizer(folder):
    for name in ("tokenizer.json", GIVEN, "chat_template.jinja"):
        shutil.copy(TINY / "model" / name, folder)
    return json.loads((folder / "tokenizer.json").read_text("utf-8"))


def test_a_rank_file_that_was_cut_between_two_lines_is_found_out(tmp_path):
    rank_file(tmp_path / "tokenizer.model")
    whole = (tmp_path / "tokenizer.model").read_text()
    (tmp_path / "tokenizer.model").write_text(whole[:-1][:-1])  # "... 263" is now "... 26"
    with pytest.raises(ValueError, match="not a whole tiktoken file"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("i", ["4000000000", "200000000"])
def test_a_token_with_an_id_out_of_reach_is_refused(tmp_path, i):
    rank_file(tmp_path / "tokenizer.model")
    listed = {"added_tokens_decoder": {"264": {"content": "<a>"}, i: {"content": "<b>"}}}
    (tmp_path / GIVEN).write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"<b>.*id"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "templates", [["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], [{}], [None]]
)
def test_chat_templates_without_a_name_or_text_are_a_sentence(tmp_path, templates):
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / GIVEN).write_text(json.dumps({"chat_template": templates}))
    with pytest.raises(ValueError, match="no name or text"):
        tokenizer.load(tmp_path)


def test_a_chat_template_comes_from_the_first_of_its_places(tmp_path):
    tiny_tokenizer(tmp_path)
    found = lambda **how: tokenizer.load(tmp_path, **how).chat_template
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "chat_template.jinja").rename(tmp_path / "aside")
    (tmp_path / GIVEN).write_text(json.dumps({"chat_template": {"default": "a", "rag": "b"}}))
    by_name = tokenizer.load(tmp_path)
    assert (by_name.chat_template, by_name.chat_templates) == ("a", {"rag": "b"})
    (tmp_path / "aside").rename(tmp_path / "chat_template.jinja")
    (tmp_path / GIVEN).write_text(json.dumps({"chat_template": listed}))
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert found(chat_template=str(tmp_path / "mine")) == "mine"
    assert found() == (TINY / "model" / "chat_template.jinja").read_text("utf-8")
    (tmp_path / "chat_template.jinja").unlink()
    assert found() == "a"
    assert tokenizer.load(tmp_path).chat_templates == {"tool_use": "b"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "c"}')
    assert found() == "c"
    with pytest.raises(FileNotFoundError, match="no chat template"):
        found(chat_template=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="not UTF-8"):
        found(chat_template=str(tmp_path / "binary"))


def test_a_file_that_asks_for_cut_and_padded_texts_gets_neither(tmp_path):
    file = tiny_tokenizer(tmp_path)
    before, _ = tokenizer.load(tmp_path).encode("some words, " * 20)
    file["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    file["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert tokenizer.load(tmp_path).encode("some words, " * 20)[0] == before


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.sampled_from(["", "<s>", "▁", "BPE", "Sequence", "99", "default", "x"]),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(
        strategies.sampled_from(["type", "content", "id", "name", "template", "0", "7", "x"]),
        inner, max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip
PLACES = [
    ("tokenizer.json", key)
    for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
] + [
    (GIVEN, key)
    for key in ("bos_token", "eos_token", "add_bos_token", "added_tokens_decoder", "chat_template")
]  # fmt: skip


def strange(tmp_path_factory, place, value, deeper):
    name, key = place
    folder = tmp_path_factory.mktemp("strange")
    tiny_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    file = json.loads((folder / name).read_text("utf-8"))
    inside = file.get(key)
    if deeper and isinstance(inside, dict) and inside:
        inside[sorted(inside)[deeper % len(inside)]] = value
    else:
        file[key] = value
    (folder / name).write_text(json.dumps(file))
    try:
        own = tokenizer.load(folder)
        own.decode(own.encode("Hello <s> wörld 你好")[0])
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
    shutil.rmtree(folder)


@settings(max_examples=80, deadline=None)
@given(place=strategies.sampled_from(PLACES), value=JSON, deeper=strategies.integers(0, 9))
def test_strange_files_are_read_or_refused(tmp_path_factory, place, value, deeper):
    strange(tmp_path_factory, place, value, deeper)


@pytest.mark.full
@settings(max_examples=2000, deadline=None)
@given(place=strategies.sampled_from(PLACES), value=JSON, deeper=strategies.integers(0, 9))
def test_many_strange_files_are_read_or_refused(tmp_path_factory, place, value, deeper):
    strange(tmp_path_factory, place, value, deeper)


def test_half_a_character_is_a_sentence(shared, tmp_path):
    rank_file(tmp_path / "tokenizer.model")
    for folder in (TINY / "model", tmp_path, shared / "data" / "tokenizers" / "mistral-v1"):
        with pytest.raises(ValueError):
            tokenizer.load(folder).encode("half \ud800 a character")


def test_a_panic_of_the_library_is_a_sentence(tmp_path):
    file = tiny_tokenizer(tmp_path)
    file["decoder"] = None
    file["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="cannot"):
        tokenizer.load(tmp_path).encode("some words")


@pytest.mark.parametrize(
    "name", ["small/phi3_test_vocab.spm", "small/torchtune_tiktoken_small.model"]
)
def test_a_damaged_model_is_read_or_refused(shared, tmp_path, name):
    whole = (shared / "data" / "tokenizers" / name).read_bytes()
    draw = random.Random(0)
    for _ in range(30):
        torn = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.choice([0, 1, 5]) if torn else 0):
            torn[draw.randrange(min(400, len(torn)))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(torn)
        try:
            own = tokenizer.load(tmp_path)
            own.decode(own.encode("the brown fox </s> é")[0])
        except ValueError as error:
            assert str(error)


def test_the_tiny_models_tokenizer_is_lossless():
    own = tokenizer.load(pathlib.Path(TINY, "model"))
    for text in ODD:
        ids, offsets = own.encode(text)
        assert own.decode(ids) == text
        assert covered(text, offsets)

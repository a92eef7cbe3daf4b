"""Reads byte-level BPE files in the formats in which Llama 3, Qwen and GPT-2 were first published.

They say less than a tokenizer.json: the pre-tokenisation pattern depends on the model family.
"""

import base64
from collections.abc import Collection
import itertools
import pathlib
import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from zoo.text import fast_bpe

LONGEST_WORD = 1024  # bytes of a token: Llama 3's longest has 128

# The patterns that split a text into words before their bytes are merged.
WORDS = {"llama": fast_bpe.LLAMA, "qwen": fast_bpe.QWEN}
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(248)]
SPECIAL = {
    "llama": [
        "<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:2], "<|finetune_right_pad_id|>",
        RESERVED[2], "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
        "<|python_tag|>", *RESERVED[3:],
    ],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}  # fmt: skip


def is_tiktoken(path: pathlib.Path) -> bool:
    """Whether the file holds words and ranks, one pair per line."""
    with path.open("rb") as file:
        return bool(re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(10_000)))


def kind_of(folder: pathlib.Path) -> str:
    """The model family, which determines how its tokenizer splits words."""
    there = (folder / "config.json").is_file()
    kind = hf_folder.read_config(folder).get("model_type", "") if there else "llama"
    return "qwen" if str(kind).startswith("qwen") else str(kind)


def tiktoken(
    folder: pathlib.Path, path: pathlib.Path, config: dict[str, object], kind: str
) -> tokenizers.Tokenizer:
    """Reads the ranks of byte strings, as Llama 3 and Qwen published them.

    The file says neither how text is split into words nor which tokens are special: that follows
    from the model's family, `kind`, and tokenizer_config.json may name the special tokens.
    """
    if kind not in WORDS:
        raise BadInput(
            f"{path} is a tiktoken file, and how it cuts words is known for Llama 3 and Qwen, not "
            f"for {kind}: give a tokenizer.json"
        )
    if (size := path.stat().st_size) > hf_folder.MOST_JSON:
        raise BadInput(f"{path} has {size >> 20} MiB, and at most 16 are read")
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except ValueError as error:
        raise BadInput(f"{path} is not a whole tiktoken file: {error}") from error
    known = all(bytes([byte]) in ranks for byte in range(256))
    if not known or sorted(ranks.values()) != list(range(len(lines))):
        raise BadInput(f"{path} is not a whole tiktoken file: ranks or bytes are missing")
    if (longest := max(map(len, ranks))) > LONGEST_WORD:
        raise BadInput(f"{path} has a token of {longest} bytes: {LONGEST_WORD} at most are read")
    as_text = fast_bpe.bytes_as_text()
    spelled = lambda word: "".join(as_text[byte] for byte in word)
    merges = []
    for word in sorted(ranks, key=ranks.__getitem__):
        parts = [(word[:i], word[i:]) for i in range(1, len(word))]
        parts = [(a, b) for a, b in parts if a in ranks and b in ranks]
        parts.sort(key=lambda ab: (ranks[ab[0]], ranks[ab[1]]))
        merges += [(spelled(a), spelled(b)) for a, b in parts]
    vocabulary = {spelled(word): rank for word, rank in ranks.items()}
    own = _bytes_merged(vocabulary, merges, WORDS[kind], ignore_merges=True)
    added = added_tokens(config, folder / "added_tokens.json")
    start = max(ranks.values(), default=-1) + 1
    named = added or {text: start + i for i, text in enumerate(SPECIAL[kind])}
    _add_in_order(own, named)
    return own


def gpt2(folder: pathlib.Path, config: dict[str, object]) -> tokenizers.Tokenizer:
    """Reads vocab.json and merges.txt, as OpenAI published them, and the added tokens."""
    path = folder / "config.json"
    if path.is_file() and hf_folder.read_config(folder).get("model_type") != "gpt2":
        raise BadInput(
            f"{folder} has vocab.json and merges.txt, which do not say how words are cut unless it "
            "is GPT-2: give a tokenizer.json"
        )
    vocabulary, merges = models.BPE.read_file(
        str(folder / "vocab.json"), str(folder / "merges.txt")
    )
    own = _bytes_merged(vocabulary, merges, None)
    end = {"<|endoftext|>": vocabulary.get("<|endoftext|>", len(vocabulary))}
    added = added_tokens(config, folder / "added_tokens.json")
    special = called_special(config)
    _add_in_order(own, end | added, words=[x for x, i in added.items() if i not in special])
    return own


def _bytes_merged(
    vocabulary: dict[str, int], merges: list, pattern: str | None, ignore_merges: bool = False
) -> tokenizers.Tokenizer:
    own = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    )
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        cut = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        by_byte = pre_tokenizers.Sequence([cut, by_byte])
    own.pre_tokenizer, own.decoder = by_byte, decoders.ByteLevel()
    return own


def _add_in_order(
    own: tokenizers.Tokenizer, named: dict[str, int], words: Collection[str] = ()
) -> None:
    """Adds tokens at the ids that follow, and fills gaps with placeholder names.

    Tokens in `words` are ordinary text and not special.
    """
    texts = {i: text for text, i in named.items()}
    if max(texts) - min(texts) > 100_000:
        raise BadInput(
            f"the special token {texts[max(texts)]} has the id {max(texts)}, more than 100,000 "
            f"above the first of them, {min(texts)}: give a tokenizer.json"
        )
    first = min(max(own.get_vocab_size(), min(texts)), max(texts))
    gaps = {i: f"<|unused_{i}|>" for i in range(first, max(texts)) if i not in texts}
    all_of_them = dict(sorted((gaps | texts).items()))
    for plain, some in itertools.groupby(all_of_them.values(), lambda text: text in words):
        add = own.add_tokens if plain else own.add_special_tokens
        add([tokenizers.AddedToken(text, normalized=False) for text in some])
    for i, text in all_of_them.items():
        if own.token_to_id(text) != i:
            raise BadInput(f"the special token {text} should have id {i}, which another token has")


def added_tokens(config: dict[str, object], path: pathlib.Path) -> dict[str, int]:
    """The added tokens beyond the base vocabulary, from either file."""
    given = hf_folder.read_if_there(path)
    found = {text: i for text, i in given.items() if text and type(i) is int}
    listed = config.get("added_tokens_decoder")
    for i, token in listed.items() if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else token
        if str(i).isdecimal() and isinstance(text, str) and text:
            found[text] = int(i)
    if strange := [text for text, i in found.items() if not 0 <= i < 2**31]:
        raise BadInput(f"{path.parent} gives the token {strange[0][:40]!r} an id not in 0 to 2**31")
    return found


def called_special(config: dict[str, object]) -> set[int]:
    """The added tokens that tokenizer_config.json marks as special."""
    listed = config.get("added_tokens_decoder")
    return {
        int(i)
        for i, token in (listed.items() if isinstance(listed, dict) else ())
        if str(i).isdecimal() and isinstance(token, dict) and token.get("special") is True
    }

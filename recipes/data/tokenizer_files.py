"""The kinds of tokenizer files, a function each: tokenizer.json, SentencePiece, tiktoken, GPT-2."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import pathlib
import re
from typing import Any, NamedTuple, SupportsInt

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput, NotFound
from recipes.data import words

LONGEST_WORD = 1024  # bytes of a token: Llama 3's longest has 128


class Codec(NamedTuple):
    """Text <-> ids."""

    encode: Callable[[str], tuple[list[int], Sequence[tuple[int, int]]]]
    decode: Callable[[Iterable[SupportsInt]], str]
    special: Mapping[str, int]
    cuts: Sequence[str]  # special tokens before which a text may be cut: its ids are those parts'
    begins_with_bos: bool  # does plain text, as these files have it?


def read(folder: pathlib.Path, config: dict[str, Any]) -> Codec:
    """The tokenizer in a folder, whose tokenizer_config.json holds `config`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file is something else than its name says.
    """
    model = folder / "tokenizer.model"
    ranks = next(iter(sorted(folder.glob("*.tiktoken"))), model)
    try:
        if (path := folder / "tokenizer.json").is_file():
            return _fast(tokenizers.Tokenizer.from_file(str(path)))
        if ranks.is_file() and _is_tiktoken(ranks):
            return _fast(_tiktoken(folder, ranks, config), begins=_kind(folder) == "llama")
        if model.is_file():
            return _sentencepiece(model, config)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _fast(_gpt2(folder))
    except (ValueError, OSError):
        raise
    except BaseException as error:  # whatever a library makes of a stranger's files
        _only_failures(error)
        raise BadInput(f"the tokenizer in {folder} cannot be read: {str(error)[:300]}") from error
    raise NotFound(
        f"{folder} holds no tokenizer: no tokenizer.json, no tokenizer.model, no *.tiktoken and no "
        "vocab.json with merges.txt"
    )


def _only_failures(error: BaseException) -> None:
    """Goes on with what is none: an interrupt. A panic of `tokenizers` is no `Exception`."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _fast(own: tokenizers.Tokenizer, begins: bool | None = None) -> Codec:
    own.no_truncation()  # a file may ask for both, and tokens would be lost
    own.no_padding()
    added = own.get_added_tokens_decoder()
    special = {token.content: i for i, token in sorted(added.items())}
    if begins is None:
        begins = bool(own.encode("").ids)
    by_words = words.encoder(own)

    def encoding(text: str) -> tokenizers.Encoding:
        try:
            return own.encode(text, add_special_tokens=False)
        except BaseException as error:
            _only_failures(error)
            raise BadInput(f"the tokenizer cannot read it: {str(error)[:300]}") from error

    def encode(text: str) -> tuple[list[int], Sequence[tuple[int, int]]]:
        ids = by_words(text) if by_words else None
        if ids is not None:
            return ids, _Offsets(lambda: encoding(text), len(ids))
        found = encoding(text)
        return found.ids, _Offsets(lambda: found, len(found))

    def decode(ids: Iterable[SupportsInt]) -> str:
        return own.decode(list(map(int, ids)), skip_special_tokens=False)

    cuts = [t.content for t in added.values() if not (t.normalized or t.lstrip or t.single_word)]
    return Codec(encode, decode, special, cuts, begins)


class _Offsets(Sequence):
    """The characters of an encoding's tokens, told one by one: few of them are ever asked for."""

    def __init__(self, encoding: Callable[[], tokenizers.Encoding], length: int) -> None:
        self._encode, self._length = encoding, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._length:
            raise IndexError(i)
        if len(self._encoding) != self._length:
            raise BadInput("two ways to tokenise the text disagree; please report it")
        return self._encoding.token_to_chars(i)

    @functools.cached_property
    def _encoding(self) -> tokenizers.Encoding:
        return self._encode()


def _sentencepiece(path: pathlib.Path, config: dict[str, Any]) -> Codec:
    """A raw SentencePiece model, asked itself.

    Its control pieces and the added tokens of tokenizer_config.json are read as such wherever a
    template writes them; each stretch between them is a text of its own, as in Llama 2's and
    Mistral's own code.
    """
    try:
        own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise BadInput(f"{path} is not a SentencePiece model: {str(error)[:200]}") from error
    size = own.get_piece_size()
    special = {own.id_to_piece(i): i for i in range(size) if own.is_control(i)}
    special |= _added(config, path.with_name("added_tokens.json"))
    texts = {i: text for text, i in special.items()}
    between = words.any_of(special)

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for i, part in enumerate(between.split(text)):
            stop = start + len(part)
            if i % 2:
                ids.append(special[part])
                offsets.append((start, stop))
            elif part:
                try:
                    found = own.encode(part, return_type="offset_mapping")
                except RuntimeError as error:  # half a character
                    raise BadInput(f"the tokenizer cannot read it: {error}") from error
                ids += found["ids"]
                offsets += _whole_characters(own, found, start)
            start = stop
        return ids, offsets

    def decode(ids: Iterable[SupportsInt]) -> str:
        told, run = [], []
        for i in [*map(int, ids), None]:
            if i is not None and i not in texts and 0 <= i < size:
                run.append(i)
                continue
            told += [own.decode(run)] if run else []
            told += [] if i is None else [texts.get(i, "")]
            run = []
        return "".join(told)

    return Codec(encode, decode, special, list(special), own.bos_id() >= 0)


def _whole_characters(own: Any, found: dict[str, Any], start: int) -> list[tuple[int, int]]:
    """Offsets in the whole text; each byte of a character stands for all of it."""
    told: list[tuple[int, int]] = []
    ends = 0
    for i, (begin, end) in reversed(list(zip(found["ids"], found["offsets"], strict=True))):
        if own.is_byte(i) and begin == end and told and told[-1][0] == start + begin:
            end = ends
        told.append((start + begin, start + end))
        ends = end
    return told[::-1]


def _added(config: dict[str, Any], path: pathlib.Path) -> dict[str, int]:
    """Tokens beside the model's own, of either file."""
    given = hf_folder.read_json(path) if path.is_file() else {}
    found = {text: i for text, i in given.items() if text and type(i) is int}
    listed = config.get("added_tokens_decoder")
    for i, token in listed.items() if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else token
        if str(i).isdecimal() and isinstance(text, str) and text:
            found[text] = int(i)
    if strange := [text for text, i in found.items() if not 0 <= i < 2**31]:
        raise BadInput(f"{path.parent} gives the token {strange[0][:40]!r} an id that is none")
    return found


# How a text is cut into words before their bytes are merged.
WORDS = {"llama": words.LLAMA, "qwen": words.QWEN}
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(248)]
SPECIAL = {
    "llama": [
        "<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:2], "<|finetune_right_pad_id|>",
        RESERVED[2], "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
        "<|python_tag|>", *RESERVED[3:],
    ],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}  # fmt: skip


def _is_tiktoken(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return bool(re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(10_000)))


def _kind(folder: pathlib.Path) -> str:
    path = folder / "config.json"
    kind = hf_folder.read_config(folder).get("model_type", "") if path.is_file() else "llama"
    return "qwen" if str(kind).startswith("qwen") else str(kind)


def _tiktoken(
    folder: pathlib.Path, path: pathlib.Path, config: dict[str, Any]
) -> tokenizers.Tokenizer:
    """Ranks of byte strings, as Llama 3 and Qwen published them.

    The file says neither how a text is cut into words nor which tokens are special: the model's
    family does, and tokenizer_config.json may name the special ones.
    """
    kind = _kind(folder)
    if kind not in WORDS:
        raise BadInput(
            f"{path} is a tiktoken file, and how it cuts words is known of Llama 3 and Qwen, not "
            f"of {kind}: give a tokenizer.json"
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
    as_text = words.bytes_as_text()
    spelled = lambda word: "".join(as_text[byte] for byte in word)
    merges = []
    for word in sorted(ranks, key=ranks.__getitem__):
        parts = [(word[:i], word[i:]) for i in range(1, len(word))]
        parts = [(a, b) for a, b in parts if a in ranks and b in ranks]
        parts.sort(key=lambda ab: (ranks[ab[0]], ranks[ab[1]]))
        merges += [(spelled(a), spelled(b)) for a, b in parts]
    vocabulary = {spelled(word): rank for word, rank in ranks.items()}
    own = _bytes_merged(vocabulary, merges, WORDS[kind], ignore_merges=True)
    added = _added(config, folder / "added_tokens.json")
    start = max(ranks.values(), default=-1) + 1
    named = added or {text: start + i for i, text in enumerate(SPECIAL[kind])}
    _add_in_order(own, named)
    return own


def _gpt2(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt, byte by byte, as OpenAI published them."""
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
    _add_in_order(own, {"<|endoftext|>": vocabulary.get("<|endoftext|>", len(vocabulary))})
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


def _add_in_order(own: tokenizers.Tokenizer, named: dict[str, int]) -> None:
    """Special tokens get the ids that follow; a gap is filled with names of its own."""
    texts = {i: text for text, i in named.items()}
    if max(texts) - min(texts) > 100_000:
        raise BadInput(f"the special token {texts[max(texts)]} has the id {max(texts)}")
    all_of_them = {i: texts.get(i, f"<|unused_{i}|>") for i in range(min(texts), max(texts) + 1)}
    own.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in all_of_them.values()
        ]
    )
    for i, text in all_of_them.items():
        if own.token_to_id(text) != i:
            raise BadInput(f"the special token {text} should have id {i}, and it is taken")

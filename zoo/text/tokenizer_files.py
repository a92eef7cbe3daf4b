"""Readers for each kind of tokenizer file: tokenizer.json, SentencePiece, tiktoken, GPT-2."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import json
import pathlib
from typing import Any, NamedTuple, SupportsInt

import sentencepiece
import tokenizers

from checkpoints_io.errors import BadInput, NotFound, UserError
from zoo.text import byte_files, fast_bpe

Decode = Callable[[Iterable[SupportsInt]], str]


class Codec(NamedTuple):
    """The functions that encode and decode, with facts about special tokens."""

    encode: Callable[[str], tuple[list[int], Sequence[tuple[int, int]]]]
    decode: Decode
    special: Mapping[str, int]
    control: frozenset[int]  # those that the files call special, too: no words of a text
    cuts: Sequence[str]  # special tokens before which a text may be cut: its ids are those parts'
    first: tuple[int, ...] | None  # what these files put before plain text; None: a BOS
    size: int  # of the vocabulary


def read(folder: pathlib.Path, config: dict[str, object], elsewhere: Decode | None = None) -> Codec:
    """The tokenizer in a folder, whose tokenizer_config.json holds `config`.

    With `elsewhere`, the patterns of a tokenizer.json are never compiled here: the result can only
    decode, and decodes `elsewhere` if that needs a pattern.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file is something else than its name says.
    """
    model = folder / "tokenizer.model"
    ranks = next(iter(sorted(folder.glob("*.tiktoken"))), model)
    try:
        if (path := folder / "tokenizer.json").is_file():
            if elsewhere is not None:
                return _decoding(path, elsewhere)
            return _fast(tokenizers.Tokenizer.from_file(str(path)))
        if ranks.is_file() and byte_files.is_tiktoken(ranks):
            kind = byte_files.kind_of(folder)
            return _fast(byte_files.tiktoken(folder, ranks, config, kind), kind == "llama")
        if model.is_file():
            return _sentencepiece(model, config)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _fast(byte_files.gpt2(folder, config))
    except (UserError, OSError):
        raise
    except BaseException as error:  # whatever a library makes of a stranger's files
        _only_failures(error)
        raise BadInput(f"the tokenizer in {folder} cannot be read: {str(error)[:300]}") from error
    if (folder / "tekken.json").is_file():
        raise NotFound(
            f"{folder} has no tokenizer but tekken.json, which mistral-common reads: name a folder "
            "or hub id with a tokenizer.json of the same model, as --config.tokenizer, or copy its "
            "files there"
        )
    raise NotFound(
        f"{folder} holds no tokenizer: no tokenizer.json, no tokenizer.model, no *.tiktoken and no "
        "vocab.json with merges.txt"
    )


def _only_failures(error: BaseException) -> None:
    """Raises an interrupt again. A panic of `tokenizers` is a failure, but not an `Exception`."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _decoding(path: pathlib.Path, elsewhere: Decode) -> Codec:
    """Reads a tokenizer.json without its patterns, for decoding only."""
    told = json.loads(path.read_text("utf-8"))
    by_pattern = '"Regex"' in json.dumps(told.get("decoder"))
    without = dict.fromkeys(["normalizer", "pre_tokenizer", *(["decoder"] if by_pattern else [])])
    codec = _fast(tokenizers.Tokenizer.from_str(json.dumps(told | without)), by_words=False)
    return codec._replace(decode=elsewhere) if by_pattern else codec


def _fast(own: tokenizers.Tokenizer, begins: bool | None = None, *, by_words: bool = True) -> Codec:
    own.no_truncation()  # a file may ask for both, and tokens would be lost
    own.no_padding()
    added = own.get_added_tokens_decoder()
    special = {token.content: i for i, token in sorted(added.items())}
    first = _before_text(own) if begins is None else (None if begins else ())
    ids_of = fast_bpe.encoder(own) if by_words else None

    def encoding(text: str) -> tokenizers.Encoding:
        try:
            return own.encode(text, add_special_tokens=False)
        except BaseException as error:
            _only_failures(error)
            raise BadInput(f"the tokenizer cannot read it: {str(error)[:300]}") from error

    def encode(text: str) -> tuple[list[int], Sequence[tuple[int, int]]]:
        ids = ids_of(text) if ids_of else None
        if ids is not None:
            return ids, _Offsets(lambda: encoding(text), len(ids))
        found = encoding(text)
        return found.ids, _Offsets(lambda: found, len(found))

    def decode(ids: Iterable[SupportsInt]) -> str:
        return own.decode(list(map(int, ids)), skip_special_tokens=False)

    cuts = [t.content for t in added.values() if not (t.normalized or t.lstrip or t.single_word)]
    control = frozenset(i for i, token in added.items() if token.special)
    return Codec(encode, decode, special, control, cuts, first, own.get_vocab_size())


def _before_text(own: tokenizers.Tokenizer) -> tuple[int, ...] | None:
    text = own.encode("a", add_special_tokens=False).ids
    whole = own.encode("a").ids
    if not text:  # of a vocabulary without this letter: what is put there may stand behind it
        return None if whole else ()
    at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    return tuple(whole[:at])


class _Offsets(Sequence):
    """The characters of an encoding's tokens, looked up one by one: few are ever needed."""

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


def _sentencepiece(path: pathlib.Path, config: dict[str, object]) -> Codec:
    """A raw SentencePiece model, read by its own library.

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
    control = {*special.values(), *byte_files.called_special(config)}
    special |= byte_files.added_tokens(config, path.with_name("added_tokens.json"))
    texts = {i: text for text, i in special.items()}
    between = fast_bpe.any_of(special)

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

    beyond = sum(i >= size for i in special.values())
    first, cuts = None if own.bos_id() >= 0 else (), list(special)
    return Codec(encode, decode, special, frozenset(control), cuts, first, size + beyond)


def _whole_characters(
    own: sentencepiece.SentencePieceProcessor, found: dict[str, list], start: int
) -> list[tuple[int, int]]:
    """Offsets in the whole text, in which each byte of a character covers all of it."""
    told: list[tuple[int, int]] = []
    ends = 0
    for i, (begin, end) in reversed(list(zip(found["ids"], found["offsets"], strict=True))):
        if own.is_byte(i) and begin == end and told and told[-1][0] == start + begin:
            end = ends
        told.append((start + begin, start + end))
        ends = end
    return told[::-1]

"""The tokenizer of a model folder: encodes text with character offsets, and decodes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import pathlib
import re
from typing import NamedTuple, SupportsInt

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput, NotFound
from zoo.text import fast_bpe, tokenizer_files
from zoo.text.confined import Worker
from zoo.text.worker import Step

MOST_TEMPLATE = 1 << 20  # bytes

Offsets = Sequence[tuple[int, int]]  # of each token: its characters, from .. to


class Tokenizer(NamedTuple):
    """The common interface of tokenizers, whatever files they come from."""

    encode: Callable[[str], tuple[list[int], Offsets]]  # adds nothing; reads special tokens as such
    decode: Callable[[Iterable[SupportsInt]], str]  # leaves out nothing
    special: Mapping[str, int]  # tokens that are recognised wherever their text occurs
    control: frozenset[int]  # those that are not text; excludes Gemma's line breaks, <think>
    specials: re.Pattern[str]  # matches any special token
    cuts: re.Pattern[str]  # those before which a text may be split without changing its ids
    named: Mapping[str, str]  # bos_token, eos_token, …: what a template may write
    bos_id: int | None
    eos_id: int | None
    ends: tuple[int, ...]  # ids that end an answer, as the model's files say
    first: tuple[int, ...]  # ids that precede plain text
    chat_template: str | None
    chat_templates: Mapping[str, str]  # others, by name: tool_use
    size: int  # of the vocabulary: special tokens too
    unknown: tuple[str, ...]  # special tokens that the files name without an id


def load(folder: pathlib.Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder; `chat_template` is a file that replaces its template.

    tokenizer.json is read by `tokenizers` itself, a SentencePiece model by `sentencepiece`: what
    transformers builds from them differs from the originals on a few texts. Its patterns run in
    this process: see `apart`.

    Raises:
      FileNotFoundError: the folder holds no tokenizer, or there is no such template file.
      ValueError: its files cannot be read as one.
    """
    return _loaded(folder, chat_template)


def apart(folder: pathlib.Path, chat_template: str | None, worker: Worker) -> Tokenizer:
    """Like `load`, but runs the files' patterns only in the worker, to protect this process.

    Decoding here uses no patterns. Encoding gives no offsets.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    of = str(folder.absolute())
    decode = lambda ids: worker.call(_decoded, of, [*map(int, ids)])
    own = _loaded(folder, chat_template, elsewhere=decode)
    return own._replace(encode=lambda text: (worker.call(_encoded, of, text), ()))


@functools.lru_cache(maxsize=1)
def here(folder: str) -> Tokenizer:
    """Like `load`, cached in a worker: all calls for a folder share one tokenizer."""
    return load(pathlib.Path(folder))


def _encoded(step: Step, folder: str, text: str) -> list[int]:
    own = here(folder)
    with step("", "tokenising a text"):
        return own.encode(text)[0]


def _decoded(step: Step, folder: str, ids: list[int]) -> str:
    own = here(folder)
    with step("", "decoding a text"):
        return own.decode(ids)


def _loaded(
    folder: pathlib.Path,
    chat_template: str | None,
    elsewhere: tokenizer_files.Decode | None = None,
) -> Tokenizer:
    config = hf_folder.read_if_there(folder / "tokenizer_config.json")
    named = _named(folder, config)
    codec = tokenizer_files.read(folder, config, elsewhere)
    id_of = lambda role: codec.special.get(named.get(role, "")) if role in named else None
    bos, eos = id_of("bos_token"), id_of("eos_token")
    if eos is None:
        eos, named = _eos_of_the_model(folder, codec.special, named)
    listed = (config.get(f"{kind}_special_tokens") for kind in ("additional", "extra"))
    texts = [_text_of(one) for some in listed if isinstance(some, list) for one in some]
    roles = {*named.values(), *(text for text in texts if isinstance(text, str))}
    of_bos = () if bos is None else (bos,)
    first = of_bos if codec.first is None else codec.first
    if (begins := config.get("add_bos_token")) is not None:
        first = of_bos if begins else ()
    templates = _templates(folder, config, chat_template)
    return Tokenizer(
        encode=codec.encode,
        decode=codec.decode,
        special=codec.special,
        control=codec.control | {codec.special[text] for text in roles if text in codec.special},
        specials=fast_bpe.any_of(filter(str.strip, codec.special)),
        cuts=fast_bpe.any_of(filter(str.strip, codec.cuts)),
        named=named,
        bos_id=bos,
        eos_id=eos,
        ends=tuple(i for i in _ends(folder) if i < codec.size),
        first=first,
        chat_template=templates.pop("default", None),
        chat_templates=templates,
        size=codec.size,
        unknown=tuple(sorted(text for text in roles if text.strip() and text not in codec.special)),
    )


def stop_ids(tokenizer: Tokenizer, end_of_turn: str) -> tuple[int, ...]:
    """The ids that end an answer: end of text, and the first special token of what follows it.

    And those that the model's files call so: GLM's next turn begins with one of them.
    """
    special = {i for text, i in tokenizer.special.items() if text.strip()}
    of_turn = [i for i in tokenizer.encode(end_of_turn)[0] if i in special][:1]
    of_text = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return tuple(dict.fromkeys([*of_text, *of_turn, *tokenizer.ends]))


def ended_by(tokenizer: Tokenizer, ends: Iterable[int]) -> Tokenizer:
    """The tokenizer with the ids that end an answer made control tokens, whatever its files say."""
    return tokenizer._replace(control=tokenizer.control.union(ends))


def said(tokenizer: Tokenizer, before: Iterable[SupportsInt], ids: Iterable[int]) -> str:
    """The text of an answer's ids after `before`, without control tokens."""
    return text_after(tokenizer, before, [i for i in ids if i not in tokenizer.control])


def text_after(
    tokenizer: Tokenizer, before: Iterable[SupportsInt], ids: Iterable[SupportsInt]
) -> str:
    """The text of `ids` after `before`: decoded alone, their first piece may lose its space."""
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


def _named(folder: pathlib.Path, config: dict[str, object]) -> dict[str, str]:
    """The special tokens that have a role, by role."""
    older = hf_folder.read_if_there(folder / "special_tokens_map.json")
    # As in transformers, which reads the older file only beside such a config, and then above it.
    given = older | config if "added_tokens_decoder" in config else config | older
    found = {}
    for role, token in given.items():
        text = _text_of(token)
        if role.endswith("_token") and isinstance(text, str):
            found[role] = text
    return found


def _text_of(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _eos_of_the_model(
    folder: pathlib.Path, special: Mapping[str, int], named: dict[str, str]
) -> tuple[int | None, dict[str, str]]:
    """The EOS token from config.json, if the tokenizer's files name none."""
    texts = {i: text for text, i in special.items()}
    eos = next(iter(_ids(hf_folder.read_if_there(folder / "config.json"))), None)
    if eos not in texts:
        return None, named
    return eos, named | {"eos_token": texts[eos]}


def _ends(folder: pathlib.Path) -> list[int]:
    """The ids that end an answer by generation_config.json, or else by config.json."""
    config = hf_folder.read_if_there(folder / "config.json")
    text = config.get("text_config")
    said = [hf_folder.read_if_there(folder / "generation_config.json"), config]
    said += [text] if isinstance(text, dict) else []
    return next(filter(None, map(_ids, said)), [])


def _ids(said: Mapping[str, object]) -> list[int]:
    given = said.get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return [i for i in listed if type(i) is int and i >= 0]


def _templates(
    folder: pathlib.Path, config: dict[str, object], given: str | None
) -> dict[str, str]:
    """Chat templates by name; the one that counts is `default`."""
    if given:
        path = pathlib.Path(given).expanduser()
        if not path.is_file():
            raise NotFound(f"there is no chat template {given!r}")
        return {"default": _text(path)}
    # As transformers 5 writes several.
    others = {one.stem: _text(one) for one in folder.glob(f"{hf_folder.TEMPLATES}/*.jinja")}
    if (path := folder / "chat_template.jinja").is_file():
        return others | {"default": _text(path)}
    path = folder / "chat_template.json"
    found = hf_folder.read_json(path) if path.is_file() else config
    templates = found.get("chat_template")
    if isinstance(templates, list):  # several, each with its name
        named = {}
        for one in templates:
            name, text = map(one.get, ("name", "template")) if isinstance(one, dict) else (0, 0)
            if not isinstance(name, str) or not isinstance(text, str):
                raise BadInput(f"the chat templates in {folder} have no name or text")
            named[name] = text
        return named
    if isinstance(templates, dict) and all(isinstance(one, str) for one in templates.values()):
        return templates
    return {"default": templates} if isinstance(templates, str) else {}


def _text(path: pathlib.Path) -> str:
    if (size := path.stat().st_size) > MOST_TEMPLATE:
        raise BadInput(f"{path} has {size >> 10} KiB: a chat template may have 1024 at most")
    try:
        return path.read_text("utf-8")
    except UnicodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}") from error

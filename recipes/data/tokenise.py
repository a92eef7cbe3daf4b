"""Rows -> pairs as ids, each used or counted: what a process makes of some rows of a source."""

from collections.abc import Iterable, Sequence
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from recipes.data import (
    chat,
    columns,
    counts,
    layouts,
    messages,
    sources,
    tokenizer,
    tokens,
    trial,
)
from recipes.data.layouts import Pair
from recipes.data.records import Row
from recipes.data.source import Source
from recipes.data.token_cache import Shard

# Of what is installed, what may cut a text otherwise in another version.
LIBRARIES = ("tokenizers", "sentencepiece", "regex", "jinja2")


class How(NamedTuple):
    """All else that decides what a row becomes."""

    tokenizer: str  # a folder
    chat_template: str | None  # a file that replaces the tokenizer's
    scored_turns: str
    date: str | None
    max_length: int
    over_length: str
    max_malformed_fraction: float
    end_of_turn: str | None = None  # a special token, for templates that write none


def encode(rows: Sequence[Row], first: int, source: Source, how: How, files: str) -> Shard:
    """What becomes of some rows, of which the first has this number; `files` as `files_of`."""
    own, talk = _ready(how, files, source.layout in layouts.PLAIN)
    layout, names = layouts.LAYOUTS[source.layout or ""].read, dict(source.columns)
    told = counts.none()._replace(rows=len(rows))
    ids, keys = [], []
    for number, row in enumerate(rows, start=first):
        reasons = told.malformed
        try:
            if row.fields is None:
                raise BadInput(row.reason)
            named = columns.renamed(row.fields, names, single=source.single)
            pair = layout(named)
            if source.guessed:
                columns.check_question(named, layouts.asked(pair), source.layout or "")
                columns.check_tools(named, source.layout or "")
            reasons = told.dropped
            found = tokens.encode(
                pair, own, talk, row=number, max_length=how.max_length, over_length=how.over_length
            )
        except ValueError as error:
            reason = str(error)
            reasons = told.dropped if reason in layouts.SAYS_NOTHING else reasons
            reasons[reason] += 1
            told.first.setdefault(reason, row.where)
            continue
        ids.append(found)
        keys.append(prompt_key(pair))
        told.notes.update(found.notes)
        told.notes.update(sorted({tokens.UNREAD + key for key in _unread(named)}))
    return Shard(ids, np.array(keys, np.uint64), told)


def _unread(row: dict[str, Any]) -> set[str]:
    lists = (messages.unnested(held) for held in row.values() if isinstance(held, list | dict))
    return set().union(*map(messages.unread, lists))


def ready(how: How, *, plain: bool) -> tuple[tokenizer.Tokenizer, chat.Chat | None]:
    """The tokenizer and, unless the texts are plain, the chat template.

    Raises:
      FileNotFoundError, ValueError: one of them cannot be used.
    """
    return _ready(how, files_of(how), plain)


@functools.lru_cache(maxsize=4)
def _ready(how: How, _files: str, plain: bool) -> tuple[tokenizer.Tokenizer, chat.Chat | None]:
    own = tokenizer.load(pathlib.Path(how.tokenizer), how.chat_template)
    if plain:
        chat.check_plain(own)
        return own, None
    talk = trial.prepared(
        own, scored_turns=how.scored_turns, date=how.date, end_of_turn=how.end_of_turn
    )
    return own, talk


def files_of(how: How) -> str:
    """A hash of the tokenizer's and the template's files."""
    folder = pathlib.Path(how.tokenizer)
    paths = sorted(path for name in hf_folder.COMPANIONS for path in folder.glob(name))
    paths.append(folder / "config.json")
    if how.chat_template:
        paths.append(pathlib.Path(how.chat_template).expanduser())
    return _hash(path for path in paths if path.is_file())


def identity(source: Source, how: How) -> dict[str, Any]:
    """What the ids of a source depend on; what only decides whether to stop is not in it."""
    chosen = how._asdict()
    for name in ("tokenizer", "chat_template", "max_malformed_fraction"):
        del chosen[name]
    return {
        "source": sources.identity(source.path),
        "layout": source.layout,
        "columns": dict(source.columns),
        "guessed": source.guessed,
        "files": files_of(how),
        "how": chosen,
        "code": _hash(sorted(pathlib.Path(__file__).parent.glob("*.py"))),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def prompt_key(pair: Pair) -> int:
    """A number below 2**64 that stands for a prompt, or for what is asked first without one."""
    text = json.dumps(pair.prompt or pair.chosen[:1], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _hash(paths: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()

"""Encodes rows as pairs of ids, each used or counted: what a worker does with a source's rows.

The chat template and the tokenizer's patterns run here. It imports little, so workers start fast.
"""

from collections.abc import Sequence
import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data.chats import chat, columns, forming, layouts, messages, trial
from recipes.data.chats.pair import Pair
from recipes.data.ids import counts, pair_ids, shards
from recipes.data.ids.examples import UNREAD
from recipes.data.ids.shards import Shard
from recipes.data.rows.records import Row
from recipes.data.rows.source import Source
from zoo.text import tokenizer
from zoo.text.worker import Step

BYTES_A_SECOND = 2**18  # of a row: extra time that a long one may take


class How(NamedTuple):
    """Everything but the row itself that determines what the row becomes."""

    tokenizer: str  # a folder
    chat_template: str | None  # a file that replaces the tokenizer's
    scored_turns: str
    date: str | None
    max_length: int
    over_length: str
    max_malformed_fraction: float
    end_of_turn: str | None = None  # a special token, for templates that write none
    answers: int = 2  # at most, per row; more than two: rows are lists


ByName = dict[str, Any]  # a How as a worker gets it


class Ready(NamedTuple):
    """The facts about a tokenizer and a template that have been found to work."""

    stop_ids: tuple[int, ...]  # as `chat.stop_ids`
    stops: bool  # as `chat.stops`


def prepare(step: Step, how: ByName, files: str, plain: bool) -> Ready:
    """Tries the tokenizer and the template in a worker; `files` is a hash of their files.

    Raises:
      FileNotFoundError, ValueError: one of them cannot be used.
    """
    own, talk = ready(How(**how), files, plain, step)
    return Ready(chat.stop_ids(own, talk), talk is None or chat.stops(own, talk))


def encode_rows(
    step: Step,
    rows: list[list],
    first: int,
    source: list,
    how: ByName,
    files: str,
) -> bytes:
    """Runs `encode` in a worker and returns the shard as bytes.

    A row is given as its `where`, `fields`, `reason`, `size`, `cells`.
    """
    given = Source(*source)
    given = given._replace(columns=tuple((ours, theirs) for ours, theirs in given.columns))
    some = [
        Row(where, fields, reason, size=size, cells=cells)
        for where, fields, reason, size, cells in rows
    ]
    return shards.to_bytes(encode(some, first, given, How(**how), files, step))


def encode(
    rows: Sequence[Row], first: int, source: Source, how: How, files: str, step: Step
) -> Shard:
    """Encodes consecutive rows, of which the first has this number."""
    own, talk = ready(how, files, source.layout in layouts.PLAIN, step)
    names = dict(source.columns)
    told = counts.none()._replace(rows=len(rows))
    ids, keys = [], []
    for number, row in enumerate(rows, start=first):
        reasons = told.malformed
        try:
            with step(row.where, "to render and tokenise it", float(row.size // BYTES_A_SECOND)):
                if row.fields is None:
                    raise BadInput(row.reason)
                named = columns.renamed(row.fields, names, single=source.single, cells=row.cells)
                pair = layouts.read(source.layout or "", named, how.answers)
                if source.guessed:
                    columns.check_question(named, pair.asked, source.layout or "")
                    columns.check_tools(named, source.layout or "")
                    columns.check_media(named, source.layout or "")
                if source.single:
                    known = {"labelled": source.labelled, "named": "label" in names}
                    forming.check_label(named, pair, **known)
                else:
                    pair = pair._replace(worth=forming.worth(row.fields, names))
                reasons = told.dropped
                found = pair_ids.encode(
                    pair, own, talk, row=number,
                    max_length=how.max_length, over_length=how.over_length,
                    lists=how.answers > 2, labelled=source.labelled,
                )  # fmt: skip
        except ValueError as error:
            reason = str(error)
            reasons = told.dropped if reason in layouts.SAYS_NOTHING else reasons
            reasons[reason] += 1
            told.first.setdefault(reason, row.where)
            continue
        ids.append(found)
        keys.append(prompt_key(pair))
        told.notes.update(found.notes)
        told.notes.update(sorted({UNREAD + key for key in _unread(named)}))
    return Shard(ids, np.array(keys, np.uint64), told)


def _unread(row: dict[str, object]) -> set[str]:
    lists = (messages.unnested(held) for held in row.values() if isinstance(held, list | dict))
    return set().union(*map(messages.unread, lists))


def ready(
    how: How, files: str, plain: bool, step: Step
) -> tuple[tokenizer.Tokenizer, chat.Chat | None]:
    """The tokenizer and, unless the texts are plain, the chat template; made once.

    Raises:
      FileNotFoundError, ValueError: one of them cannot be used.
    """
    own = _tokenizer(how.tokenizer, how.chat_template, files)
    if plain:
        chat.check_plain(own)
        return own, None
    with step(how.tokenizer, "the chat template cannot be used: to try it"):
        return own, _chat(how, files)


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: str, chat_template: str | None, _files: str) -> tokenizer.Tokenizer:
    return tokenizer.load(pathlib.Path(folder), chat_template)


@functools.lru_cache(maxsize=4)
def _chat(how: How, files: str) -> chat.Chat:
    own = _tokenizer(how.tokenizer, how.chat_template, files)
    return trial.prepared(
        own, scored_turns=how.scored_turns, date=how.date, end_of_turn=how.end_of_turn
    )


def prompt_key(pair: Pair) -> int:
    """A number below 2**64 that identifies a prompt, or without one the first question."""
    text = json.dumps(pair.prompt or pair.chosen[:1], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

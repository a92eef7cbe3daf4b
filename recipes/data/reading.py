"""The pairs that the settings of a run name: read, split, counted, and told."""

from collections.abc import Collection, Sequence
import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np

from checkpoints_io.errors import BadInput
from recipes.data import layouts, mixture, pairs, sources, workers
from recipes.data.messages import one_line
from recipes.data.mixture import Part
from recipes.data.pairs import Pairs
from recipes.data.tokenise import How, Source
from recipes.data.tokens import PairIds
from recipes.data.workers import Crew
from zoo.text import tokenizer
from zoo.text.tokenizer import Tokenizer


class HeldOut(NamedTuple):
    """A named set of held-out pairs."""

    name: str
    pairs: list[PairIds]


class Told(NamedTuple):
    """What a person is told of one source of pairs."""

    name: str  # train, or the name of a source in a mixture, or of a held-out set
    source: str  # path or hub id
    layout: str
    told: list[str]  # the counts, in sentences
    rows: int
    used: int
    reasons: dict[str, int]  # reason -> rows lost
    notes: dict[str, int]  # as PairIds.notes -> used pairs that have it
    pairs: Sequence[PairIds]  # the used ones


class Data(NamedTuple):
    """The pairs of a run."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # what ends an answer
    train: list[Part]
    held_out: list[HeldOut]
    told: list[Told]


def read(config: ml_collections.ConfigDict, tokenizer_folder: pathlib.Path) -> Data:
    """All of it, from the token cache where it has been read before.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: a sentence about the rows, the tokenizer or the template.
      OSError: the token cache cannot be written.
    """
    how = how_of(config, tokenizer_folder)
    with Crew(how) as crew:
        return _read(config, how, crew)


def _read(config: ml_collections.ConfigDict, how: How, crew: Crew) -> Data:
    cache = pathlib.Path(config.token_cache).expanduser() if config.token_cache else None
    named = mixture.sources_of(config.train_data, config.data)
    training = [source for source, _ in named.values()]
    apart = {
        name: _held_out(f"validation.{name}", given, config.data, training)
        for name, given in mixture.held_out_of(config.validation).items()
    }
    for source in [*training, *apart.values()]:
        _refuse_unknown_columns(source)
    trained = {name: pairs.recognised(source) for name, (source, _) in named.items()}
    others = {name: pairs.recognised(source) for name, source in apart.items()}
    plain = {source.layout in layouts.PLAIN for source, _ in [*trained.values(), *others.values()]}
    if plain == {True} and (config.chat_template or config.data.date or config.data.end_of_turn):
        raise BadInput(
            "--config.chat_template, --config.data.date and --config.data.end_of_turn have no "
            "effect: all texts are plain"
        )
    ready = workers.prepared(how, crew, cache, plain=plain == {True})
    own = tokenizer.apart(pathlib.Path(how.tokenizer), how.chat_template, workers.worker(how))

    told, train, held_out = [], [], []
    keys, first_row = np.zeros(0, np.uint64), 0
    for name, (source, line) in trained.items():
        found = pairs.read(source, how, cache, crew)
        told.append(_told(name, source, found, line))
        kept = found.ids
        if config.validation_split_fraction is not None:
            try:
                kept, held = pairs.split(found, config.validation_split_fraction)
            except ValueError as error:
                raise BadInput(f"{name}: {error}") from error
            of = "validation" if len(trained) == 1 else f"validation/{name}"
            held_out.append(HeldOut(of, mixture.numbered(held, first_row)))
        keys = np.concatenate([keys, found.keys])
        kept, first_row = mixture.numbered(kept, first_row), first_row + found.counts.rows
        train.append(Part(name, named[name][1], kept, first_row - 1))
    for name, (source, line) in others.items():
        found = pairs.read(source, how, cache, crew)
        told.append(_told(name, source, found, line))
        if both := int(np.isin(found.keys, keys).sum()):
            told[-1].told.append(f"{both} of its prompts are in the training data too")
        held_out.append(HeldOut(name, found.ids))
    if not ready.stops:
        token = own.named.get("eos_token", "a special token of the tokenizer")
        told[0].told.append(
            "the chat template writes no special token after the last answer, so the model will "
            f"not learn to stop: add one with --config.data.end_of_turn='{token}'"
        )
    held_out = [held._replace(pairs=spread(held.pairs, config.max_eval_pairs)) for held in held_out]
    return Data(own, ready.stop_ids, train, held_out, told)


def _held_out(
    where: str, given: mixture.Setting, data: mixture.Setting, training: Sequence[Source]
) -> Source:
    """A held-out source, which says how it is read, or is read as the training data if it can be.

    Names of columns are those of the training data where all of them are there; otherwise each of
    them that is there and that ours is not. The layout is that of training data that looks alike.
    """
    own = mixture.source_of(where, given, {"layout": None, "columns": {}})
    said = () if isinstance(given, str) else given
    if "columns" not in said and (names := dict(data["columns"] or {})):
        there = _columns(own._replace(columns=tuple(names.items())), names.values())
        if not there.issuperset(names.values()):
            names = {o: t for o, t in names.items() if t in there and o not in there}
        own = own._replace(columns=tuple(sorted(names.items())))
    if "layout" not in said and data["layout"]:
        alike = {_looks(source) for source in training if source.layout == data["layout"]}
        if _looks(own) in alike:
            own = own._replace(layout=data["layout"])
    return own


def _looks(source: Source) -> str | None:
    """The layout that its columns tell of, whatever is said; None: they tell of none."""
    try:
        return pairs.recognised(source._replace(layout=None))[0].layout
    except ValueError:
        return None


def _columns(source: Source, needed: Collection[str]) -> set[str]:
    """The names of its columns, of as many rows as it takes to meet those needed.

    Of all rows, if need be: the last may be the only one with a system prompt.
    """
    met: set[str] = set()
    wanted = layouts.wanted(dict(source.columns))
    for row in sources.read(source.path, wanted):
        met |= {*(row.fields or {}), *row.unread}
        if met.issuperset(needed):
            break
    return met


def _refuse_unknown_columns(source: Source) -> None:
    names = dict(source.columns)
    there = _columns(source, names.values()) if names else set()
    for ours, theirs in names.items():
        if there and theirs not in there:
            raise BadInput(
                f"{source.path} has no column {theirs!r}, which --config.data.columns or the "
                f"source's own columns give for `{ours}`: it has "
                f"{one_line(', '.join(sorted(there)))}"
            )


def how_of(config: ml_collections.ConfigDict, tokenizer_folder: pathlib.Path) -> How:
    """What the settings say of reading rows."""
    return How(
        tokenizer=str(tokenizer_folder),
        chat_template=config.chat_template,
        scored_turns=config.data.scored_turns,
        date=config.data.date,
        max_length=config.train_seq_len,
        over_length=config.data.over_length,
        max_malformed_fraction=config.data.max_malformed_fraction,
        end_of_turn=config.data.end_of_turn,
    )


def _told(name: str, source: Source, found: Pairs, line: str) -> Told:
    counts = found.counts
    return Told(
        name,
        source.path,
        source.layout or "",
        [line, *counts.lines()],
        counts.rows,
        counts.used,
        dict(counts.malformed + counts.dropped),
        dict(counts.notes),
        found.ids,
    )


def spread(pairs: Sequence[PairIds], most: int | None) -> list[PairIds]:
    """At most so many of them, from all over the list: files are often sorted by kind."""
    steps = np.linspace(0, len(pairs) - 1, min(len(pairs), len(pairs) if most is None else most))
    return [pairs[i] for i in steps.round().astype(int).tolist()]

"""The examples that the settings of a run name: read, split, counted, and reported."""

from collections.abc import Collection, Mapping, Sequence
import pathlib
from typing import Any, NamedTuple, TypeVar

import numpy as np

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from recipes.data import mixture, prompts, source_pairs, texts
from recipes.data.chats import layouts
from recipes.data.chats.messages import one_line
from recipes.data.ids import mismatched, parallel
from recipes.data.ids.counts import Counts
from recipes.data.ids.encode_rows import How
from recipes.data.ids.examples import AnswerIds, Example
from recipes.data.ids.parallel import Crew
from recipes.data.mixture import Part
from recipes.data.prompts import Prompt
from recipes.data.rows import source, sources
from recipes.data.rows.source import Source, Weighted
from recipes.data.source_pairs import Pairs
from recipes.data.texts import Texts
from zoo.text import tokenizer
from zoo.text.tokenizer import Tokenizer


class HeldOut(NamedTuple):
    """A named set of held-out examples."""

    name: str
    examples: list[Example]
    first_row: int = 0  # what the number of its source's first row is in `examples`


class Told(NamedTuple):
    """What is reported about one source."""

    name: str  # train, or the name of a source in a mixture, or of a held-out set
    source: str  # path or hub id
    layout: str
    lines: list[str]  # the counts, in sentences
    counts: Counts
    examples: Sequence[Example]  # the used ones


Some = TypeVar("Some", Part, HeldOut, Told)
Recognised = dict[str, tuple[Source, str]]  # by name; with a line about its layout


class DataSettings(NamedTuple):
    """The data that the settings of a run name."""

    train: dict[str, Weighted]
    validation: dict[str, source.Given]  # held-out sources, as the setting gives them
    common: source.Common
    split_fraction: float | None  # of the prompts, held out
    max_eval_pairs: int | None
    how: How
    token_cache: places.Place | None
    prompts: str | None  # a file of prompts of one's own
    texts: Mapping[str, str]  # files of plain texts, by name


class Data(NamedTuple):
    """The examples of a run."""

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # what ends an answer
    train: list[Part]
    held_out: list[HeldOut]
    sources: list[Told]  # each that was read: to train on, then held out
    prompts: list[Prompt] | None  # one's own
    texts: list[Texts]  # that are evaluated too


def data_settings(
    given: Mapping[str, Any], tokenizer_folder: pathlib.Path, rows: source.Rows
) -> DataSettings:
    """What the settings say about data, whose rows hold what the loss needs."""
    common, cache = source.common(given, rows), given["token_cache"]
    return DataSettings(
        train=source.training(given["train_data"], common),
        validation=source.held_out(given["validation"]),
        common=common,
        split_fraction=given["validation_split_fraction"],
        max_eval_pairs=given.get("max_eval_pairs"),
        how=How(
            tokenizer=str(tokenizer_folder),
            chat_template=given["chat_template"],
            scored_turns=given["data.scored_turns"],
            date=given["data.date"],
            max_length=given["train_seq_len"],
            over_length=given["data.over_length"],
            max_malformed_fraction=given["data.max_malformed_fraction"],
            end_of_turn=given["data.end_of_turn"],
            answers=given["data.answers"],
        ),
        token_cache=places.at(cache, "--config.token_cache") if cache else None,
        prompts=given.get("sample_prompts"),
        texts=given.get("validation_texts") or {},
    )


def ends(settings: DataSettings) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer, and what ends an answer, as `read` has them; no data is looked at.

    Texts count as plain only where there is no chat template.

    Raises:
      FileNotFoundError, ValueError: the tokenizer or the template cannot be used.
    """
    how = settings.how
    with Crew(how) as crew:
        folder = pathlib.Path(how.tokenizer)
        own = tokenizer.apart(folder, how.chat_template, parallel.worker(how))
        plain = own.chat_template is None
        stop_ids = parallel.prepared(how, crew, settings.token_cache, plain=plain).stop_ids
        return tokenizer.ended_by(own, stop_ids), stop_ids


def read(settings: DataSettings) -> Data:
    """All data, from the token cache where it has been read before.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: a sentence about the rows, the tokenizer or the template.
      OSError: the token cache cannot be written.
    """
    with Crew(settings.how) as crew:
        return _read(settings, crew)


def _read(settings: DataSettings, crew: Crew) -> Data:
    how, most = settings.how, settings.max_eval_pairs
    trained, others = _recognised(settings)
    plain = _all_plain([*trained.values(), *others.values()], how)
    ready = parallel.prepared(how, crew, settings.token_cache, plain=plain)
    own_prompts = None
    if settings.prompts is not None:
        own_prompts = prompts.read(settings.prompts, how, crew, plain=plain)
    plain_texts = [
        texts.read(name, path, how, crew, most, plain=plain)
        for name, path in settings.texts.items()
    ]
    own = tokenizer.apart(pathlib.Path(how.tokenizer), how.chat_template, parallel.worker(how))

    train, held_out, told = _read_sources(settings, trained, others, crew)
    if settings.common.labelled:  # each set by itself, so that none sees answers of another
        train = [_beside(one, how.max_length) for one in train]
        held_out = [_beside(one, how.max_length) for one in held_out]
        told = [_beside(one, how.max_length) for one in told]
    examples = (one for part in (*train, *held_out) for one in part.examples)
    if how.answers > 2 and all(len(one.answers) <= 2 for one in examples):
        raise BadInput(
            f"--config.data.answers={how.answers} has no effect: no row has more than two ranked "
            "answers; leave it at 2"
        )
    if not ready.stops:
        token = own.named.get("eos_token", "a special token of the tokenizer")
        told[0].lines.append(
            "the chat template writes no special token after the last answer, so that the model "
            f"will not learn to stop: add one with --config.data.end_of_turn='{token}'"
        )
    held_out = [held._replace(examples=spread(held.examples, most)) for held in held_out]
    own = tokenizer.ended_by(own, ready.stop_ids)
    return Data(own, ready.stop_ids, train, held_out, told, own_prompts, plain_texts)


def _recognised(settings: DataSettings) -> tuple[Recognised, Recognised]:
    """The sources to train on, and the held-out ones, with their layouts."""
    training = [one.source for one in settings.train.values()]
    apart = {
        name: _held_out(f"validation.{name}", given, settings, training)
        for name, given in settings.validation.items()
    }
    for one in [*training, *apart.values()]:
        _refuse_unknown_columns(one)
    trained = {name: source_pairs.recognised(one.source) for name, one in settings.train.items()}
    return trained, {name: source_pairs.recognised(one) for name, one in apart.items()}


def _all_plain(recognised: Collection[tuple[Source, str]], how: How) -> bool:
    """Whether no source has conversations; then settings of chat templates are refused."""
    plain = all(one.layout in layouts.PLAIN for one, _ in recognised)
    if plain and (how.chat_template or how.date or how.end_of_turn):
        raise BadInput(
            "--config.chat_template, --config.data.date and --config.data.end_of_turn have no "
            "effect: all texts are plain"
        )
    return plain


def _read_sources(
    settings: DataSettings, trained: Recognised, others: Recognised, crew: Crew
) -> tuple[list[Part], list[HeldOut], list[Told]]:
    """The examples to train on and those held out, by a share of each source or separate files."""
    how, cache = settings.how, settings.token_cache
    told, train, held_out = [], [], []
    keys, first_row = np.zeros(0, np.uint64), 0
    for name, (one, line) in trained.items():
        found = source_pairs.read(one, how, cache, crew)
        told.append(_told(name, one, found, line))
        kept = found.ids
        if settings.split_fraction is not None:
            try:
                kept, held = source_pairs.split(found, settings.split_fraction)
            except ValueError as error:
                raise BadInput(f"{name}: {error}") from error
            of = "validation" if len(trained) == 1 else f"validation/{name}"
            held_out.append(HeldOut(of, mixture.numbered(held, first_row), first_row))
        keys = np.concatenate([keys, found.keys])
        kept, first_row = mixture.numbered(kept, first_row), first_row + found.counts.rows
        train.append(Part(name, settings.train[name].weight, kept, first_row - 1))
    for name, (one, line) in others.items():
        found = source_pairs.read(one, how, cache, crew)
        told.append(_told(name, one, found, line))
        if both := int(np.isin(found.keys, keys).sum()):
            told[-1].lines.append(f"{both} of its prompts are in the training data too")
        held_out.append(HeldOut(name, found.ids))
    return train, held_out, told


def _beside(some: Some, max_length: int) -> Some:
    """The same examples, in which each answer is paired with one to another prompt."""
    answers = [one for one in some.examples if isinstance(one, AnswerIds)]
    try:
        return some._replace(examples=[*mismatched.beside(answers, max_length)])
    except ValueError as error:
        raise BadInput(f"{some.name}: {error}") from error


def _held_out(
    where: str, given: source.Given, settings: DataSettings, training: Sequence[Source]
) -> Source:
    """A held-out source, read as it says itself, or like the training data if it can be.

    Column names are those of the training data where all of them are there; otherwise those that
    are there while our name is not. The layout is that of training data with the same columns.
    """
    own = source.parsed(where, given, settings.common._replace(layout=None, columns={}))
    said = () if isinstance(given, str) else given
    if "columns" not in said and (names := dict(settings.common.columns)):
        there = _columns(own._replace(columns=tuple(names.items())), names.values())
        if not there.issuperset(names.values()):
            names = {o: t for o, t in names.items() if t in there and o not in there}
        own = own._replace(columns=tuple(sorted(names.items())))
    if "layout" not in said and settings.common.layout:
        alike = {_looks(one) for one in training if one.layout == settings.common.layout}
        if _looks(own) in alike:
            own = own._replace(layout=settings.common.layout)
    return own


def _looks(one: Source) -> str | None:
    """The layout recognised from its columns, whatever is set; None: there is none."""
    try:
        return source_pairs.recognised(one._replace(layout=None))[0].layout
    except ValueError:
        return None


def _columns(one: Source, needed: Collection[str]) -> set[str]:
    """The names of a source's columns, from as many rows as it takes to find those needed.

    From all rows, if need be: the last may be the only one with a system prompt.
    """
    met: set[str] = set()
    wanted = layouts.wanted(dict(one.columns), single=one.single)
    for row in sources.read(one.path, wanted):
        met |= {*(row.fields or {}), *row.unread}
        if met.issuperset(needed):
            break
    return met


def _refuse_unknown_columns(one: Source) -> None:
    names = dict(one.columns)
    there = _columns(one, names.values()) if names else set()
    for ours, theirs in names.items():
        if there and theirs not in there:
            raise BadInput(
                f"{one.path} has no column {theirs!r}, which --config.data.columns or the "
                f"source's own columns give for `{ours}`: it has "
                f"{one_line(', '.join(sorted(there)))}"
            )


def _told(name: str, one: Source, found: Pairs, line: str) -> Told:
    lines = [line, *found.counts.lines()]
    return Told(name, one.path, one.layout or "", lines, found.counts, found.ids)


def spread(examples: Sequence[Example], most: int | None) -> list[Example]:
    """At most `most` examples, from all over the list: files are often sorted by kind."""
    most = len(examples) if most is None else min(len(examples), most)
    steps = np.linspace(0, len(examples) - 1, most)
    return [examples[i] for i in steps.round().astype(int).tolist()]

"""Everything from a source to its pairs as ids: read, laid out, tokenised, counted, split."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import hashlib
import itertools
from typing import NamedTuple

import numpy as np

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from recipes.data import shown
from recipes.data.chats import columns, layouts, messages
from recipes.data.chats.messages import one_line
from recipes.data.ids import counts, parallel
from recipes.data.ids.counts import Counts
from recipes.data.ids.encode_rows import How
from recipes.data.ids.examples import Example, PairIds, as_bytes, turned
from recipes.data.ids.parallel import Crew
from recipes.data.rows import sources
from recipes.data.rows.records import Row
from recipes.data.rows.source import Source

REASONS = 3  # why rows hold no pair, at most, in an error


class Pairs(NamedTuple):
    """The usable pairs of a source, in its order."""

    ids: list[Example]
    keys: np.ndarray  # uint64: a prompt's, for each
    counts: Counts


def recognised(source: Source) -> tuple[Source, str]:
    """The source with its layout, and a line that names it and the columns that are not read.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: no layout can be recognised from its rows.
    """
    given = dict(source.columns)
    doubt, refused, fallback = "", "", None
    beside = _beside(source.path)
    rows = sources.read(source.path, layouts.wanted(given, single=source.single))
    recognise = columns.recognised
    if source.single:
        recognise = functools.partial(columns.recognised_single, labelled=source.labelled)
    for number, row in enumerate(itertools.islice(rows, 1000)):
        try:
            if row.fields is None:
                raise BadInput(row.reason)
            named = columns.renamed(row.fields, given, single=source.single, cells=row.cells)
            layout = source.layout or recognise(dict.fromkeys(row.unread) | named)
        except ValueError as error:
            refused = refused or f"{row.where}: {error}"
            continue
        worth = {given[name] for name in columns.WORTH if name in given}
        known = layouts.LAYOUTS[layout].columns | worth
        unread = sorted({*row.unread, *(named.keys() - known)})
        line = f"layout {layout}" + ("" if source.layout else ", recognised from the columns")
        line += f"; not read: {one_line(', '.join(unread))}" if unread else ""
        found = source._replace(layout=layout, guessed=source.layout is None), line
        try:
            others = lambda number=number, row=row: beside(number, frozenset(row.unread))
            if source.layout or _is_pair(named, layout, others):
                return found
            fallback = fallback or found
        except ValueError as error:
            doubt = doubt or f"{row.where}: {error}"
    if fallback and not doubt:
        return fallback
    if told := doubt or refused:
        what = "answers" if source.single else "pairs"
        raise BadInput(f"{source.path} has no rows that can be read as {what}: {told}")
    raise BadInput(f"{source.path} holds no rows")


def _beside(path: str) -> Callable[[int, frozenset[str]], dict[str, object]]:
    """What rows hold in columns that are not read, by number: the source is read once more for it.

    Rows must be requested in order.
    """
    wanted: frozenset[str] = frozenset()
    rows: Iterator[Row] = iter(())
    at = 0

    def of(number: int, names: frozenset[str]) -> dict[str, object]:
        nonlocal wanted, rows, at
        if names - wanted:
            wanted, at = wanted | names, 0
            rows = iter(sources.read(path, wanted))
        row = next(itertools.islice(rows, number - at, None), None) if names else None
        at = number + 1 if names else at
        return {n: v for n, v in ((row and row.fields) or {}).items() if n in names}

    return of


def _is_pair(
    named: dict[str, object], layout: str, others: Callable[[], dict[str, object]]
) -> bool:
    """Does a row hold a pair? A malformed one does not decide: it may have another's form.

    `others` gives the columns that no layout reads.

    Raises:
      ValueError: a column may hold the question, and this layout does not read it.
    """
    try:
        pair = layouts.LAYOUTS[layout].read(named)
        heard = pair.asked
    except ValueError:
        pair, heard = None, ""
    if pair or layout == columns.PLAIN:
        columns.check_question(named, heard, layout)
        columns.check_tools(named, layout)
        columns.check_media(named, layout)
    if layout == columns.PLAIN or (pair and not heard):
        # Nothing is asked: may the question be in a column of any other name?
        for name, value in others().items():
            said = isinstance(value, str) or messages.are_messages(value)
            few = 1 if said else 3  # words: tags and notes have no more
            words = any(len(text.split()) > few for text in columns.asked(value))
            if words and not columns.holds(heard, value):
                raise BadInput(columns.unread(name, heard, layout))
    return pair is not None


def read(
    source: Source, how: How, cache: places.Place | None = None, crew: Crew | None = None
) -> Pairs:
    """The pairs of a source whose layout is known. Rows that cannot be used are counted.

    With `cache`, a directory, they are tokenised once: a later start maps what an earlier one kept.
    `crew` has the workers; by default they are this call's own.

    Raises:
      FileNotFoundError: there is no such source, or no such tokenizer.
      ValueError: no pair is left, or more than `max_malformed_fraction` of the rows hold no pair;
        the message names the first of them.
      OSError: the cache cannot be written.
    """
    with contextlib.nullcontext(crew) if crew else Crew(how) as crew:
        if cache is None:
            shards = parallel.in_memory(source, how, crew)
        else:
            shards = parallel.kept(source, how, cache, crew)
    ids: list[Example] = [pair for shard in shards for pair in shard.ids]
    keys = np.concatenate([np.zeros(0, np.uint64), *(shard.keys for shard in shards)])
    total = functools.reduce(counts.add, (shard.counts for shard in shards), counts.none())
    digests = set(map(_digest, ids))
    total = total._replace(
        repeated=len(ids) - len(digests), contradicted=_contradicted(ids, keys, digests)
    )
    _check(source, total, how)
    return Pairs(ids, keys, total)


def _check(source: Source, total: Counts, how: How) -> None:
    share = how.max_malformed_fraction
    what = "answer" if source.single else "pair"
    if not total.rows:
        raise BadInput(f"{source.path} holds no rows")
    if total.malformed.total() > share * total.rows:
        reasons = total.malformed.most_common(REASONS)
        told = [f"{number} like {total.first[reason]}: {reason}" for reason, number in reasons]
        if more := len(total.malformed) - len(told):
            told.append(f"the rest for {more} other reasons")
        raise BadInput(
            f"{total.malformed.total()} of {total.rows} rows of {source.path} hold no {what}: "
            f"{'; '.join(told)}. Fix them, choose another --config.data.layout, or raise "
            f"--config.data.max_malformed_fraction (now {share}; with 1, python -m recipes.data "
            "counts every reason)"
        )
    if not total.used:
        raise BadInput(
            f"no row of {source.path} can be used: {'; '.join(total.lines()[1:])} "
            f"(--config.train_seq_len={how.max_length})"
        )


def split(pairs: Pairs, fraction: float) -> tuple[list[Example], list[Example]]:
    """(train, held out): a prompt's hash decides, so that no prompt stands on both sides.

    Of few prompts at least one is on either side.

    Raises:
      ValueError: there is but one.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    keys = pairs.keys.tolist()
    if len(set(keys)) < 2:
        raise BadInput(
            f"--config.validation_split_fraction={fraction} holds out prompts, but all "
            f"{len(pairs.ids)} {shown.noun(pairs.ids)} have the same prompt: set "
            "--config.validation_split_fraction=None, or give a held-out file with "
            "--config.validation.NAME=FILE"
        )
    bound = min(max(int(fraction * 2**64), min(keys) + 1), max(keys))
    for pair, key in zip(pairs.ids, keys, strict=True):
        sides[key < bound].append(pair)
    return sides


def fingerprint(ids: Iterable[Example]) -> str:
    """Sixteen hex digits that change with any token, mask or order of the pairs."""
    digest = hashlib.sha256()
    for pair in ids:
        digest.update(as_bytes(pair))
    return digest.hexdigest()[:16]


def _contradicted(ids: list[Example], keys: np.ndarray, digests: set[bytes]) -> int:
    """Pairs whose answers another pair has the other way round."""
    prompts, times = np.unique(keys, return_counts=True)
    several = np.isin(keys, prompts[times > 1])
    return sum(
        _digest(turned(pair)) in digests
        for pair, asked_again in zip(ids, several.tolist(), strict=True)
        if asked_again and isinstance(pair, PairIds)
    )


def _digest(pair: Example) -> bytes:
    return hashlib.blake2b(as_bytes(pair), digest_size=16).digest()

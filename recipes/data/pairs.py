"""Everything from a source to its pairs as ids: read, laid out, tokenised, counted, split."""

import collections
from collections.abc import Iterable
import hashlib
import json
from typing import NamedTuple

import ml_collections
import tqdm

from recipes.data import chat, layouts, sources, tokens
from recipes.data.tokens import PairIds


class Counts(NamedTuple):
    """What became of the rows of a source."""

    rows: int
    malformed: collections.Counter[str]  # reason -> rows that hold no pair
    dropped: collections.Counter[str]  # reason -> pairs that cannot be trained on
    boundary_moved: int
    truncated: int
    empty: int  # an answer without text
    repeated: int  # the same tokens as an earlier pair
    first: dict[str, str]  # reason -> where it was met first

    def lines(self) -> list[str]:
        """The counts, as they are shown at the start of a run."""
        told = [f"{self.used} of {self.rows} rows used"]
        for kind, reasons in (("malformed", self.malformed), ("dropped", self.dropped)):
            told += [
                f"{number} {kind}: {reason} (first: {self.first[reason]})"
                for reason, number in reasons.most_common()
            ]
        if self.boundary_moved:
            told.append(
                f"{self.boundary_moved} with a token across the end of the prompt (kept whole)"
            )
        if self.truncated:
            told.append(f"{self.truncated} pairs cut at train_seq_len")
        if self.empty:
            told.append(f"{self.empty} with an answer that is empty (kept: its end is scored)")
        if self.repeated:
            told.append(f"{self.repeated} that repeat an earlier pair (kept)")
        return told

    @property
    def used(self) -> int:
        """Rows that became pairs."""
        return self.rows - self.malformed.total() - self.dropped.total()


class Pairs(NamedTuple):
    """The usable pairs of a source, in its order."""

    ids: list[PairIds]
    prompts: list[layouts.Turns | str]
    counts: Counts


def read(
    source: str, settings: ml_collections.ConfigDict, tokenizer: chat.Tokenizer, max_length: int
) -> Pairs:
    """The pairs of a source. Rows that cannot be used are counted, with the reason.

    Raises:
      ValueError: no pair is left, or more than `max_malformed_fraction` of the rows hold no pair;
        the message names the first of them.
    """
    layout = layouts.LAYOUTS[settings.layout]
    malformed, dropped = collections.Counter(), collections.Counter()
    first: dict[str, str] = {}
    ids: list[PairIds] = []
    prompts: list[layouts.Turns | str] = []
    rows = empty = 0
    for row in tqdm.tqdm(sources.read(source), f"reading {source}", delay=2, leave=False):
        rows += 1
        reasons = malformed
        try:
            if row.fields is None:
                raise ValueError("not a JSON object")
            pair = layout(row.fields)
            reasons = dropped
            encoded = tokens.encode(
                pair,
                tokenizer,
                row=rows - 1,
                max_length=max_length,
                over_length=settings.over_length,
                mask_user_turns=settings.mask_user_turns,
            )
        except ValueError as error:
            reason = str(error)
            # An equal pair is a sound row that says nothing.
            reasons = dropped if reason == "chosen equals rejected" else reasons
            reasons[reason] += 1
            first.setdefault(reason, row.where)
            continue
        ids.append(encoded)
        prompts.append(pair.prompt)
        empty += layouts.has_empty_answer(pair)
    counts = Counts(
        rows=rows,
        malformed=malformed,
        dropped=dropped,
        boundary_moved=sum(pair.boundary_moved for pair in ids),
        truncated=sum(pair.truncated for pair in ids),
        empty=empty,
        repeated=len(ids) - len({fingerprint([pair]) for pair in ids}),
        first=first,
    )
    _check(source, counts, settings.max_malformed_fraction)
    return Pairs(ids, prompts, counts)


def _check(source: str, counts: Counts, share: float) -> None:
    if not counts.rows:
        raise ValueError(f"{source} holds no rows")
    if counts.malformed.total() > share * counts.rows:
        reason, _ = counts.malformed.most_common(1)[0]
        raise ValueError(
            f"{counts.malformed.total()} of {counts.rows} rows of {source} hold no pair; the first "
            f"is {counts.first[reason]}: {reason}. Mend them, choose another --config.data.layout, "
            f"or raise --config.data.max_malformed_fraction (now {share})"
        )
    if not counts.used:
        raise ValueError(f"no row of {source} can be used: {'; '.join(counts.lines()[1:])}")


def split(pairs: Pairs, fraction: float) -> tuple[list[PairIds], list[PairIds]]:
    """(train, held out): a prompt's hash decides, so that no prompt stands on both sides.

    Raises:
      ValueError: one side would be empty.
    """
    sides: tuple[list[PairIds], list[PairIds]] = ([], [])
    for ids, prompt in zip(pairs.ids, pairs.prompts, strict=True):
        sides[int.from_bytes(prompt_key(prompt)) < fraction * 2**64].append(ids)
    if not all(sides):
        raise ValueError(
            f"--config.validation_split_fraction={fraction} leaves {len(sides[0])} pairs to train "
            f"on and {len(sides[1])} held out of {len(pairs.ids)}; both need at least one"
        )
    return sides


def prompt_key(prompt: layouts.Turns | str) -> bytes:
    """Eight bytes that stand for a prompt."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()[:8]


def fingerprint(ids: Iterable[PairIds]) -> str:
    """Sixteen hex digits that change with any token, mask or order of the pairs."""
    digest = hashlib.sha256()
    for pair in ids:
        for array in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(array).to_bytes(8) + array.tobytes())
        digest.update(pair.chosen_scored.tobytes() + pair.rejected_scored.tobytes())
    return digest.hexdigest()[:16]

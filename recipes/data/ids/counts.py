"""What became of the rows of a source: each is used, or counted with the reason."""

import collections
from typing import Any, NamedTuple

from recipes.data.chats.messages import one_line
from recipes.data.ids.examples import NOTES, described

SHOWN = 20  # reasons


class Counts(NamedTuple):
    """The rows of a source: rows in = rows used + rows malformed + rows dropped."""

    rows: int
    malformed: collections.Counter[str]  # reason -> rows that hold no pair
    dropped: collections.Counter[str]  # reason -> pairs that cannot be trained on
    notes: collections.Counter[str]  # note, as in PairIds -> pairs that are used
    first: dict[str, str]  # reason -> where it first occurred
    repeated: int = 0  # used pairs with the same tokens as an earlier one
    contradicted: int = 0  # used pairs whose answers another pair has in reverse

    @property
    def lost(self) -> collections.Counter[str]:
        """How many rows did not become pairs, by reason."""
        return self.malformed + self.dropped

    @property
    def used(self) -> int:
        """Rows that became pairs."""
        return self.rows - self.lost.total()

    def lines(self) -> list[str]:
        """The lines that show the counts at the start of a run."""
        told = [f"{self.used} of {self.rows} rows used"]
        for kind, reasons in (("malformed", self.malformed), ("dropped", self.dropped)):
            told += [
                f"{number} {kind}: {one_line(reason)} (first: {one_line(self.first[reason])})"
                for reason, number in reasons.most_common(SHOWN)
            ]
            if more := dict(reasons.most_common()[SHOWN:]):
                told.append(f"{sum(more.values())} {kind} for {len(more)} other reasons")
        noted = sorted(self.notes, key=lambda name: (name not in NOTES, name))
        told += [f"{self.notes[name]} {described(name)}" for name in noted if self.notes[name]]
        if self.repeated:
            told.append(f"{self.repeated} repeat an earlier one (kept)")
        if self.contradicted:
            told.append(
                f"{self.contradicted} contradicted by another row that prefers the other "
                "answer (kept)"
            )
        return told


def none() -> Counts:
    """The counts of no rows."""
    counter = collections.Counter
    return Counts(0, counter(), counter(), counter(), {})


def from_json(kept: dict[str, Any]) -> Counts:
    """The counts that were kept as JSON."""
    counter = collections.Counter
    return Counts(
        kept["rows"],
        counter(kept["malformed"]),
        counter(kept["dropped"]),
        counter(kept["notes"]),
        kept["first"],
        kept["repeated"],
        kept.get("contradicted", 0),
    )


def add(before: Counts, after: Counts) -> Counts:
    """The counts of the rows of both, in this order."""
    return Counts(
        before.rows + after.rows,
        before.malformed + after.malformed,
        before.dropped + after.dropped,
        before.notes + after.notes,
        after.first | before.first,
        before.repeated + after.repeated,
        before.contradicted + after.contradicted,
    )

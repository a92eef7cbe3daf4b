"""A report on the data, to read before training: for a terminal, and as one HTML page."""

from collections.abc import Iterable, Sequence
import itertools
import re
from typing import NamedTuple

import numpy as np

from checkpoints_io.unseen import visible
from recipes.data import shown
from recipes.data.ids.examples import Example, called, described, is_ranked
from recipes.data.packed import shapes, streams
from recipes.data.packed.packing import Shape
from recipes.data.run_data import Told, spread
from recipes.pages import template
from zoo.text.tokenizer import Tokenizer

QUANTILES = {"min": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
ROW_LENGTHS = (1024, 2048, 4096)  # reported in addition to the run's
COLORS = {"heading": 1, "prompt": 2, "scored": 32, "unscored": 33, "left_out": 3}
BLOCKS = " ▁▂▃▄▅▆▇█"


class Histogram(NamedTuple):
    """How many examples have how many tokens; histograms of one part share bins, from 0 on."""

    name: str
    quantiles: dict[str, int]
    counts: list[int]
    labels: list[str]  # the lengths that each bin covers
    step: int  # the width of a bin in tokens


class Pack(NamedTuple):
    """How the examples fill rows of one length."""

    rows: int  # of a micro-batch
    fill: shapes.Fill
    per_token: float  # positions per real token, which counts a prompt with either answer
    in_two: float  # fraction of the pairs, or lists, that are split over two rows


def text(
    parts: Iterable[Told], tokenizer: Tokenizer, shape: Shape, *, rows: int = 3, color: bool
) -> str:
    """The report for a terminal, with `rows` rows of each part; scored text is in ⟦ ⟧."""
    painted = lambda what, kind: f"\x1b[{COLORS[kind]}m{what}\x1b[0m" if color else what
    lines, parts = [], list(parts)
    what = shown.noun([one for part in parts for one in part.examples])
    for part in parts:
        heading = visible(f"{part.name}: {part.source}, read as {part.layout}")
        lines += [
            painted(heading, "heading"),
            *(f"  {visible(line)}" for line in _counted(part, what)),
        ]
        if part.examples:
            found = packs(part.examples, shape)
            lines += ["", *_length_lines(part.examples), "", *_pack_lines(found, what)]
        for pair in spread(part.examples, rows):
            heading = painted(f"  row {pair.row}", "heading")
            lines += ["", heading, *(f"    {described(note)}" for note in pair.notes)]
            lines += [f"    {line}" for line in shown.lines_of(pair, tokenizer, painted)]
        lines.append("")
    return "\n".join(lines)


def page(parts: Iterable[Told], tokenizer: Tokenizer, shape: Shape, *, rows: int = 20) -> str:
    """The report as one HTML page that needs nothing else, with `rows` rows of each part."""
    parts = list(parts)
    return template.rendered(
        "data_page.html.jinja",
        {"nice": _nice, "runs": shown.runs},
        parts=parts,
        shape=shape,
        what=shown.noun([one for part in parts for one in part.examples]),
        histograms=lambda pairs: histograms(pairs, 40),
        longer=_longer,
        packs=lambda pairs: packs(pairs, shape),
        rows=lambda pairs: [
            (pair, shown.pieces_of(pair, tokenizer)) for pair in spread(pairs, rows)
        ],
        by_space=lambda said: re.split(r"(\s)", said),
        described=described,
    )


def lengths(pairs: Sequence[Example]) -> dict[str, np.ndarray]:
    """The numbers of tokens of prompts and answers, by name; scored ones are of all answers."""
    found = {"prompt": [len(pair.prompt) for pair in pairs]}
    for i, name in enumerate(called(pairs[0], max(len(pair.answers) for pair in pairs))):
        found[name] = [len(pair.answers[i].ids) for pair in pairs if i < len(pair.answers)]
    found["scored"] = [sum(streams.scored_tokens(pair)) for pair in pairs]
    return {name: np.array(counts) for name, counts in found.items()}


def histograms(pairs: Sequence[Example], most: int) -> list[Histogram]:
    """A histogram for each of `lengths`, with at most `most` bins; outliers share the last."""
    named_lengths = lengths(pairs)
    found = [*named_lengths.values()]
    longest = max(row.max() for row in found)
    end = int(min(longest, 2 * max(np.quantile(row, 0.99) for row in found)))
    step = _nice((end + 1) / most)
    bins = end // step + 1
    labels = [f"{n} to {n + step - 1}" if step > 1 else str(n) for n in range(0, bins * step, step)]
    if longest >= bins * step:
        labels[-1] = f"{(bins - 1) * step} or more"
    quantiles = [np.quantile(row, [*QUANTILES.values()], method="inverted_cdf") for row in found]
    named = [dict(zip(QUANTILES, map(int, column), strict=True)) for column in quantiles]
    counts = [np.bincount(np.minimum(row // step, bins - 1), minlength=bins) for row in found]
    return [
        Histogram(name, of_name, count.tolist(), labels, step)
        for name, of_name, count in zip(named_lengths, named, counts, strict=True)
    ]


def packs(pairs: Sequence[Example], shape: Shape) -> dict[int, Pack | None]:
    """The packing by row length, the run's first; None if the longest pair does not fit."""
    longest = max(map(streams.longest, pairs))
    some = spread(pairs, shapes.LOOKED_AT * shape.examples)
    most = shape.rows * shape.row_length // shape.shards
    given = dict(per_update=shape.examples, shards=shape.shards, most=most, alike=shape.alike)
    found: dict[int, Pack | None] = {}
    for length in dict.fromkeys((shape.row_length, *ROW_LENGTHS)):
        fits = longest <= length
        here = shapes.choose(some, row_length=length, **given) if found and fits else shape
        apart = sum(not streams.fits_a_row(pair, here) for pair in some)
        found[length] = None
        if fits and (here.rows > 1 or not apart):
            fill = shapes.fill(some, here)
            again = ((pair, streams.shared(pair, here).count(False)) for pair in some)
            twice = (len(pair.prompt) * count for pair, count in again)
            positions = (sum(map(streams.stored_length, some)) + sum(twice)) / fill.share
            per_token = positions / sum(map(streams.real_tokens, some))
            found[length] = Pack(here.rows, fill, per_token, apart / len(some))
    return found


def _counted(part: Told, what: str) -> list[str]:
    said, counts = "\n".join(part.lines), part.counts
    rows, known = counts.rows, len(part.examples) + counts.lost.total()
    s = lambda n: "s" * (n != 1)
    more = {why: f"{n:,} row{s(n)} lost: {why}" for why, n in counts.lost.items()}
    one, notes = what.removesuffix("s"), counts.notes
    more |= {described(k): f"{n:,} {one}{s(n)} {described(k)}" for k, n in notes.items() if n}
    untold = [] if known == rows else [f"{known:,} of {rows:,} rows are accounted for"]
    return part.lines + untold + [line for why, line in more.items() if why not in said]


def _length_lines(pairs: Sequence[Example]) -> list[str]:
    found = histograms(pairs, 36)
    axis = f"0 … {found[0].labels[-1]}, a block is {found[0].step}"
    lines = ["  tokens  " + "".join(f"{name:>7}" for name in QUANTILES) + f"  {axis}"]
    for name, quantiles, counts, *_ in found:
        bars = "".join(BLOCKS[-(-8 * n // max(counts))] for n in counts).rstrip()
        lines.append(f"  {name:<8}" + "".join(f"{n:>7}" for n in quantiles.values()) + f"  {bars}")
    return [*lines, *(f"  {sentence}" for sentence in _longer(pairs))]


def _longer(pairs: Sequence[Example]) -> Iterable[str]:
    """Sentences on which of the answers is longer, if there are two or more."""
    if not is_ranked(pairs[0]):
        return
    ends = [[len(pair.answers[i].ids) for pair in pairs] for i in (0, -1)]
    chosen, rejected = map(np.array, ends)
    lists = any(len(pair.answers) > 2 for pair in pairs)
    said = "The best answer is longer than the worst" if lists else "The chosen answer is longer"
    told = f"{said} in {np.mean(chosen > rejected):.0%} of the {'lists' if lists else 'pairs'}"
    yield f"{told}, shorter in {np.mean(chosen < rejected):.0%}."


def _pack_lines(found: dict[int, Pack | None], what: str) -> list[str]:
    in_two = what == "pairs"
    lines = ["  rows of  filled  micro-batches  positions per real token"]
    lines[0] += "  pairs in two rows" if in_two else ""
    for length, pack in found.items():
        told = f"the longest {what.removesuffix('s')} does not fit"
        if pack:
            told = "{:>6.1%}  {:>13.1f}  {:>24.2f}".format(*pack.fill, pack.per_token)
            told += f"  {pack.in_two:>17.1%}" if in_two else ""
        lines.append(f"  {length:>7}  {told}{'' if lines[1:] else '  (the run)'}")
    return lines


def _nice(least: float) -> int:
    return next(n for k in itertools.count() for n in (10**k, 2 * 10**k, 5 * 10**k) if n >= least)

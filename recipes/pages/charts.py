"""Charts computed here as SVG paths, so that the page needs no script to draw them."""

from collections.abc import Iterable, Sequence
import itertools
import math
from typing import NamedTuple

LEFT, WIDTH, TOP, HEIGHT = 44, 292, 10, 120  # the plot area within the drawing
POINTS = 240  # the most points of a curve

Number = int | float
Curve = Sequence[tuple[Number, Number]]


class Line(NamedTuple):
    """One curve."""

    kind: str  # of it: train, held, and whether it is the second of its figure
    run: int
    says: str  # what it is, in words
    points: Curve  # as they were recorded


class Drawn(NamedTuple):
    """A line in the drawing."""

    kind: str
    run: int
    says: str
    path: str  # of SVG
    dots: list[tuple[str, str, str]]  # x, y, label


class Chart(NamedTuple):
    """Lines over the steps, in one plot area."""

    title: str
    says: str
    lines: list[Drawn]
    across: list[tuple[str, str]]  # position and label of each tick
    up: list[tuple[str, str]]


def chart(title: str, says: str, lines: Iterable[Line]) -> Chart | None:
    """A chart scaled to hold all lines; None if there is no point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    low, high = _spread(min(ys), max(ys))
    end = max(max(xs), 1)
    x_of = lambda x: f"{LEFT + WIDTH * x / end:.1f}"
    y_of = lambda y: f"{TOP + HEIGHT * (1 - (y - low) / (high - low)):.1f}"
    drawn = []
    for line in lines:
        few = thinned(line.points)
        path = " ".join(f"{'L' if i else 'M'}{x_of(x)} {y_of(y)}" for i, (x, y) in enumerate(few))
        dotted = few if line.kind.startswith("held") or len(few) == 1 else []
        dots = [(x_of(x), y_of(y), f"{line.says}, step {x:,.0f}: {y:.4g}") for x, y in dotted]
        drawn.append(Drawn(line.kind, line.run, line.says, path, dots))
    across = [(x_of(x), short(x)) for x in ticks(0, end, 5) if x == round(x)]
    return Chart(title, says, drawn, across, [(y_of(y), short(y)) for y in ticks(low, high, 4)])


def thinned(points: Curve, most: int = POINTS) -> Curve:
    """At most `most` points, each the mean of its neighbours; the last one is unchanged."""
    if len(points) <= most:
        return [*points]
    found, cuts = [], [i * (len(points) - 1) // (most - 1) for i in range(most)]
    for start, stop in itertools.pairwise(cuts):
        some = points[start:stop]
        x, y = (math.fsum(each) / len(some) for each in zip(*some, strict=True))
        found.append((x, y))
    return [*found, points[-1]]


def ticks(low: Number, high: Number, about: int) -> list[float]:
    """Round numbers from `low` to `high`."""
    wide = (high - low) / about
    power = 10.0 ** math.floor(math.log10(wide))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= wide * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(x: Number) -> str:
    """A short form of a number: 12000 -> '12k', 0.0000005 -> '5e-7'."""
    if x and (abs(x) < 1e-3 or abs(x) >= 1e9):
        mantissa, _, exponent = f"{x:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= 10 * size or (abs(x) >= size and x % size == 0):
            return f"{x / size:.4g}{letter}"
    return f"{x:.4g}"


def _spread(low: Number, high: Number) -> tuple[Number, Number]:
    """A range slightly larger than the data's, so that no curve is on the edge, except at 0."""
    if low == high == 0:
        return 0, 1
    room = 0.06 * (high - low) or max(abs(high), 1e-9) * 0.1
    return (low if low == 0 else low - room), (high if high == 0 else high + room)

"""What a run has learnt, as one HTML page made from its files; several runs are overlaid."""

from collections.abc import Iterator, Sequence
import math
from typing import NamedTuple

from checkpoints_io import places
from recipes.pages import charts, run_files, template
from recipes.pages.charts import Chart, Line
from recipes.pages.run_files import RunFiles

FILE = "report.html"
# Of each chart: title, what it shows, and the figures; of two the second is dashed.
CHARTS = (
    ("Reward margin", "chosen less rejected reward", ("dpo_reward_margin",)),
    ("Accuracy", "pairs whose chosen answer gained more", ("dpo_accuracy",)),
    ("Loss", "of the objective", ("dpo_loss",)),
    ("Loss", "nats per scored token", ("loss",)),
    ("Right answers", "share of a task's", ("acc", "acc_norm")),
    ("Exact answers", "share of a task's", ("exact_match",)),
    ("Bits per byte", "of plain texts", ("bits_per_byte",)),
    ("Drift", "log p, policy less reference, nats", ("drift_chosen", "drift_rejected")),
    ("KL", "of the chosen answers, nats per token", ("kl_chosen",)),
    ("Length against reward", "correlation of margin and extra length", ("length_correlation",)),
    ("Likeliest tokens", "share of the first answer's", ("token_accuracy",)),
    ("Gradient norm", "before the clip", ("gradient_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Throughput", "real tokens a second", ("tokens_per_second",)),
    ("Fill", "share of the positions", ("pack_fill",)),
)
# Where time goes, in the order of the bar.
TIMES = {
    "first_step": "first steps, with compilation",  # in records of older runs
    "compiling": "compiling",
    "steps": "steps",
    "input": "waiting for data",
    "evaluation": "evaluation",
    "samples": "samples",
    "page": "the page itself",
    "saving": "saving",
    "export": "export",
}
STEPS = 6  # steps of which samples are shown
RUNS = 8  # as many as there are colours
# The log-ratios in nats at which a token's colour becomes stronger.
SHADES = (0.05, 0.25, 0.75, 1.5)


class Prompt(NamedTuple):
    """A prompt with the answers to it."""

    text: str
    where: str
    rows: list[tuple[str, int, list[tuple[str, list | str]]]]  # step, run, texts by name
    left_out: int  # number of steps not shown


def write(directory: places.Place) -> None:
    """Writes the page of one run into its directory.

    Raises:
      FileNotFoundError, OSError: its files cannot be read, or the page cannot be written.
    """
    run = run_files.read(directory, directory.address.rstrip("/").rpartition("/")[2])
    directory.write_whole(FILE, page([run]).encode("utf-8", "replace"))


def page(runs: Sequence[RunFiles]) -> str:
    """The page of some runs, each in a colour of its own."""
    return template.rendered(
        "run_page.html.jinja",
        {"shade": shade, "seconds": seconds, "short": charts.short},
        runs=runs,
        colours=RUNS,
        charts=[*_charts(runs)],
        facts=[_facts(run) for run in runs],
        times=[_times(run) for run in runs],
        names_of_times=TIMES,
        lost=_once([_lost(run) for run in runs]),
        prompts=prompts(runs),
        settings=differing(runs),
    )


def _charts(runs: Sequence[RunFiles]) -> Iterator[Chart]:
    for title, says, figures in CHARTS:
        lines = (
            line
            for i, run in enumerate(runs)
            for n, figure in enumerate(figures)
            for line in _lines(run, i, figure, "second" if n else "")
        )
        if (found := charts.chart(title, says, lines)) is not None:
            yield found
    lengths = [Line("held", i, f"{run.name}, policy", _lengths(run)) for i, run in enumerate(runs)]
    found = charts.chart("Length of samples", "tokens of greedy answers", lengths)
    if found is not None:
        yield found


def _lines(run: RunFiles, i: int, figure: str, second: str) -> Iterator[Line]:
    """The curve of training and that of each held-out set."""
    own = f"train/{figure}"
    points = [(step, figures[own]) for step, figures in run.records if own in figures]
    yield Line(f"train {second}", i, f"{run.name}, train, {figure}", points)
    for name in _held_out(run):
        key = f"eval/{name}/{figure}"
        points = [(step, figures[key]) for step, figures in run.records if key in figures]
        yield Line(f"held {second}", i, f"{run.name}, {name}, {figure}", points)


def _held_out(run: RunFiles) -> list[str]:
    """The names of the held-out sets."""
    keys = (key for _, figures in run.records for key in figures if key.startswith("eval/"))
    return [*dict.fromkeys(key.removeprefix("eval/").rpartition("/")[0] for key in keys)]


def _lengths(run: RunFiles) -> charts.Curve:
    by_step: dict[int, list[int]] = {}
    for one in run.samples:
        if one["temperature"] == 0 and type(one.get("policy_tokens")) is int:
            by_step.setdefault(one["step"], []).append(one["policy_tokens"])
    return [(step, math.fsum(some) / len(some)) for step, some in sorted(by_step.items())]


def _facts(run: RunFiles) -> dict[str, str]:
    """The facts shown next to the name of a run."""
    last = max((step for step, _ in run.records), default=0)
    total = run.settings.get("num_train_steps")
    facts = {"steps": f"{last:,} of {total:,}" if type(total) is int else f"{last:,}"}
    for name in _held_out(run):
        for figure, best in (
            ("dpo_reward_margin", max),
            ("dpo_accuracy", max),
            ("loss", min),
            ("bits_per_byte", min),
        ):
            key = f"eval/{name}/{figure}"
            found = [(figures[key], step) for step, figures in run.records if key in figures]
            if found:
                value, step = best(found, key=lambda pair: pair[0])
                what = figure.removeprefix("dpo_").replace("_", " ")
                facts[f"{name}, {what}"] = f"{found[-1][0]:.4g}" + (
                    "" if value == found[-1][0] else f" (best {value:.4g} at step {step:,})"
                )
    return facts


def _times(run: RunFiles) -> dict[str, float]:
    """The seconds since the first step, by what they went into."""
    of = lambda name: math.fsum(figures.get(f"time/{name}", 0) for _, figures in run.records)
    return {name: spent for name in TIMES if (spent := of(name)) > 0}


def _lost(run: RunFiles) -> list[dict[str, object]]:
    """The counts of each source's rows; for a run that did not keep them, those in its records."""
    if run.data or not run.records:
        return run.data
    figures = {name: x for _, found in run.records for name, x in found.items()}
    counts = {what: figures.get(f"train/data/{what}") for what in ("dropped", "truncated")}
    known = {what: int(count) for what, count in counts.items() if count is not None}
    return [{"name": "all sources", **known}] if known else []


def _once(lost: list[list[dict[str, object]]]) -> list[list[dict[str, object]]]:
    """The counts of rows, listing runs on the same data once."""
    return [[] if each in lost[:i] else each for i, each in enumerate(lost)]


def prompts(runs: Sequence[RunFiles]) -> list[Prompt]:
    """Every prompt that was sampled, with the answers of some steps, evenly spread."""
    found: dict[tuple[str, str], dict[float, dict[tuple[int, int], dict]]] = {}
    for i, run in enumerate(runs):
        for one in run.samples:
            row = one.get("row")
            where = f"{one['set']}, row {row}" if one.get("set") else f"row {row} of sample_prompts"
            of_each = found.setdefault((one["prompt"], where), {})
            of_each.setdefault(one["temperature"], {})[one["step"], i] = one
    return [
        _prompt(text, where + (f", drawn at {temperature:g}" if temperature else ""), by_step)
        for (text, where), of_each in found.items()
        for temperature, by_step in sorted(of_each.items())
    ]


def _prompt(text: str, where: str, by_step: dict[tuple[int, int], dict]) -> Prompt:
    steps = sorted({step for step, _ in by_step})
    count = min(STEPS, len(steps))
    shown = {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}
    rows, last = [], {}
    for (step, i), one in sorted(by_step.items()):
        if step in shown:
            rows.append((f"step {step:,}", i, _sides(one, ("reference", "policy"))))
        last[i] = step, one
    for i, (step, one) in sorted(last.items()):
        if sides := _sides(one, run_files.GIVEN):
            rows.append((f"the data, as of step {step:,}", i, sides))
    return Prompt(text, where, rows, len(steps) - len(shown))


def _sides(one: dict, names: Sequence[str]) -> list[tuple[str, list | str]]:
    """Texts by name, as tokens with their log-ratios if these are known."""
    ratios = one["log_ratios"]
    return [(name, ratios.get(name) or one[name]) for name in names if one.get(name) is not None]


def shade(ratio: int | float) -> str:
    """The CSS class of a token's colour: up or down, and how much."""
    strength = sum(abs(ratio) >= least for least in SHADES)
    return f"{'up' if ratio > 0 else 'down'}{strength}" if strength else ""


def differing(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Settings that differ between the runs, or all of the one run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    told = [(name, [_spelt(run, name) for run in runs]) for name in names]
    return [(name, values) for name, values in told if len(runs) == 1 or len({*values}) > 1]


def _spelt(run: RunFiles, name: str) -> str:
    if name not in run.settings:
        return "—"
    value = run.settings[name]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def seconds(count: int | float) -> str:
    """A time in words: 75 -> '1 min 15 s'."""
    if count < 60:
        return f"{count:.1f} s" if count < 10 else f"{count:.0f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""What a run reports: figures per update, and the places they are written to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import json
import math
import secrets
import sys
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array
import numpy as np

from checkpoints_io import places, processes
from checkpoints_io.processes import all_agree
from checkpoints_io.unseen import visible
from recipes.training.run import Records

if TYPE_CHECKING:
    import tensorboardX

# What is written in the directory of a run, by `Log` and others.
Tracker = tuple[Any, Any]  # wandb or trackio, and its run

SETTINGS, DATA, RECORDS, SAMPLES, PAGE, SENT, RESULT, WANDB_ID = FILES = (
    "settings.json", "data.json", "metrics.jsonl", "samples.jsonl", "report.html", "hub.json",
    "result.json", "wandb_id",
)  # fmt: skip


# What TensorBoard shows first, in this order, training and held-out sets in one chart: it orders
# its groups of charts, and the charts of a group, by their names.
FIRST_CHARTS = (
    "dpo_reward_margin", "dpo_accuracy", "dpo_loss", "loss", "drift_chosen", "drift_rejected",
    "tokens_per_second", "bits_per_byte",
)  # fmt: skip


def on_host(values: Mapping[str, Array]) -> dict[str, int | float]:
    """The figures as numbers, fetched from the devices together; waits for them."""
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}


def line(step: int, total: int, figures: Mapping[str, int | float]) -> str:
    """The few metrics to watch, on one line; of metrics of tasks all."""
    where = next(iter(figures)).rpartition("/")[0]
    short = {name.removeprefix(f"{where}/"): value for name, value in figures.items()}
    watched = (
        "loss bits_per_byte dpo_loss dpo_accuracy dpo_reward_margin drift_chosen learning_rate "
        "tokens_per_second"
    )
    names = [n for n in watched.split() if n in short] or short
    told = "  ".join(f"{n} {short[n]:.4g}" for n in names)
    return f"{f'step {step}/{total}':<14} {where:<16} {told}"


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """What is imported here does not find the module, as where it is not installed."""
    modules: dict[str, Any] = sys.modules
    known = modules.get(module)
    modules[module] = None
    try:
        yield
    finally:
        del modules[module]
        if known is not None:
            modules[module] = known


class Log:
    """Writes records to `metrics.jsonl`, TensorBoard and, when asked, Weights & Biases and trackio.

    Only process 0 writes. Records of steps beyond `after` (-1: all) are dropped: they are taken
    again.
    """

    def __init__(self, directory: places.Place, records: Records, *, after: int):
        self._add = self._add_samples = self._board = None
        self._trackers: list[Tracker] = []
        self._file = contextlib.ExitStack()
        if not processes.is_first():
            return
        told = json.dumps(records.settings, indent=2) + "\n"
        directory.write_whole(SETTINGS, told.encode())
        kept = _until(directory, RECORDS, after)
        self._add = self._file.enter_context(directory.appending(RECORDS, kept))
        if records.samples or directory.exists(SAMPLES):
            kept = _until(directory, SAMPLES, after)
            self._add_samples = self._file.enter_context(directory.appending(SAMPLES, kept))
        if records.tensorboard:
            folder = directory.within("tensorboard").local()
            self._board = _boards(f"{folder}/", after + 1, self._file)
        self._trackers = _trackers(directory, records)

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """One record, which is kept when this returns."""
        if self._add is None:
            return
        self._add((json.dumps({"step": step, **values}) + "\n").encode())
        if self._board:
            for name, value in values.items():
                self._board().add_scalar(name, value, step)
            for whose, tag, value in first_screen(values):
                self._board(whose).add_scalar(tag, value, step)
        for _, run in self._trackers:
            run.log(dict(values), step=step)

    def samples(self, step: int, some: Sequence[Mapping[str, object]]) -> None:
        """A line for each sample, which are kept when this returns."""
        if self._add_samples is None:
            return
        lines = (json.dumps(one, ensure_ascii=False) for one in some)
        self._add_samples("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        if self._board:
            for i, one in enumerate(some):
                self._board().add_text(f"samples/{i}", _as_markdown(one), step)
        names = list(dict.fromkeys(n for one in some for n in one if n != "log_ratios"))
        for tracker, run in self._trackers:
            rows = [[one.get(name) for name in names] for one in some]
            run.log({"samples": tracker.Table(columns=names, data=rows)}, step=step)

    def close(self) -> None:
        """Waits for the writers."""
        self._file.close()
        for _, run in self._trackers:
            run.finish()


def _boards(
    folder: str, first: int, writers: contextlib.ExitStack
) -> Callable[..., "tensorboardX.SummaryWriter"]:
    """TensorBoard writers by name; records from the step `first` on are dropped."""
    with _without("torch"):  # seconds of a start, for tensors that no run has
        import tensorboardX

    @functools.cache  # what lies in folders of its own is laid over each other
    def board(of: str = "") -> tensorboardX.SummaryWriter:
        writer = tensorboardX.SummaryWriter(folder + of, purge_step=first)
        writers.callback(writer.close)
        return writer

    return board


def _trackers(directory: places.Place, records: Records) -> list[Tracker]:
    """The trackers that are asked for, and the run in each, which a restart continues."""
    found: list[Tracker] = []
    if records.wandb_project:
        import wandb  # an extra: few runs want it

        run = wandb.init(
            project=records.wandb_project,
            name=records.name,
            tags=list(records.tags),
            config=records.settings,
            dir=directory.local(),
            id=_own_id(directory),
            resume="allow",
        )
        found.append((wandb, run))
    if records.trackio_project:
        import trackio  # an extra, too

        run = trackio.init(
            project=records.trackio_project,
            # A run is what has the same name, and others may have ours.
            name=f"{records.name}-{_own_id(directory)[:6]}",
            config=dict(records.settings),
            resume="allow",
            embed=False,
        )
        found.append((trackio, run))
    return found


def first_screen(values: Mapping[str, int | float]) -> Iterator[tuple[str, str, int | float]]:
    """What TensorBoard shows first of a record: whose figure it is, under which name, its value."""
    for name, value in values.items():
        where, _, figure = name.rpartition("/")
        if figure in FIRST_CHARTS and (where == "train" or where.startswith("eval/")):
            whose = where.removeprefix("eval/").replace("/", "_")
            yield whose, f"0_watch/{FIRST_CHARTS.index(figure) + 1}_{figure}", value


def of_held_out(directory: places.Place, step: int) -> dict[str, float]:
    """The recorded figures of held-out pairs at this step; none unless every process sees them."""
    lines = _lines(directory, RECORDS)
    found = [line for line in lines if _step(line) == step and '"eval/' in line]
    if not all_agree(bool(found)):
        return {}
    figures = json.loads(found[-1])
    held_out = (name for name in figures if name.startswith("eval/"))
    return {name: figures[name] for name in held_out if isinstance(figures[name], float)}


def values(directory: places.Place, figure: str) -> list[float]:
    """The recorded values of a figure, in order."""
    lines = (line for line in _lines(directory, RECORDS) if figure in line)
    found = (json.loads(line).get(figure) for line in lines if _step(line) < math.inf)
    return [float(value) for value in found if isinstance(value, int | float)]


def conclude(directory: places.Place, folder: str) -> None:
    """Keeps which model folder in the directory a run has ended with."""
    if processes.is_first():
        directory.write_whole(RESULT, json.dumps({"model": folder}).encode())


def result(directory: places.Place) -> str | None:
    """The model folder that a run has ended with; None: it has not, or exports nothing."""
    content = directory.read(RESULT)
    return None if content is None else json.loads(content)["model"]


def sampled(directory: places.Place, step: int) -> bool:
    """Have samples been taken at this step, as far as the first process sees?"""
    found = any(_step(line) == step for line in _lines(directory, SAMPLES))
    return bool(processes.of_first(np.array(found)))


def _as_markdown(sample: Mapping[str, object]) -> str:
    """What is said by whom; texts are quoted as code, in which nothing has a meaning."""
    names = ("prompt", "reference", "policy", "wanted", "unwanted")
    told = {name: sample[name] for name in names if sample.get(name) is not None}
    quoted = lambda text: "\n".join(f"    {line}" for line in visible(text).split("\n"))
    return "\n\n".join(f"**{name}**\n\n{quoted(text)}" for name, text in told.items())


def _until(directory: places.Place, name: str, after: int) -> bytes:
    """The lines of a file up to this step."""
    kept = (line for line in _lines(directory, name) if _step(line) <= after)
    return "".join(f"{line}\n" for line in kept).encode()


def _lines(directory: places.Place, name: str) -> list[str]:
    """The lines of one of the files that are there; JSON has no other ends of lines in it."""
    return (directory.read(name) or b"").decode("utf-8", "replace").split("\n")


def _own_id(directory: places.Place) -> str:
    """A random id that stays with the directory."""
    known = directory.read(WANDB_ID)
    if known is None:
        known = secrets.token_hex(8).encode()
        directory.write_whole(WANDB_ID, known)
    return known.decode()


def _step(line: str) -> int | float:
    try:
        return json.loads(line)["step"] + 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # cut short when the run was killed, or not ours

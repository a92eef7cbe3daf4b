"""What a run reports: figures per update, and the places they are written to."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import pathlib
import secrets
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from checkpoints_io import whole
from checkpoints_io.run_state import all_agree
from recipes.data import mixture
from recipes.data.batches import Update
from recipes.data.mixture import Part
from recipes.run import Records

# What `Log` writes in the directory of a run.
SETTINGS, RECORDS, WANDB_ID = FILES = "settings.json", "metrics.jsonl", "wandb_id"
# What the answers of an example are called in figures, by their number.
OF_A_PAIR = "chosen", "rejected"


def preference(
    policy_logps: Float[Array, "P A"],
    reference_logps: Float[Array, "P A"],
    is_pair: Bool[Array, " P"],
    *,
    loss: Callable[..., Float[Array, " P"]],
    beta: float,
) -> dict[str, Float[Array, ""]]:
    """Means over the pairs; log-probabilities and their differences in nats, rewards times beta.

    The first six are those of Levanter's DPO. A tie counts as no win.
    """
    mean: Callable[..., Array] = lambda x: jnp.mean(x, where=is_pair)
    chosen, rejected = (policy_logps - reference_logps).T
    return {
        "dpo_loss": mean(loss(chosen, rejected)),
        "dpo_margin_policy": mean(policy_logps[:, 0] - policy_logps[:, 1]),
        "dpo_margin_ref": mean(reference_logps[:, 0] - reference_logps[:, 1]),
        "dpo_accuracy": mean(chosen > rejected),
        "dpo_chosen_reward": beta * mean(chosen),
        "dpo_rejected_reward": beta * mean(rejected),
        "dpo_reward_margin": beta * mean(chosen - rejected),
        "logps_chosen": mean(policy_logps[:, 0]),
        "logps_rejected": mean(policy_logps[:, 1]),
        "drift_chosen": mean(chosen),
        "drift_rejected": mean(rejected),
    }


def on_host(values: Mapping[str, Array]) -> dict[str, int | float]:
    """Waits for the devices."""
    return {name: float(value) for name, value in values.items()}


def line(step: int, total: int, figures: Mapping[str, int | float]) -> str:
    """The few figures a person watches."""
    where = next(iter(figures)).rpartition("/")[0]
    short = {name.removeprefix(f"{where}/"): value for name, value in figures.items()}
    watched = "dpo_loss dpo_accuracy dpo_reward_margin drift_chosen learning_rate tokens_per_second"
    told = "  ".join(f"{n} {short[n]:.4g}" for n in watched.split() if n in short)
    return f"{f'step {step}/{total}':<14} {where:<16} {told}"


def by_part(
    parts: Sequence[Part],
    rows: np.ndarray,
    policy_logps: Array,
    reference_logps: Array,
    **loss,
) -> dict[str, int | float]:
    """The same for the pairs of each source, where there are several, and how many they are."""
    figures: dict[str, int | float] = {}
    if len(parts) == 1:
        return figures
    ours, theirs = (jnp.asarray(jax.device_get(x)) for x in (policy_logps, reference_logps))
    of = mixture.part_of(parts, rows)
    for i, part in enumerate(parts):
        figures[f"{part.name}/pairs"] = int((of == i).sum())
        if figures[f"{part.name}/pairs"]:
            values = preference(ours, theirs, jnp.asarray(of == i), **loss)
            figures |= {f"{part.name}/{name}": float(value) for name, value in values.items()}
    return figures


def lengths(
    scored: Int[np.ndarray, "examples A"], answers: Sequence[str] = OF_A_PAIR
) -> dict[str, int | float]:
    """Scored tokens per answer, on average."""
    means = (scored.sum(0) / len(scored)).tolist()
    return {f"length_{name}": mean for name, mean in zip(answers, means, strict=True)}


class Trend:
    """Watches for one thing that goes wrong while all that is usually watched looks well."""

    def __init__(self) -> None:
        self._readings: collections.deque[Mapping] = collections.deque(maxlen=3)
        self._said = False

    def read(self, figures: Mapping[str, int | float]) -> str | None:
        """A sentence, once, when over three readings both rewards fall while accuracy rises."""
        self._readings.append(figures)
        if self._said or len(self._readings) < 3:
            return None
        chosen, rejected, accuracy = (
            [reading[f"train/{name}"] for reading in self._readings]
            for name in ("dpo_chosen_reward", "dpo_rejected_reward", "dpo_accuracy")
        )
        falls = lambda values: 0 > values[0] > values[1] > values[2]
        rises = accuracy[2] > max(0.5, accuracy[0])
        if not (rises and falls(chosen) and falls(rejected)):
            return None
        self._said = True
        return (
            "the rewards of both answers fall while accuracy rises: the policy makes the chosen "
            "answers less likely too, and what is neither more likely (arXiv 2410.08847). A little "
            "of it is common. Where answers get worse there are two remedies, each in a new run: "
            "--config.loss=dpop --config.dpop_lambda=5, which holds the chosen answers up, or a "
            "higher --config.beta, which holds the policy nearer to its reference"
        )


class Meter:
    """Speed and fill since it was last read. Nothing is asked of the devices.

    `answers` are the names of an example's answers, by their number.
    """

    def __init__(self, answers: Sequence[str] = OF_A_PAIR) -> None:
        self._answers = answers
        self._readings = 0
        self._clear()

    def _clear(self) -> None:
        self._since = time.perf_counter()
        self._updates: list[Update] = []
        self._waited = 0.0

    def add(self, update: Update) -> None:
        """Counts an update."""
        self._updates.append(update._replace(micro_batches=[]))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the next update to be packed."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation, saving and exporting are not training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def time_left(self, updates: int) -> str | None:
        """A guess, in words, once: after the first updates that did not wait for the compiler."""
        if self._readings != 1:
            return None
        each = (time.perf_counter() - self._since) / len(self._updates)
        spoken = each * updates
        minutes = f"{spoken / 60:.1f} minutes" if spoken > 90 else f"{spoken:.0f} seconds"
        spoken = f"{spoken / 3600:.1f} hours" if spoken > 5400 else minutes
        return f"about {spoken} to go, evaluation and saving apart"

    def read(self) -> dict[str, int | float]:
        """Real tokens per second (all answers, each with its prompt), fill, mean lengths.

        `input_wait` is the share of the time that was spent waiting for data; the scores are the
        ratings that the data gives its answers, where it does.
        """
        seconds = time.perf_counter() - self._since
        total = lambda name: sum(getattr(update, name) for update in self._updates)
        scored = np.concatenate([update.scored for update in self._updates])
        values = {
            "tokens_per_second": total("real_tokens") / seconds,
            "input_wait": self._waited / seconds,
            "pack_fill": total("stored_tokens") / total("positions"),
            **lengths(scored, self._answers),
        }
        ratings = np.concatenate([update.ratings for update in self._updates])
        if len(ratings := ratings[~np.isnan(ratings[:, 0])]):
            means = zip(self._answers, ratings.mean(0).tolist(), strict=True)
            values |= {f"score_{name}": mean for name, mean in means}
        self._clear()
        self._readings += 1
        return values


class Log:
    """Writes records to `metrics.jsonl`, TensorBoard and, when asked, Weights & Biases.

    Only process 0 writes. Records of steps beyond `after` (-1: all) are dropped: they are taken
    again.
    """

    def __init__(self, directory: pathlib.Path, records: Records, *, after: int):
        self._file = self._board = self._wandb = None
        if jax.process_index():
            return
        told = json.dumps(records.settings, indent=2) + "\n"
        whole.write(directory / SETTINGS, told.encode())
        path = directory / RECORDS
        known = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        kept = "".join(f"{line}\n" for line in known if _step(line) <= after)
        whole.write(path, kept.encode())
        self._file = path.open("a")
        if records.tensorboard:
            import tensorboardX  # which imports torch wherever that is installed

            self._board = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"), purge_step=after + 1
            )
        if records.wandb_project:
            import wandb  # an extra: few runs want it

            self._wandb = wandb.init(
                project=records.wandb_project,
                name=records.name,
                tags=list(records.tags),
                config=records.settings,
                dir=str(directory),
                id=_own_id(directory / WANDB_ID),  # started again it is the same run
                resume="allow",
            )

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """One record, on disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Waits for the writers."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def of_held_out(directory: pathlib.Path, step: int) -> dict[str, float]:
    """The recorded figures of held-out pairs at this step; none unless every process sees them."""
    path = directory / RECORDS
    known = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    found = [line for line in known if _step(line) == step and '"eval/' in line]
    if not all_agree(bool(found)):
        return {}
    figures = json.loads(found[-1])
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _own_id(path: pathlib.Path) -> str:
    """A random id that stays with the directory."""
    if not path.exists():
        whole.write(path, secrets.token_hex(8).encode())
    return path.read_text()


def _step(line: str) -> int | float:
    try:
        return json.loads(line)["step"] + 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # cut short when the run was killed, or not ours

"""What a run reports: figures per update, and the places they are written to."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import secrets
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import ml_collections
import numpy as np

from checkpoints_io import places, processes
from checkpoints_io.processes import all_agree
from recipes.data import mixture
from recipes.data.batches import Update
from recipes.data.mixture import Part
from recipes.data.tokens import PairIds

# What `Log` writes in the directory of a run.
SETTINGS, RECORDS, WANDB_ID = FILES = "settings.json", "metrics.jsonl", "wandb_id"


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


def lengths(pairs: Sequence[PairIds]) -> dict[str, int | float]:
    """Scored tokens per answer, on average."""
    return {
        "length_chosen": sum(int(p.chosen_scored.sum()) for p in pairs) / len(pairs),
        "length_rejected": sum(int(p.rejected_scored.sum()) for p in pairs) / len(pairs),
    }


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
    """Speed and fill since it was last read. Nothing is asked of the devices."""

    def __init__(self) -> None:
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
        """Real tokens per second (both answers, each with its prompt), fill, mean lengths.

        `input_wait` is the share of the time that was spent waiting for data; the scores are those
        that the data gives its answers, where it does.
        """
        seconds = time.perf_counter() - self._since
        total = lambda name: sum(getattr(update, name) for update in self._updates)
        pairs = sum(len(update.rows) for update in self._updates)
        values = {
            "tokens_per_second": total("real_tokens") / seconds,
            "input_wait": self._waited / seconds,
            "pack_fill": total("stored_tokens") / total("positions"),
            "length_chosen": total("chosen_tokens") / pairs,
            "length_rejected": total("rejected_tokens") / pairs,
        }
        scores = np.concatenate([update.scores for update in self._updates])
        if len(scores := scores[~np.isnan(scores[:, 0])]):
            values["score_chosen"], values["score_rejected"] = scores.mean(0).tolist()
        self._clear()
        self._readings += 1
        return values


class Log:
    """Writes records to `metrics.jsonl`, TensorBoard and, when asked, Weights & Biases.

    Only process 0 writes. Records of steps beyond `after` (-1: all) are dropped: they are taken
    again.
    """

    def __init__(self, directory: places.Place, config: ml_collections.ConfigDict, *, after: int):
        self._add = self._board = self._wandb = None
        self._file = contextlib.ExitStack()
        if not processes.is_first():
            return
        told = config.to_json_best_effort(indent=2) + "\n"
        directory.write_whole(SETTINGS, told.encode())
        kept = "".join(f"{line}\n" for line in _records(directory) if _step(line) <= after)
        self._add = self._file.enter_context(directory.appending(RECORDS, kept.encode()))
        if config.tensorboard:
            import tensorboardX  # which imports torch wherever that is installed

            self._board = tensorboardX.SummaryWriter(
                directory.within("tensorboard").local(), purge_step=after + 1
            )
        if config.wandb_project:
            import wandb  # an extra: few runs want it

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=config.name,
                tags=list(config.tags),
                config=config.to_dict(),
                dir=directory.local(),
                id=_own_id(directory),  # started again it is the same run
                resume="allow",
            )

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """One record, which is kept when this returns."""
        if self._add is None:
            return
        self._add((json.dumps({"step": step, **values}) + "\n").encode())
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Waits for the writers."""
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def of_held_out(directory: places.Place, step: int) -> dict[str, float]:
    """The recorded figures of held-out pairs at this step; none unless every process sees them."""
    found = [line for line in _records(directory) if _step(line) == step and '"eval/' in line]
    if not all_agree(bool(found)):
        return {}
    figures = json.loads(found[-1])
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _records(directory: places.Place) -> list[str]:
    """The lines of the records that are there."""
    return (directory.read(RECORDS) or b"").decode("utf-8", "replace").splitlines()


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

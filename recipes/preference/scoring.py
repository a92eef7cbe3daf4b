"""Scores of pairs, without training: each pair a line of JSON, each source a row of a table.

The order of everything is that of the sources and their rows.
"""

from collections.abc import Callable, Iterator, Sequence
import json
from typing import NamedTuple

from flax import nnx
from jaxtyping import Float, Int
import numpy as np

from checkpoints_io import places, processes
from checkpoints_io.errors import InTheWay, RunFailed
from recipes import terminal
from recipes.data import mixture, shown
from recipes.data.ids.examples import Example
from recipes.data.packed import streams
from recipes.data.packed.batches import Place
from recipes.data.run_data import Data
from recipes.preference import reference
from recipes.training import logps, plan, policy
from recipes.training.by_name import Values
from recipes.training.run import Beside, Scoring, say
from recipes.training.update import Params
from zoo import adapters
from zoo.parts import adapted

FILE = "scores.jsonl"
# Log-probabilities of the answers of every pair, for each source.
Found = list[Float[np.ndarray, "pairs A"]]


class Source(NamedTuple):
    """The usable pairs of a source, or those of it that are held out."""

    name: str
    pairs: list[Example]
    first_row: int  # what the number of its first row is in `pairs`

    def row(self, i: int) -> int:
        """The number in the source, from 0, of pair i's row: those that were dropped count too."""
        return self.pairs[i].row - self.first_row


class Scores(NamedTuple):
    """The scores of the pairs of a source."""

    source: Source
    policy: Float[np.ndarray, "pairs A"]  # log-probability of each answer, in nats
    reference: Float[np.ndarray, "pairs A"]
    rewards: Float[np.ndarray, "pairs A"]
    margins: Float[np.ndarray, " pairs"]
    ranks: Int[np.ndarray, " pairs"]


def beside(given: Values) -> Beside:
    """The reference that the settings name, or else the policy without its adapters."""
    path = given["reference_model_path"]
    return Beside(
        path or given["initialize_from_hf"], given["reference_is_hf"],
        mode="resident" if path else "base", cache=None, of_policy=path is None,
    )  # fmt: skip


def sources(data: Data) -> list[Source]:
    """What is scored: train_data, source by source, then what is held out of it or beside it."""
    train, held_out = data.train, data.held_out
    firsts = mixture.first_rows(train)
    return [
        *(Source(one.name, one.examples, n) for one, n in zip(train, firsts, strict=True)),
        *(Source(one.name, one.examples, one.first_row) for one in held_out),
    ]


def told(run: Scoring, found: Sequence[Source]) -> str:
    """The plan of the program, as text."""
    shape, devices = run.place.shape, run.computing.mesh.devices
    device, pairs = devices.flat[0], found[0].pairs
    counts = ", ".join(f"{len(one.pairs)} of {one.name}" for one in found)
    axes = ", ".join(f"{name} {size}" for name, size in run.computing.mesh.shape.items())
    lines = [
        f"devices      {devices.size} {device.device_kind} ({device.platform}); {axes}",
        f"pairs        {counts}",
        f"rows         {shape.rows} of {shape.row_length} positions per micro-batch",
        f"memory       {plan.size(run.memory)} per device for one model at a time, plus "
        "activations",
        "first of the pairs, with scored tokens in ⟦ ⟧:",
        *(f"  {line}" for line in shown.lines_of(pairs[0], run.data.tokenizer)),
    ]
    return "\n".join(lines)


def of_both(
    run: Scoring, asked: Beside, ask: Callable[[nnx.GraphDef, Params], Found]
) -> tuple[Found, Found]:
    """What `ask` returns for the policy and then for the reference, one after the other.

    The policy has left memory when the reference is read, except what they share.

    Raises:
      FileNotFoundError, ValueError: weights or adapters do not fit or are not finite.
    """
    say(f"reading the policy: {run.folder}")
    if run.adapting is None:
        graph, _ = nnx.split(run.blank)
        weights = nnx.to_pure_dict(nnx.state(policy.loaded(run)))
        ours = ask(graph, weights)
        del weights
    else:
        say(f"with the adapters in {run.adapting.folder}")
        own = policy.with_adapters(run.adapting, run)
        assert own.begun is not None
        ours = ask(own.graph, adapted.joined(own.begun, own.frozen))
        if asked.of_policy:
            say("the reference: the policy without its adapters")
            nothing = adapters.nothing(own.begun, own.frozen)
            return ours, ask(own.graph, adapted.joined(nothing, own.frozen))
        del own
    say(f"reading the reference: {asked.path}")
    graph, state = nnx.split(reference.load(asked, run.blank, run))
    return ours, ask(graph, nnx.to_pure_dict(state))


def logps_of(pairs: Sequence[Example], forward: logps.Forward, place: Place) -> np.ndarray:
    """`logps.of_examples` with a progress bar."""
    together = place.shape.examples
    starts = terminal.bar(range(0, len(pairs), together), unit=f"{together} pairs")
    found = [logps.of_examples(forward, pairs[i : i + together], place) for i in starts]
    return np.concatenate(found)


def of_source(
    source: Source,
    policy: Float[np.ndarray, "pairs A"],
    reference: Float[np.ndarray, "pairs A"],
    beta: float,
) -> Scores:
    """Rewards, margins and ranks of a source's pairs, from their log-probabilities.

    Raises:
      RuntimeError: a log-probability is not finite.
    """
    for whose, values in (("policy", policy), ("reference", reference)):
        if odd := np.flatnonzero(~np.isfinite(values).all(1)).tolist():
            raise RunFailed(
                f"row {source.row(odd[0])} of {source.name} has a log-probability under the "
                f"{whose} that is NaN or infinite: compute in another dtype with --config.mp"
            )
    rewards = beta * (policy - reference).astype(np.float64)
    margins = rewards[:, 0] - rewards[:, 1]
    return Scores(source, policy, reference, rewards, margins, ranks(margins))


def ranks(margins: Float[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """1 for the largest; equal ones share the smaller number, so that no order of rows decides."""
    larger = len(margins) - np.searchsorted(np.sort(margins), margins, side="right")
    return larger + 1


def lines(scores: Scores) -> Iterator[dict[str, str | int | float]]:
    """What the file says of each pair, in the order of the rows."""
    for i, pair in enumerate(scores.source.pairs):
        tokens = streams.scored_tokens(pair)
        yield {
            "source": scores.source.name,
            "row": scores.source.row(i),
            "policy_chosen": float(scores.policy[i, 0]),
            "policy_rejected": float(scores.policy[i, 1]),
            "reference_chosen": float(scores.reference[i, 0]),
            "reference_rejected": float(scores.reference[i, 1]),
            "scored_chosen": tokens[0],
            "scored_rejected": tokens[1],
            "reward_chosen": float(scores.rewards[i, 0]),
            "reward_rejected": float(scores.rewards[i, 1]),
            "margin": float(scores.margins[i]),
            "rank": int(scores.ranks[i]),
        }


def table(found: Sequence[Scores]) -> str:
    """Means over the pairs of each source, and the share whose chosen answer has more reward."""
    names = ["source", *(one.source.name for one in found)]
    width = max(map(len, names))
    head = f"{names[0]:<{width}}  {'pairs':>7}  accuracy  {'margin':>9}"
    above = f"{'':<{len(head)}}  {'policy':>9}  {'':>9}  {'reference':>9}"
    rows = [above, head + f"  {'chosen':>9}  {'rejected':>9}" * 2]
    for one in found:
        wins = np.mean(one.rewards[:, 0] > one.rewards[:, 1])
        means = [one.margins.mean(), *one.policy.mean(0, np.float64)]
        means += [*one.reference.mean(0, np.float64)]
        rows.append(
            f"{one.source.name:<{width}}  {len(one.margins):>7}  {wins:>8.3f}"
            + "".join(f"  {value:>9.3f}" for value in means)
        )
    return "\n".join(rows)


def note(found: Sequence[Scores]) -> str:
    """What the table means; and whether every reward is 0, as of a copy of the same weights."""
    means = (
        "means over pairs: log-probabilities of answers in nats, margins of rewards; accuracy is "
        "the fraction\nof pairs whose chosen answer has the larger reward (ties do not count)"
    )
    if any(one.rewards.any() for one in found):
        return means
    return f"{means}\nnote: policy and reference give the same log-probabilities for every answer"


def refuse_foreign(directory: places.Place) -> None:
    """Scores may replace scores; says so.

    Raises:
      FileExistsError: something else has the name of the file.
      OSError: that is a link, or a folder.
    """
    if not processes.is_first():
        return
    directory.refuse_odd(files=[FILE])
    if not directory.exists(FILE):
        return
    if not _is_ours(directory):
        raise InTheWay(
            f"{directory}/{FILE} holds something other than scores: choose another "
            "--config.directory, or move it elsewhere"
        )
    say(f"the scores in {directory}/{FILE} will be replaced at the end")


def _is_ours(directory: places.Place) -> bool:
    content = directory.read(FILE) or b""
    try:
        first = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return False
    return isinstance(first, dict) and {"source", "row", "margin", "rank"} <= first.keys()


def write(found: Sequence[Scores], data: Data, directory: places.Place) -> None:
    """The file, whole or not at all, by the first process; says what is not in it.

    Raises:
      OSError: it cannot be written.
    """
    if processes.is_first():
        texts = (json.dumps(line, ensure_ascii=False) for one in found for line in lines(one))
        directory.write_whole(FILE, "".join(f"{text}\n" for text in texts).encode())
    count = sum(len(one.margins) for one in found)
    lost = sum(part.counts.lost.total() for part in data.sources)
    without = f"; {lost} rows have no scores, for the reasons above" if lost else ""
    say(f"\n{count} pairs, one per line, in {directory}/{FILE}{without}")
    processes.wait_for_all("the scores are written")

"""Lists of four ranked answers against the pairs that they explode into: positions, CPU seconds.

  python benchmarks/ranked.py --rows=rows.jsonl --tokenizer=FOLDER --template=FILE

The rows are read as layout `best_and_worst`. An update takes the same lists in every form: as they
are, with Plackett-Luce; as the best answer against each of the others, three pairs a list; as all
pairs, six a list; with `--separate` these once more, each answer after its own prompt as elsewhere.
The forms take turns, with the reference in the step; the figures are medians over the turns after
the first.
"""

from collections.abc import Sequence
import functools
import itertools
import pathlib
import statistics
import tempfile

from absl import flags
from flax import nnx
import jax
import measure
import numpy as np
import optax
import work

from checkpoints_io.errors import BadInput
from recipes.data import source_pairs
from recipes.data.ids.encode_rows import How
from recipes.data.ids.examples import Example, ListIds, PairIds
from recipes.data.packed import batches, shapes
from recipes.data.rows.source import Source
from recipes.preference import metrics, objectives
from recipes.training import command, logps, optimizer, update
import zoo
from zoo.parts import sharding
from zoo.text import tokenizer

ROWS = flags.DEFINE_string("rows", None, "A file of rows with ranked answers.", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Its folder.", required=True)
TEMPLATE = flags.DEFINE_string("template", None, "A chat template that replaces the tokenizer's.")
SIZE = flags.DEFINE_enum("size", "A", list(work.SIZES), "A model of benchmarks/work.py.")
LISTS = flags.DEFINE_integer("lists", 8, "Lists of an update.", lower_bound=1)
TURNS = flags.DEFINE_integer("turns", 4, "Updates of each form.", lower_bound=2)
MOST = flags.DEFINE_integer("most", 4096, "Positions of a micro-batch.", lower_bound=1)
SEPARATE = flags.DEFINE_bool("separate", False, "Also pairs that are stored as elsewhere.")
ANSWERS, LONGEST = 4, 512  # answers of a list, and tokens of a prompt with one of them
BEST = [(0, i) for i in range(1, ANSWERS)]
ALL = [*itertools.combinations(range(ANSWERS), 2)]


def main() -> None:
    """Compiles every form, then takes their updates in turn."""
    some = lists(TURNS.value * LISTS.value)
    forms: dict[str, tuple[Sequence[Example], str, int | None]] = {
        "lists": (some, "plackett_luce", None),
        "best against each, prompt once": (exploded(some, BEST), "sigmoid", None),
        "all pairs, prompt once": (exploded(some, ALL), "sigmoid", None),
    }
    if SEPARATE.value:  # no text is short enough to share the rotations of its prompt
        forms["best against each, separate"] = exploded(some, BEST), "sigmoid", 1
        forms["all pairs, separate"] = exploded(some, ALL), "sigmoid", 1
    with tempfile.TemporaryDirectory() as scratch:
        folder, mesh = pathlib.Path(scratch), sharding.mesh_of(1, -1, 1)
        work.write_model(folder, SIZE.value, tokenizer.load(pathlib.Path(TOKENIZER.value)).size)
        with jax.set_mesh(mesh):
            graph, state = nnx.split(zoo.load(folder, mesh=mesh))
            weights = nnx.to_pure_dict(state)
            take = {name: taker(graph, weights, *form, mesh) for name, form in forms.items()}
            clocks = {name: measure.Clock() for name in forms}
            positions: dict[str, list[int]] = {name: [] for name in forms}
            for turn, name in itertools.product(range(TURNS.value), forms):
                clocks[name].start()
                positions[name].append(take[name](turn))
                clocks[name].stop()
    told(forms, clocks, positions)


def told(
    forms: Sequence[str] | dict, clocks: dict[str, measure.Clock], positions: dict[str, list[int]]
) -> None:
    """One line for each form, and the ratio of the lists to it."""
    median = lambda values: statistics.median(values) / LISTS.value
    cpu = {name: median([cpu for cpu, _ in clocks[name].steps[1:]]) for name in forms}
    held = {name: median(positions[name][1:]) for name in forms}
    print(f"{'form':<32}{'positions a list':>18}{'CPU s a list':>14}{'lists / it':>20}")
    for name in forms:
        ratios = f"{held['lists'] / held[name]:.2f}, {cpu['lists'] / cpu[name]:.2f}"
        print(f"{name:<32}{held[name]:>18.0f}{cpu[name]:>14.2f}{ratios:>20}")


def lists(count: int) -> list[ListIds]:
    """The first rows whose four answers are all ranked differently and fit."""
    how = How(
        TOKENIZER.value, TEMPLATE.value, "assistant", None, LONGEST, "drop", 1.0, answers=ANSWERS
    )
    pairs = source_pairs.read(Source(ROWS.value, "best_and_worst"), how)
    whole = [one for one in pairs.ids if isinstance(one, ListIds) and len({*one.ranks}) == ANSWERS]
    if len(whole) < count:
        raise BadInput(
            f"--rows={ROWS.value} has {len(whole)} such lists of {count} that are needed"
        )
    answers = np.mean([len(answer.ids) for one in whole[:count] for answer in one.answers])
    prompt = np.mean([len(one.prompt) for one in whole[:count]])
    print(f"{count} lists: prompts of {prompt:.0f} tokens and answers of {answers:.0f} on average")
    return whole[:count]


def exploded(some: Sequence[ListIds], which: Sequence[tuple[int, int]]) -> list[PairIds]:
    """These pairs of every list, those of one list behind each other."""
    made = []
    for one, (i, j) in itertools.product(some, which):
        a, b = one.answers[i], one.answers[j]
        made.append(PairIds(len(made), one.prompt, a.ids, b.ids, a.scored, b.scored))
    return made


def taker(graph, weights, examples, loss, alike, mesh):
    """Takes an update of a form, with weights and optimizer of its own; gives its positions."""
    each = len(examples) // TURNS.value
    shape = shapes.choose(examples, per_update=each, shards=1, most=MOST.value, alike=alike)
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    updates = list(batches.in_order(examples, place))
    adamw = optax.adamw(work.LEARNING_RATE, *work.BETAS, eps=work.EPSILON, weight_decay=0.0)
    given = {"loss": loss, "beta": work.BETA, "data.answers": len(examples[0].answers)}
    objective = objectives.objective(given)
    forward = functools.partial(logps.compiled(mesh), graph, weights)
    policy = jax.tree.map(lambda x: x + 0, weights)
    state = policy, optimizer.init(adamw, policy, mesh)
    programs = update.compiled(
        *state, graph=graph, optimizer=adamw, loss=objective.loss,
        figures=lambda answers: metrics.preference(answers, objective), shape=shape,
    )  # fmt: skip
    # What the first turns would compile on the way.
    for batch in {b.tokens.shape: b for one in updates for b in one.micro_batches}.values():
        batch = batches.put(batch, place)
        fields = batches.data_fields(updates[0], place)
        jax.block_until_ready(
            programs.add(programs.zero(), policy, {}, forward(batch), fields, batch, None)
        )

    def take(turn: int) -> int:
        nonlocal state
        fields, sums = batches.data_fields(updates[turn], place), programs.zero()
        for batch in updates[turn].micro_batches:
            batch = batches.put(batch, place)
            sums = programs.add(sums, state[0], {}, forward(batch), fields, batch, None)
        *moved, values = programs.apply(sums, *state, fields)
        state = tuple(moved)
        assert np.isfinite(float(values["dpo_loss"]))
        return updates[turn].positions

    return take


if __name__ == "__main__":
    command.main_without_config(main)

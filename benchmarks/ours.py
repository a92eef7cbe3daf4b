"""The recipe's own update on the comparison's work; prints one JSON line."""

import functools
import pathlib
import time

from absl import flags
from flax import nnx
import jax
import measure
import numpy as np
import optax
import pairs_as_ids
import work

from recipes.data.ids.examples import PairIds
from recipes.data.packed import batches, packing, shapes, streams
from recipes.preference import metrics, objectives
from recipes.training import command, logps, optimizer, update
import zoo
from zoo import adapters, targets
from zoo.parts import adapted, sharding

FOLDER = flags.DEFINE_string("folder", None, "Where the work lies.", required=True)
SIZE = flags.DEFINE_enum("size", "A", list(work.SIZES), "A model of benchmarks/work.py.")
STEPS = flags.DEFINE_integer("steps", 4, "Updates to measure.", lower_bound=1)
PAIRS = flags.DEFINE_integer("pairs", work.PAIRS, "Pairs of an update.", lower_bound=1)
CACHED = flags.DEFINE_bool("cached", False, "The reference was asked before.")
SEPARATE = flags.DEFINE_bool("separate", False, "Each answer behind its own copy of the prompt.")
REMAT = flags.DEFINE_string("remat", "full", "What is computed again.")
MOST = flags.DEFINE_integer("most", 4096, "Positions of a micro-batch.", lower_bound=1)
RANK = flags.DEFINE_integer("rank", 0, "Of adapters on every matrix; 0: all weights are trained.")
ROW = flags.DEFINE_integer("row_length", None, "Unset: what fills best.", lower_bound=1)


def jointly(pair: PairIds, first: int = 0) -> packing.Stream:
    """Both answers behind their own copies of the prompt, one after the other."""
    chosen, rejected = streams.separate(pair)[first : first + 2]
    n = len(chosen.tokens)
    moved = rejected._replace(
        first=rejected.first + n, last=rejected.last + n, read_at=rejected.read_at + n
    )
    arrays = {
        name: np.concatenate([one, getattr(moved, name)])
        for name, one in chosen._asdict().items()
        if isinstance(one, np.ndarray)
    }
    return chosen._replace(length=max(chosen.length, moved.length), **arrays)


def main() -> None:
    """Compiles both shapes, then times the updates."""
    folder = pathlib.Path(FOLDER.value)
    rows = work.read_pairs(folder / "pairs.jsonl")[: STEPS.value * PAIRS.value]
    pairs = [pairs_as_ids.as_ids(i, row) for i, row in enumerate(rows)]
    mesh = sharding.mesh_of(1, -1, 1)
    if SEPARATE.value:
        streams.prompt_once = jointly
        streams.two_by_two = lambda pair: [len(jointly(pair).tokens)]
    with jax.set_mesh(mesh):
        model = zoo.load(folder / SIZE.value, mesh=mesh)
        model.remat = REMAT.value
        graph, state = nnx.split(model)
        policy, frozen = nnx.to_pure_dict(state), {}
        if RANK.value:
            found = targets.sites(model, targets.Lora(RANK.value, float(RANK.value)))
            frozen = adapters.attached(policy, found)
            like = adapters.layout(model, found)
            policy = adapters.fresh(frozen, like, zero="A", seed=0)
            reference = adapted.joined(adapters.nothing(policy, frozen), frozen)
        else:
            reference = jax.tree.map(lambda x: x + 0, policy)
        del model, state
        adamw = optax.adamw(work.LEARNING_RATE, *work.BETAS, eps=work.EPSILON, weight_decay=0.0)
        opt_state = optimizer.init(adamw, policy, mesh)
        forward = functools.partial(logps.compiled(mesh), graph)
        shape = shapes.choose(
            pairs, per_update=PAIRS.value, shards=1, most=MOST.value, row_length=ROW.value
        )
        loss = {"loss": "sigmoid", "beta": work.BETA}
        objective = objectives.objective(loss)
        programs = update.compiled(
            policy, opt_state, graph=graph, optimizer=adamw, loss=objective.loss,
            figures=lambda answers: metrics.preference(answers, objective), shape=shape,
        )  # fmt: skip
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        updates = list(batches.in_order(pairs, place))
        asked = logps.of_examples(functools.partial(forward, reference), pairs, place)
        if CACHED.value:
            reference = None

        def theirs(one: batches.Update, batch: packing.Packed) -> jax.Array:
            if reference is not None:
                return forward(reference, batch)
            return batches.put_replicated(asked[one.source_rows], place)

        since = time.perf_counter()
        kinds = {batch.tokens.shape: (u, batch) for u in updates for batch in u.micro_batches}
        for one, batch in kinds.values():
            batch, fields = batches.put(batch, place), batches.data_fields(one, place)
            jax.block_until_ready(
                programs.add(programs.zero(), policy, frozen, theirs(one, batch), fields, batch)
            )
        fields = batches.data_fields(updates[0], place)
        apply = programs.apply.lower(programs.zero(), policy, opt_state, fields).compile()
        compiling = time.perf_counter() - since

        clock, found = measure.Clock(), []
        for one in updates:
            clock.start()
            fields, sums = batches.data_fields(one, place), programs.zero()
            for batch in one.micro_batches:
                batch = batches.put(batch, place)
                sums = programs.add(sums, policy, frozen, theirs(one, batch), fields, batch)
            policy, opt_state, values = apply(sums, policy, opt_state, fields)
            del sums
            found.append(float(values["dpo_loss"]))
            clock.stop()
    scores = sum(int(b.counts.sum()) for u in updates for b in u.micro_batches)
    measure.report(
        clock,
        [one.real_tokens for one in updates],
        found,
        first=min(1, len(updates) - 1),  # as for the peers
        compile_s=compiling,
        positions=sum(one.positions for one in updates),
        stored=sum(one.stored_tokens for one in updates),
        scores=scores,
        shape=list(shape),
    )


if __name__ == "__main__":
    command.main_without_config(main)

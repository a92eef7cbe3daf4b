"""One accelerator: tokens a second, model FLOPs, memory, on published shapes with random weights.

  XLA_PYTHON_CLIENT_MEM_FRACTION=0.96 python benchmarks/accelerator.py --shape=8B --chip=h200
  … --shape=8B --rank=16 --frozen=nf4 --resident     adapters beside weights in 4 bits
  … --shape=30B-A3B --rank=16 --resident             experts

Weights are made on the device: in float32 where they are trained, in bfloat16 or few bits where
adapters are; products are in bfloat16. The reference was asked before, or, with --resident, is
asked in the step. Pairs have log-normal lengths. For TRL on the same pairs and weights, save them
and give them to its environment:

  python benchmarks/accelerator.py --shape=1B --chip=h200 --save=/tmp/work
  trl/bin/python benchmarks/peer_trl.py --folder=/tmp/work --size=1B --gpu
"""

import functools
import json
import pathlib
import statistics
import tempfile
import time
from typing import NamedTuple

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pairs_as_ids
import published
import work

from checkpoints_io import quantised
from recipes.data.packed import batches, packing, shapes
from recipes.preference import metrics, objectives
from recipes.training import activations, command, forecasting, logps, optimizer, plan, update
from recipes.training.chips import CHIPS
import zoo
from zoo import adapters, targets
from zoo.parts import adapted, sharding

SHAPE = flags.DEFINE_enum(
    "shape", "1B", list(published.SHAPES), "Of benchmarks/published.py; tiny to try this out."
)
CHIP = flags.DEFINE_enum("chip", "h200", list(CHIPS), "Whose peak the FLOPs are a share of.")
RESIDENT = flags.DEFINE_bool("resident", False, "Ask the reference in the step.")
RANK = flags.DEFINE_integer(
    "rank", 0, "Of adapters on every matrix; 0: all weights are trained.", lower_bound=0
)
FROZEN = flags.DEFINE_enum(
    "frozen", "bfloat16", ["bfloat16", *quantised.KINDS], "How weights beside adapters are kept."
)
UPDATES = flags.DEFINE_integer("updates", 6, "The first two are not counted.", lower_bound=3)
EACH = flags.DEFINE_integer("each", 64, "Pairs of an update.", lower_bound=1)
POSITIONS = flags.DEFINE_integer("positions", 8192, "Positions of a micro-batch.", lower_bound=1)
KEPT = flags.DEFINE_string("keep", None, "remat, as in docs/speed.md; unset: what fits.")
MU = flags.DEFINE_string("mu_dtype", "float32", "Of Adam's first moment.")
BACKEND = flags.DEFINE_string("attention", None, "Unset: the platform's.")
SAVE = flags.DEFINE_string("save", None, "Writes weights and pairs there, and stops.")


class Made(NamedTuple):
    """A model, with what is trained of it and what is not."""

    graph: nnx.GraphDef
    policy: dict
    frozen: dict
    weights: int  # that multiply a token


def main() -> None:
    """Prints one JSON line."""
    hf_config = published.SHAPES[SHAPE.value]
    mesh = sharding.mesh_of(1, -1, 1)
    with tempfile.TemporaryDirectory() as scratch, jax.set_mesh(mesh):
        folder = pathlib.Path(SAVE.value or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        work.write_pairs(
            folder / "pairs.jsonl", UPDATES.value * EACH.value, vocabulary=hf_config["vocab_size"]
        )
        rows = work.read_pairs(folder / "pairs.jsonl")
        if SAVE.value:
            zoo.save(zoo.fresh(hf_config, mesh=mesh), folder / SHAPE.value)
            return
        pairs = [pairs_as_ids.as_ids(i, row) for i, row in enumerate(rows)]
        model = adapting(hf_config, mesh) if RANK.value else whole(hf_config, mesh)
        print(json.dumps(timed(model, pairs, mesh)))


def whole(hf_config: dict, mesh: jax.sharding.Mesh) -> Made:
    """All weights are trained."""
    model = zoo.fresh(hf_config, compute_dtype=jnp.bfloat16, mesh=mesh)
    graph, state = nnx.split(asked_for(model))
    return Made(graph, nnx.to_pure_dict(state), {}, forecasting.met_by_a_token(model))


def adapting(hf_config: dict, mesh: jax.sharding.Mesh) -> Made:
    """Adapters are trained, beside weights of any bits."""
    model = zoo.abstract(hf_config, jnp.bfloat16, mesh=mesh)
    if FROZEN.value in quantised.KINDS:
        model = zoo.narrowed(model, FROZEN.value)
    graph, state = nnx.split(asked_for(model))
    like = nnx.to_pure_dict(state)
    sites = targets.sites(model, targets.Lora(RANK.value, float(RANK.value)))
    placed = jax.tree.map(lambda x: x.sharding, like)
    frozen = adapters.attached(jax.jit(lambda: drawn(like), out_shardings=placed)(), sites)
    policy = adapters.fresh(frozen, adapters.layout(model, sites), zero="B", seed=0)
    return Made(graph, policy, frozen, forecasting.met_by_a_token(model))


def reference_of(policy: dict, frozen: dict) -> dict:
    """What the policy is before the first update, in the compute dtype."""
    if not frozen:
        return logps.cast(policy, jnp.bfloat16)
    return adapted.joined(adapters.nothing(policy, frozen), frozen)


def drawn(like: dict) -> dict:
    """Any bits for codes, and small numbers for the rest."""
    leaves, tree = jax.tree.flatten(like)

    def one(x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.lax.bitcast_convert_type(jax.random.bits(key, x.shape, "uint8"), x.dtype)
        return 0.02 * jax.random.normal(key, x.shape, x.dtype)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([one(x, key) for x, key in zip(leaves, keys, strict=True)])


def asked_for(model: zoo.Model) -> zoo.Model:
    """Computed as the flags say."""
    model.attention = BACKEND.value
    return model


def keeping(made: Made, shape: packing.Shape, held: int) -> tuple[nnx.GraphDef, str]:
    """The graph of the model, whose layers keep what fits beside so many bytes; and what."""
    model = nnx.merge(made.graph, nnx.State(adapted.joined(made.policy, made.frozen)))
    memory, _ = activations.device_here()
    kept = activations.keeping(model, KEPT.value, made.policy, shape, held, memory)
    return nnx.split(model)[0], plan.remat_told(kept, model)


def timed(model: Made, pairs: list, mesh: jax.sharding.Mesh) -> dict:
    """Some updates, and what they took."""
    _, policy, frozen, weights = model
    shape = shapes.choose(pairs, per_update=EACH.value, shards=1, most=POSITIONS.value)
    adamw = optax.adamw(1e-6, *work.BETAS, weight_decay=0.0, mu_dtype=MU.value)
    state = optimizer.layout(adamw, policy, mesh)
    held = plan.held((policy, frozen, state, policy))
    held += 0 if frozen or not RESIDENT.value else plan.held(policy) // 2
    graph, told = keeping(model, shape, held)
    reference = reference_of(policy, frozen)
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    forward = functools.partial(logps.compiled(mesh), graph)
    asked = logps.of_examples(functools.partial(forward, reference), pairs, place)
    if not RESIDENT.value:
        del reference
    opt_state = optimizer.init(adamw, policy, mesh)
    objective = objectives.objective({"loss": "sigmoid", "beta": work.BETA})
    programs = update.compiled(
        policy, opt_state, graph=graph, optimizer=adamw, loss=objective.loss,
        figures=lambda answers: metrics.preference(answers, objective), shape=shape,
    )  # fmt: skip
    seconds, found = [], []
    updates = list(batches.in_order(pairs, place))
    for one in updates:
        since = time.perf_counter()
        fields, sums = batches.data_fields(one, place), programs.zero()
        for packed in one.micro_batches:
            batch = batches.put(packed, place)
            theirs = batches.put_replicated(asked[one.source_rows], place)
            if RESIDENT.value:
                theirs = forward(reference, batch)
            sums = programs.add(sums, policy, frozen, theirs, fields, batch)
        policy, opt_state, values = programs.apply(sums, policy, opt_state, fields)
        del sums
        found.append(float(values["dpo_loss"]))
        seconds.append(time.perf_counter() - since)
    rates = [u.real_tokens / s for u, s in list(zip(updates, seconds, strict=True))[2:]]
    # Of frozen weights no gradient is made.
    per_token = ((4 if frozen else 6) + 2 * RESIDENT.value) * weights
    stats = jax.local_devices()[0].memory_stats() or {}
    rate = statistics.median(rates)
    return {
        "shape": SHAPE.value,
        "trained": f"rank {RANK.value} beside {FROZEN.value}" if frozen else "all",
        "tokens_per_second": rate,
        "model_flops": rate * per_token / CHIPS[CHIP.value].bf16_flops,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "fill": shapes.fill(pairs, shape).share,
        "losses": found,
        "first_update_s": seconds[0],
        "rows": list(shape),
        "remat": told,
    }


if __name__ == "__main__":
    command.main_without_config(main)

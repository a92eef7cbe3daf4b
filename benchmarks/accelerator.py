"""One accelerator: tokens a second, model FLOPs, memory, on Llama shapes with random weights.

  XLA_PYTHON_CLIENT_MEM_FRACTION=0.96 python benchmarks/accelerator.py --shape=8B --chip=h200

Weights are made on the device, in float32; products are in bfloat16. The reference was asked
before, or, with --resident, is asked in the step. Pairs have log-normal lengths. For TRL on the
same pairs and weights, save them and give them to its environment:

  python benchmarks/accelerator.py --shape=1B --chip=h200 --save=/tmp/work
  trl/bin/python benchmarks/peer_trl.py --folder=/tmp/work --size=1B --gpu
"""

import functools
import json
import pathlib
import statistics
import tempfile
import time

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pairs_as_ids
import work

from recipes import forecast
from recipes.data.packed import batches, shapes
from recipes.preference import metrics, objectives
from recipes.training import command, logps, optimizer, update
import zoo
from zoo import llama
from zoo.parts import rope, sharding

# Width, MLP width, layers, query heads, key heads, head width, vocabulary, tied.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, True),
    "1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
SHAPE = flags.DEFINE_enum("shape", "1B", list(SHAPES), "Of Llama 3; tiny to try this out.")
CHIP = flags.DEFINE_enum(
    "chip", "h200", list(forecast.CHIPS), "Whose peak the FLOPs are a share of."
)
RESIDENT = flags.DEFINE_bool("resident", False, "Ask the reference in the step.")
UPDATES = flags.DEFINE_integer("updates", 6, "The first two are not counted.", lower_bound=3)
EACH = flags.DEFINE_integer("each", 64, "Pairs of an update.", lower_bound=1)
POSITIONS = flags.DEFINE_integer("positions", 8192, "Positions of a micro-batch.", lower_bound=1)
KEPT = flags.DEFINE_string("keep", "full", "remat, as in docs/speed.md.")
MU = flags.DEFINE_string("mu_dtype", "float32", "Of Adam's first moment.")
BACKEND = flags.DEFINE_string("attention", None, "Unset: the platform's.")
SAVE = flags.DEFINE_string("save", None, "Writes weights and pairs there, and stops.")


def config_of(shape: str) -> llama.Config:
    """As the Llama 3 of that size."""
    width, mlp, deep, heads, keys, head, vocabulary, tied = SHAPES[shape]
    return llama.Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=deep,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=head, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, rope_parameters=rope.Rope(rope_theta=5e5),
    )  # fmt: skip


def main() -> None:
    """Prints one JSON line."""
    config = config_of(SHAPE.value)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(SAVE.value or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        work.write_pairs(
            folder / "pairs.jsonl", UPDATES.value * EACH.value, vocabulary=config.vocab_size
        )
        rows = work.read_pairs(folder / "pairs.jsonl")
    pairs = [pairs_as_ids.as_ids(i, row) for i, row in enumerate(rows)]
    mesh = sharding.mesh_of(1, -1, 1)
    with jax.set_mesh(mesh):
        graph = nnx.graphdef(nnx.eval_shape(lambda: made(config)))
        everywhere = jax.NamedSharding(mesh, jax.P())
        make = lambda: nnx.to_pure_dict(nnx.state(made(config)))
        policy = jax.jit(make, out_shardings=everywhere)()
        if SAVE.value:
            zoo.save(nnx.merge(graph, nnx.State(policy)), folder / SHAPE.value)
            return
        print(json.dumps(timed(graph, policy, pairs, mesh)))


def made(config: llama.Config) -> llama.Model:
    """With weights of std 0.02."""
    model = llama.Model(config, nnx.Rngs(0), jnp.bfloat16)
    model.attention, model.remat = BACKEND.value, KEPT.value
    return model


def timed(graph: nnx.GraphDef, policy: dict, pairs: list, mesh: jax.sharding.Mesh) -> dict:
    """Some updates, and what they took."""
    shape = shapes.choose(pairs, per_update=EACH.value, shards=1, most=POSITIONS.value)
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    forward = functools.partial(logps.compiled(mesh), graph)
    narrow = logps.cast(policy, jnp.bfloat16)
    asked = logps.of_examples(functools.partial(forward, narrow), pairs, place)
    if not RESIDENT.value:
        narrow = None
    adamw = optax.adamw(1e-6, *work.BETAS, weight_decay=0.0, mu_dtype=MU.value)
    opt_state = optimizer.init(adamw, policy, mesh)
    objective = objectives.objective({"loss": "sigmoid", "beta": work.BETA})
    programs = update.compiled(
        policy, opt_state, graph=graph, adamw=adamw, loss=objective.loss,
        figures=lambda answers: metrics.preference(answers, objective), shape=shape,
    )  # fmt: skip
    seconds, found = [], []
    updates = list(batches.in_order(pairs, place))
    for one in updates:
        since = time.perf_counter()
        said, sums = batches.said(one, place), programs.zero()
        for packed in one.micro_batches:
            batch = batches.put(packed, place)
            theirs = batches.everywhere(asked[one.source_rows], place)
            if narrow is not None:
                theirs = forward(narrow, batch)
            sums = programs.add(sums, policy, {}, theirs, said, batch)
        policy, opt_state, values = programs.apply(sums, policy, opt_state, said)
        del sums
        found.append(float(values["dpo_loss"]))
        seconds.append(time.perf_counter() - since)
    rates = [u.real_tokens / s for u, s in list(zip(updates, seconds, strict=True))[2:]]
    weights = sum(x.size for x in jax.tree.leaves(policy))
    if "head" in policy:
        weights -= policy["embedding"].size
    per_token = (8 if RESIDENT.value else 6) * weights
    stats = jax.local_devices()[0].memory_stats() or {}
    rate = statistics.median(rates)
    return {
        "shape": SHAPE.value,
        "tokens_per_second": rate,
        "model_flops": rate * per_token / forecast.CHIPS[CHIP.value].bf16_flops,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "fill": shapes.fill(pairs, shape).share,
        "losses": found,
        "first_update_s": seconds[0],
        "rows": list(shape),
    }


if __name__ == "__main__":
    command.main_without_config(main)

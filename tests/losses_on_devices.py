"""The update of every loss, in one and in several micro-batches, on one device and on eight.

Prints one JSON record per loss: how far the others are from the first. Started by test_devices.py,
in a process whose platform shows eight devices; in one that shows one, meshes are left out.

Started so, by tests/in_float64.py, everything is computed in float64.
"""

import json
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.preference import coupled, objectives
from recipes.training import logps
from tests.conftest import large_weights, meshes, programs_of, small_config
from tests.recipes.data.packed.test_packing import random_pairs
from zoo import llama
from zoo.parts import sharding

PAIRS = 22
CONFIG = small_config(vocab_size=96, num_hidden_layers=2)
OPTIONS = {
    "dpop": dict(dpop_lambda=5.0), "r_dpo": dict(length_alpha=0.01),
    "exo_pair": dict(label_smoothing=0.1), "simpo": dict(beta=2.0), "sigmoid_norm": dict(beta=2.0),
    "orpo": dict(loss="orpo,sigmoid=0.1"), "sft": dict(loss="sft,sigmoid=0.1"),
    "sft_seq": dict(loss="sft_seq,sigmoid=0.1"),
    "discopop": dict(discopop_tau=0.5),  # with 0.05 it falls towards margins below 0 from 0 on
}  # fmt: skip


def objective_of(name: str) -> objectives.Objective:
    """With options that fit it."""
    return objectives.objective({"loss": name, "beta": 0.1} | OPTIONS.get(name, {}))


def update(name: str, mesh: jax.sharding.Mesh, rows: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Micro-batches, the gradient as one vector, and the log-probabilities."""
    objective, shards = objective_of(name), sharding.data_shards(mesh)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(large_weights(llama.Model(CONFIG, nnx.Rngs(0)), scale=0.5))
        weights = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.to_pure_dict(state))
        params = jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))
        shape = Shape(rows, 64, PAIRS, 2, few=rows, shards=shards)
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        # Every other one is wanted, for losses that look at labels and not at pairs.
        pairs = [
            one._replace(ratings=(i % 2, np.nan)) for i, one in enumerate(random_pairs(0, PAIRS))
        ]
        packed = batches.pack(pairs, shape, range(shards))
        draw = np.random.default_rng(1).standard_normal((PAIRS, 2)).astype(np.float32)
        forward = logps.compiled(mesh)
        fields = batches.data_fields(packed, place)
        sgd = optax.sgd(1.0)
        programs = programs_of(params, sgd.init(params), graph, sgd, objective, shape)
        ask = lambda batch: forward(graph, params, batch)
        # A reference that is near the policy.
        theirs = batches.put_replicated(draw - 30, place)
        pull, sums = None, programs.zero()
        if objective.is_coupled:
            pull, _ = coupled.pull(objective, ask, lambda *_: theirs, packed, fields, place)
        for micro_batch in packed.micro_batches:
            batch = batches.put(micro_batch, place)
            sums = programs.add(sums, params, {}, theirs, fields, batch, pull)
        gradient = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(sums.gradient)]
        return len(packed.micro_batches), np.concatenate(gradient), np.asarray(sums.policy.logps)


def main() -> None:
    for name in sys.argv[2:]:
        every = meshes() if jax.device_count() > 1 else {"one": sharding.mesh_of(1, 1, 1)}
        _, whole, _ = update(name, every["one"], 16)
        found = {"loss": name, "length": float(np.linalg.norm(whole))}
        for rows in (1, 4, 16):
            count, gradient, _ = update(name, every["one"], rows)
            found[f"{count} micro-batches"] = apart(gradient, whole)
        for mesh in every.keys() - {"one"}:
            _, gradient, _ = update(name, every[mesh], 8)
            found[mesh] = apart(gradient, whole)
        print(json.dumps(found), flush=True)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """As a share of the second's length."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()

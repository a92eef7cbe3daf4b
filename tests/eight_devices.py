"""Trains ten steps on one device and on meshes of eight; prints one JSON record per mesh.

Started by test_devices.py, in a process whose platform shows eight devices.
"""

import json
import pathlib
import re
import sys

from flax import nnx
import jax
import numpy as np
import optax

from recipes.data import mixture
from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.training import logps, optimizer
from tests.conftest import large_weights, meshes, programs_of, sigmoid, small_config
from tests.recipes.data.packed.test_packing import random_pairs
import zoo
from zoo import llama
from zoo.parts import sharding

PAIRS = 16
# A vocabulary whose embedding and head have a size that no other weight has.
CONFIG = small_config(vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
DTYPES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "u32": 4}


def gathers(text: str) -> list[tuple[int, str, bool]]:
    """Bytes, shape and whether it is inside a loop, of every all-gather in a compiled program."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = opened[1]
        made = re.search(r"= \(?(\w+)\[([\d,]*)\]\S* .*?all-gather(?:-start)?\(", line)
        if made:
            shape = [int(n) for n in made[2].split(",") if n]
            size = int(np.prod(shape)) * DTYPES[made[1]]
            found.append((size, f"{made[1]}{sorted(shape)}", computation in bodies))
    return found


def run(folder: pathlib.Path, mesh: jax.sharding.Mesh, rows: int, compute=np.float32) -> dict:
    with jax.set_mesh(mesh):
        model = zoo.load(folder, mesh=mesh, compute_dtype=compute)
        graph, state = nnx.split(model)
        policy = nnx.to_pure_dict(state)
        reference = nnx.to_pure_dict(nnx.state(zoo.load(folder, dtype=compute, mesh=mesh)))
        adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        opt_state = optimizer.init(adamw, policy, mesh)
        forward = logps.compiled(mesh)
        pairs = random_pairs(0, 3 * PAIRS)
        shards = sharding.data_shards(mesh)
        shape = Shape(rows, 64, PAIRS, 2, few=rows, shards=shards)
        programs = programs_of(policy, opt_state, graph, adamw, sigmoid(0.1), shape)
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        endless = mixture.endless([mixture.Part("all", 1.0, pairs, len(pairs))], seed=0)
        data = batches.training(endless, shape, shards=range(shards))
        found = []
        for at in range(10):
            fields, sums = batches.data_fields(data[at], place), programs.zero()
            for batch in data[at].micro_batches:
                batch = batches.put(batch, place)
                theirs = forward(graph, reference, batch)
                sums = programs.add(sums, policy, {}, theirs, fields, batch)
            policy, opt_state, values = programs.apply(sums, policy, opt_state, fields)
            found.append(float(values["dpo_loss"]))
        lowered = programs.add.lower(programs.zero(), policy, {}, theirs, fields, batch)
        text = lowered.compile().as_text()
        made = gathers(text)
        tensor = mesh.shape["tensor"]
        head = f"f32{sorted([CONFIG.vocab_size // tensor, CONFIG.hidden_size])}"
        moments = opt_state[1][0]
        same = jax.tree.map(lambda p, m, v: p.sharding == m.sharding == v.sharding, policy,
                            moments.mu, moments.nu)  # fmt: skip
        weights = jax.tree.leaves(policy)
        held = sum(w.addressable_shards[0].data.nbytes for w in weights)
        one_layer = [x.nbytes // (x.shape[0] if path[0].key == "blocks" else 1)
                     for path, x in jax.tree_util.tree_flatten_with_path(policy)[0]]  # fmt: skip
        heads = [inside for _, shape, inside in made if shape == head]
        return {
            "losses": found,
            "gathers": len(made),
            "largest_gather": max((size for size, *_ in made), default=0),
            "largest_weight": max(one_layer),
            # The embedding has the head's shape.
            "head_and_embedding_gathers": len(heads),
            "of_them_in_loops": sum(heads),
            "optimizer_as_weights": all(jax.tree.leaves(same)),
            "weights_per_device": held / sum(w.nbytes for w in weights),
            "all": sorted({(shape, inside) for _, shape, inside in made}),
        }


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    zoo.save(large_weights(llama.Model(CONFIG, nnx.Rngs(0)), scale=0.5), folder, dtype=np.float32)
    for name, mesh in meshes().items():
        print(json.dumps({"mesh": name} | run(folder, mesh, rows=8)), flush=True)


if __name__ == "__main__":
    main()

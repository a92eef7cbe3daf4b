"""The first update of adapters on one device and on meshes of eight; one JSON record per mesh.

Started by test_devices.py, in a process whose platform shows eight devices.
"""

import json
import pathlib
import sys

from flax import nnx
import jax
import numpy as np
import optax

from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.training import logps, optimizer
from tests.conftest import large_weights, meshes, programs_of, sigmoid, small_config
from tests.recipes.data.packed.test_packing import random_pairs
import zoo
from zoo import adapters, llama, targets
from zoo.parts import adapted, sharding

PAIRS = 16
# Which factor begins as 0, how the base is kept, and what layers keep of their work.
HOW = [("A", None, "full"), ("B", None, "full"), ("B", None, "products"), ("B", "nf4", "full"),
       ("B", "nf4", "products"), ("B", "int8", "products")]  # fmt: skip
CONFIG = small_config(vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2)


def run(
    folder: pathlib.Path, mesh: jax.sharding.Mesh, zero: str, kind: str | None, policy: str
) -> tuple[dict, list]:
    """What was found, and the adapters after the first step."""
    with jax.set_mesh(mesh):
        model = zoo.load(folder, mesh=mesh, frozen=kind)
        model.remat, model.remat_layers = policy, None if kind else 1
        found = targets.sites(model, targets.Lora(4, 8.0))
        everywhere = jax.NamedSharding(mesh, jax.P())
        put = lambda x: jax.device_put(x, everywhere)
        frozen = adapters.attached(nnx.to_pure_dict(nnx.state(model)), found, put)
        like = adapters.layout(model, found)
        trained = adapters.fresh(frozen, like, zero=zero, seed=0)
        adamw = optax.adamw(1e-3)
        opt_state = optimizer.init(adamw, trained, mesh)
        shards = sharding.data_shards(mesh)
        shape = Shape(8, 64, PAIRS, 2, few=8, shards=shards)
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        graph, forward = nnx.graphdef(model), logps.compiled(mesh)
        update = batches.pack(random_pairs(0, PAIRS), shape, [*range(shards)])
        programs = programs_of(trained, opt_state, graph, adamw, sigmoid(0.1), shape)
        sums, fields, ratios = programs.zero(), batches.data_fields(update, place), 0.0
        reference = adapted.joined(adapters.nothing(trained, frozen), frozen)
        for packed in update.micro_batches:
            batch = batches.put(packed, place)
            ours = forward(graph, adapted.joined(trained, frozen), batch)
            theirs = forward(graph, reference, batch)
            ratios = max(ratios, float(abs(ours - theirs).max()))
            sums = programs.add(sums, trained, frozen, theirs, fields, batch)
        moved, _, values = programs.apply(sums, trained, opt_state, fields)
        # How many ways of splitting there are among them: one would be all of them whole.
        specs = {str(x.sharding.spec) for x in jax.tree.leaves(moved)}
        record = {"ratios": ratios, "loss": float(values["dpo_loss"]), "specs": len(specs)}
        return record, [*map(np.asarray, jax.tree.leaves(moved))]


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    zoo.save(large_weights(llama.Model(CONFIG, nnx.Rngs(0)), scale=0.5), folder, dtype=np.float32)
    for zero, kind, policy in HOW:
        one = None
        for name, mesh in meshes().items():
            record, moved = run(folder, mesh, zero, kind, policy)
            one = one or moved
            far = max(float(abs(x - y).max()) for x, y in zip(one, moved, strict=True))
            how = {"zero": zero, "frozen": kind, "remat": policy}
            print(json.dumps(how | {"mesh": name, "far": far} | record), flush=True)


if __name__ == "__main__":
    main()

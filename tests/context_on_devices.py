"""Loss and gradient of an update whose rows several devices share, against one device.

Started by test_devices.py with the names of families, in a process whose platform shows eight
devices; one JSON record for each and each mesh. Rows are cut wherever it comes, also between a
prompt and its answers. Run by tests/in_float64.py.
"""

import json
import re
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recipes.data.packed import batches, stripes
from recipes.data.packed.packing import Shape
from recipes.training import update
from tests.conftest import large_weights, programs_of, sigmoid, small_config
from tests.families_on_devices import FAMILIES, laid_out
from tests.recipes.data.packed.test_packing import random_pairs
from tests.zoo import twins
import zoo
from zoo import llama
from zoo.parts import sharding

PAIRS, ROWS, T = 12, 4, 64  # no other axis is as long as a row
# Of each: data, fsdp, tensor, context.
MESHES = {
    "context 2": (1, 1, 1, 2), "context 4": (1, 1, 1, 4), "context 8": (1, 1, 1, 8),
    "fsdp 4, context 2": (1, 4, 1, 2), "data 2, fsdp 2, context 2": (2, 2, 1, 2),
    "fsdp 2, context 2, tensor 2": (1, 2, 2, 2), "context 4, tensor 2": (1, 1, 2, 4),
}  # fmt: skip


def model_of(name: str) -> zoo.Model:
    if name in FAMILIES:
        return twins.untrained(name.split()[0], FAMILIES[name])
    width = 36 if name == "uneven" else 32  # which not every number of devices divides
    config = small_config(vocab_size=96, hidden_size=width)
    return large_weights(llama.Model(config, nnx.Rngs(0)), scale=0.5)


def outcome(name: str, mesh: jax.sharding.Mesh) -> tuple[float, list[np.ndarray], list[str]]:
    """The loss, the gradient, and of which arrays a device gathers whole rows."""
    with jax.set_mesh(mesh):
        graph, params, frozen = laid_out(model_of(name), mesh, adapted=name == "adapters")
        shards = sharding.data_shards(mesh)
        shape = Shape(ROWS, T, PAIRS, 2, few=ROWS, shards=shards, context=mesh.shape["context"])
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        packed = batches.pack(random_pairs(0, PAIRS), shape, range(shards))
        sgd, objective = optax.sgd(1.0), sigmoid(0.1)
        programs = programs_of(params, sgd.init(params), graph, sgd, objective, shape)
        sums, fields = programs.zero(), batches.data_fields(packed, place)
        draw = np.random.default_rng(1).standard_normal((PAIRS, 2)) - 30
        theirs = batches.put_replicated(draw.astype(jnp.float32), place)
        given = [batches.put(micro_batch, place) for micro_batch in packed.micro_batches]
        add = programs.add.lower(sums, params, frozen, theirs, fields, given[0]).compile()
        for batch in given:
            sums = add(sums, params, frozen, theirs, fields, batch)
        losses = objective.loss(update.answers(sums.policy, sums.reference, fields))
        gradient = [np.asarray(x) for x in jax.tree.leaves(sums.gradient)]
        return float(losses.mean()), gradient, whole_rows(add.as_text() or "")


def whole_rows(text: str) -> list[str]:
    """What follows rows and tokens in the shapes of the gathered arrays that have all of T."""
    gathered = re.findall(r"= f\d+\[([\d,]+)\]\S* all-gather\(", text)
    return sorted({found[1] for x in gathered if (found := re.fullmatch(rf"\d+,{T},(.*)", x))})


def main() -> None:
    stripes.STRIPE = 4  # so that each device has several
    one = sharding.mesh_of(1, 1, 1, devices=jax.devices()[:1])
    for name in sys.argv[1:]:
        expected, of_one, _ = outcome(name, one)
        for mesh, sizes in MESHES.items():
            some = jax.devices()[: int(np.prod(sizes))]
            found, of_many, gathered = outcome(name, sharding.mesh_of(*sizes, devices=some))
            apart = [float(np.abs(a - b).max()) for a, b in zip(of_one, of_many, strict=True)]
            largest = max(float(np.abs(a).max()) for a in of_one)
            record = {"family": name, "mesh": mesh, "loss": abs(found - expected),
                      "gradient": max(apart), "largest": largest, "whole": gathered}  # fmt: skip
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

"""Updates of several families on two slices of four devices against one device, as JSON records.

Started by test_devices.py with their names, in a process whose platform shows eight devices. A
slice is four of them. "adapters" are those of a llama. What slices exchange is read from the
compiled programs.
"""

import json
import re
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.training import collectives
from tests.conftest import large_weights, programs_of, sigmoid, small_config
from tests.families_on_devices import FAMILIES, laid_out
from tests.recipes.data.packed.test_packing import random_pairs
from tests.zoo import twins
import zoo
from zoo import llama
from zoo.parts import sharding

PAIRS, ROWS = 64, 8
PER_SLICE = 4


def model_of(name: str) -> zoo.Model:
    if name in FAMILIES:
        return twins.untrained(name, FAMILIES[name])
    return large_weights(llama.Model(small_config(vocab_size=96), nnx.Rngs(0)), scale=0.5)


def update(name: str, mesh: jax.sharding.Mesh) -> tuple[dict, list[np.ndarray]]:
    """The loss and what crosses slices; and the gradient."""
    with jax.set_mesh(mesh):
        graph, params, frozen = laid_out(model_of(name), mesh, adapted=name == "adapters")
        shards = sharding.data_shards(mesh)
        shape = Shape(ROWS, 64, PAIRS, 2, few=ROWS, shards=shards)
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        packed = batches.pack(random_pairs(0, PAIRS), shape, range(shards))
        sgd = optax.sgd(1.0)
        opt_state = sgd.init(params)
        programs = programs_of(params, opt_state, graph, sgd, sigmoid(0.1), shape)
        sums, fields = programs.zero(), batches.data_fields(packed, place)
        draw = np.random.default_rng(1).standard_normal((PAIRS, 2)).astype(np.float32)
        theirs = batches.put_replicated(draw - 30, place)
        for micro_batch in packed.micro_batches:
            batch = batches.put(micro_batch, place)
            sums = programs.add(sums, params, frozen, theirs, fields, batch)
        args = {"add": (sums, params, frozen, theirs, fields, batch),
                "apply": (sums, params, opt_state, fields)}  # fmt: skip
        crossing = {
            which: crossings(getattr(programs, which).lower(*given).compile().as_text(), mesh)
            for which, given in args.items()
        }
        before = jax.tree.map(jnp.copy, params)
        moved, _, values = programs.apply(sums, params, opt_state, fields)
        gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, moved)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(before))
        count = len(packed.micro_batches)
        record = {"loss": float(values["dpo_loss"]), "pairs": PAIRS, "micro_batches": count,
                  "weights_per_device": held, **crossing}  # fmt: skip
        return record, jax.tree.leaves(gradient)


def crossings(text: str, mesh: jax.sharding.Mesh) -> list[tuple[int, bool]]:
    """Bytes of each exchange between slices, and whether it is in a loop."""
    slices = [sharding.slice_of(device) for device in mesh.devices.flat]
    kinds = "|".join(collectives.KINDS)
    lines = [x for x in text.splitlines() if re.search(rf"= .*? ({kinds})(-start)?\(", x)]
    found = collectives.of(text)
    assert len(lines) == len(found)
    assert all(map(collectives.groups, lines)), [x for x in lines if not collectives.groups(x)]
    return [
        (one.bytes, one.in_loop)
        for line, one in zip(lines, found, strict=True)
        if any(len({slices[at] for at in group}) > 1 for group in collectives.groups(line))
    ]


def main() -> None:
    one = sharding.mesh_of(1, 1, 1, devices=jax.devices()[:1])
    sharding.slice_of = lambda device: device.id // PER_SLICE
    meshes = {"2 x fsdp 4": (2, 4, 1), "2 x fsdp 2, tensor 2": (2, 2, 2), "4, fsdp 2": (4, 2, 1)}
    for name in sys.argv[1:]:
        expected, of_one = update(name, one)
        for mesh, sizes in meshes.items():
            found, of_many = update(name, sharding.mesh_of(*sizes))
            far = [float(np.abs(a - b).max()) for a, b in zip(of_one, of_many, strict=True)]
            apart = {"apart": abs(found["loss"] - expected["loss"]), "gradient": max(far)}
            print(json.dumps({"family": name, "mesh": mesh} | apart | found), flush=True)


if __name__ == "__main__":
    main()

"""Steps of the recipe's own update against TRL's, on the same work: all weights, and adapters."""

import json
import pathlib

from flax import nnx
import jax
import numpy as np
import optax

from recipes.data.ids.pair_ids import PairIds
from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.training import logps, optimizer
from tests.conftest import programs_of, sigmoid
from tests.trl import work
import zoo
from zoo import adapters, peft
from zoo.parts import adapted, sharding

HOME = pathlib.Path(__file__).parent.parent / "trl"


def as_ids(row, pair):
    prompt, chosen, rejected = (
        np.array(pair[name], np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    masks = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PairIds(row, prompt, chosen, rejected, *masks)


def test_the_trajectory_is_trls(tmp_path):
    work.write_model(tmp_path)
    mesh = sharding.mesh_of(1, -1, 1)
    with jax.set_mesh(mesh):
        policy, reference = (
            nnx.to_pure_dict(nnx.state(zoo.load(tmp_path, mesh=mesh))) for _ in range(2)
        )
        graph = nnx.graphdef(zoo.load(tmp_path, mesh=mesh))
        found = losses_of(graph, policy, {}, reference, mesh, work.STEPS, work.LEARNING_RATE)
    apart = np.abs(np.array(found) - losses_there("trajectory"))
    print(f"apart: first 20 {apart[:20].max():.2e}, all 50 {apart.max():.2e}")
    assert apart[:20].max() <= 1e-4
    assert apart.max() <= 1e-3


def test_the_trajectory_of_adapters_is_that_of_trl_and_peft(tmp_path):
    """From a folder that PEFT reads too: the same first adapters, pairs and order."""
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    work.write_model(folder)
    work.write_adapter(adapter, folder)
    mesh = sharding.mesh_of(1, -1, 1)
    with jax.set_mesh(mesh):
        model = zoo.load(folder, mesh=mesh)
        params = nnx.to_pure_dict(nnx.state(model))
        begun = peft.read(model, adapter)
        frozen = adapters.attached(
            params, begun.sites, lambda x: jax.device_put(x, everywhere(mesh))
        )
        theirs = adapted.joined(adapters.nothing(begun.adapters, frozen), frozen)
        graph = nnx.graphdef(model)
        trained, steps = begun.adapters, work.LORA_STEPS
        found = losses_of(graph, trained, frozen, theirs, mesh, steps, work.LORA_RATE)
    apart = np.abs(np.array(found) - losses_there("trajectory_lora"))
    print(f"apart: first 20 {apart[:20].max():.2e}, all 30 {apart.max():.2e}")
    assert min(found) < 0.6
    assert apart[:20].max() <= 1e-4
    assert apart.max() <= 1e-3


def everywhere(mesh):
    return jax.NamedSharding(mesh, jax.P())


def losses_there(name):
    return np.array(json.loads((HOME / f"{name}.json").read_text())["losses"])


def losses_of(graph, policy, frozen, reference, mesh, steps, rate):
    """The loss of every step, of what is trained beside what is frozen."""
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    opt_state = optimizer.init(adamw, policy, mesh)
    shape = Shape(rows=4, row_length=256, examples=work.BATCH, answers=2, few=1)
    programs = programs_of(policy, opt_state, graph, adamw, sigmoid(work.BETA), shape)
    forward = logps.compiled(mesh)
    pairs = [as_ids(row, pair) for row, pair in enumerate(work.pairs())]
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    found = []
    for at in range(steps):
        start = at * work.BATCH % work.PAIRS
        update = batches.pack(pairs[start : start + work.BATCH], shape, [0])
        said, sums = batches.said(update, place), programs.zero()
        for batch in update.micro_batches:
            theirs = forward(graph, reference, batch)
            sums = programs.add(sums, policy, frozen, theirs, said, batch)
        policy, opt_state, values = programs.apply(sums, policy, opt_state, said)
        found.append(values["dpo_loss"])
    return found

"""Fifty steps of the recipe's own update against fifty of TRL's, on the same work."""

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
from zoo.parts import sharding

FACTS = json.loads((pathlib.Path(__file__).parent.parent / "trl" / "trajectory.json").read_text())


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
        model = zoo.load(tmp_path, mesh=mesh)
        graph, state = nnx.split(model)
        policy = nnx.to_pure_dict(state)
        reference = nnx.to_pure_dict(nnx.state(zoo.load(tmp_path, mesh=mesh)))
        adamw = optax.adamw(work.LEARNING_RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
        opt_state = optimizer.init(adamw, policy, mesh)
        shape = Shape(rows=4, row_length=256, examples=work.BATCH, answers=2, few=1)
        programs = programs_of(policy, opt_state, graph, adamw, sigmoid(work.BETA), shape)
        forward = logps.compiled(mesh)
        pairs = [as_ids(row, pair) for row, pair in enumerate(work.pairs())]
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        found = []
        for at in range(work.STEPS):
            start = at * work.BATCH % work.PAIRS
            update = batches.pack(pairs[start : start + work.BATCH], shape, [0])
            said, sums = batches.said(update, place), programs.zero()
            for batch in update.micro_batches:
                theirs = forward(graph, reference, batch)
                sums = programs.add(sums, policy, {}, theirs, said, batch)
            policy, opt_state, values = programs.apply(sums, policy, opt_state, said)
            found.append(values["dpo_loss"])
    apart = np.abs(np.array(found) - FACTS["losses"])
    print(f"apart: first 20 {apart[:20].max():.2e}, all 50 {apart.max():.2e}")
    assert apart[:20].max() <= 1e-4
    assert apart.max() <= 1e-3

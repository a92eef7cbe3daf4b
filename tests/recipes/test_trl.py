"""Fifty steps of the recipe's own update against fifty of TRL's, on the same work."""

import functools
import json
import pathlib

from flax import nnx
import jax
import numpy as np
import optax

from recipes import logps, losses, optimizer, step
from recipes.data import batches
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds
from tests.trl import work
import zoo
from zoo import sharding

FACTS = json.loads((pathlib.Path(__file__).parent.parent / "trl" / "trajectory.json").read_text())


def as_ids(row, pair):
    prompt, chosen, rejected = (
        np.array(pair[name], np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    masks = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PairIds(row, prompt, chosen, rejected, *masks, False, False)


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
        programs = step.compiled(
            policy, opt_state, graph=graph, adamw=adamw, beta=work.BETA,
            loss=functools.partial(losses.sigmoid, beta=work.BETA, label_smoothing=0.0),
            pairs=work.BATCH,
        )  # fmt: skip
        forward = logps.compiled(mesh)
        pairs = [as_ids(row, pair) for row, pair in enumerate(work.pairs())]
        shape = Shape(rows=4, row_length=256, examples=work.BATCH, answers=2, few=1)
        found = []
        for at in range(work.STEPS):
            start = at * work.BATCH % work.PAIRS
            update = batches.pack(pairs[start : start + work.BATCH], shape, [0])
            sums = programs.zero()
            for batch in update.micro_batches:
                sums = programs.add(sums, policy, forward(graph, reference, batch), batch)
            policy, opt_state, values = programs.apply(sums, policy, opt_state)
            found.append(values["dpo_loss"])
    apart = np.abs(np.array(found) - FACTS["losses"])
    print(f"apart: first 20 {apart[:20].max():.2e}, all 50 {apart.max():.2e}")
    assert apart[:20].max() <= 1e-4
    assert apart.max() <= 1e-3

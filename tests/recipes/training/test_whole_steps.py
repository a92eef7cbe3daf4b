"""An update that is not finite changes nothing: not a weight, not a moment of the optimizer."""

import json
import math
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes import dpo
from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.preference import reference
from recipes.training import optimizer
from tests.conftest import large_weights, programs_of, sigmoid, small_config
from tests.recipes.data.packed.test_packing import random_pairs
from zoo import llama
from zoo.parts import sharding

PAIRS = 4


@pytest.fixture(scope="module")
def work():
    """A policy of its own, one micro-batch, and the programs."""
    mesh = sharding.mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(large_weights(llama.Model(small_config(), nnx.Rngs(0)), scale=0.3))
        where = jax.NamedSharding(mesh, jax.P())
        params = jax.device_put(nnx.to_pure_dict(state), where)
        adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        opt_state = optimizer.init(adamw, params, mesh)
        shape = Shape(4, 64, PAIRS, 2, 4)
        programs = programs_of(params, opt_state, graph, adamw, sigmoid(0.1), shape)
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        update = batches.pack(random_pairs(0, PAIRS), place.shape, [0])
        batch, fields = (
            batches.put(update.micro_batches[0], place),
            batches.data_fields(update, place),
        )
        yield programs, params, opt_state, batch, fields


def copied(tree):
    return jax.tree.map(lambda x: x + 0, tree)


def taken(work, *, reference=0.0, gradient=None, weight=None):
    """One update, with a number that is none planted somewhere."""
    programs, params, opt_state, batch, fields = work
    params, opt_state = copied(params), copied(opt_state)
    if weight is not None:
        params["norm"]["scale"] = params["norm"]["scale"].at[0].set(weight)
    theirs = jnp.full((PAIRS, 2), -50.0).at[1, 0].add(reference)
    sums = programs.add(programs.zero(), params, {}, theirs, fields, batch)
    if gradient is not None:
        sums.gradient["norm"]["scale"] = sums.gradient["norm"]["scale"].at[0].set(gradient)
    return programs.apply(sums, params, opt_state, fields)


def test_a_sound_update_is_taken(work):
    params, opt_state, values = taken(work)
    assert float(values["skipped"]) == 0
    assert not np.array_equal(params["norm"]["scale"], work[1]["norm"]["scale"])
    assert [int(x) for x in jax.tree.leaves(opt_state) if x.ndim == 0] == [1]


def test_an_update_works_in_place(work):
    """Beside the gradient it needs as much again, and no second policy or optimizer."""
    programs, params, opt_state, _, fields = work
    compiled = programs.apply.lower(programs.zero(), params, opt_state, fields).compile()
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * weights


@pytest.mark.parametrize(
    "planted",
    [
        {"reference": math.nan},
        {"reference": math.inf},
        {"gradient": math.nan},
        {"gradient": -math.inf},
    ],
    ids=str,
)
def test_what_is_not_finite_changes_nothing(work, planted):
    params, opt_state, values = taken(work, **planted)
    assert float(values["skipped"]) == 1
    for after, before in zip(
        jax.tree.leaves((params, opt_state)), jax.tree.leaves(work[1:3]), strict=True
    ):
        np.testing.assert_array_equal(after, before)


def test_a_weight_that_is_none_spreads_no_further(work):
    params, opt_state, values = taken(work, weight=math.nan)
    assert float(values["skipped"]) == 1
    assert int(jnp.isnan(params["norm"]["scale"]).sum()) == 1
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params["blocks"], opt_state)))


def planted_at(number, monkeypatch):
    """The reference says something that is no number, of the pairs of one update."""
    ready = reference.ready

    def off(*given):
        found, updates = ready(*given), []

        def of_batch(batch, rows):
            if rows.tolist() not in updates:
                updates.append(rows.tolist())
            # The first was asked before, by the gate.
            return found.of_batch(batch, rows) * (math.nan if len(updates) == number + 1 else 1)

        return found._replace(of_batch=of_batch)

    monkeypatch.setattr(reference, "ready", off)


def records(config):
    lines = (pathlib.Path(config.directory) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if "train/dpo_loss" in r}


@pytest.mark.full
def test_a_run_stops_at_what_is_not_finite_and_keeps_what_was_before(tiny_config, monkeypatch):
    config = tiny_config
    config.train_batch_size, config.per_device_parallelism = 8, 8
    config.num_train_steps, config.steps_per_checkpoint = 6, 2
    with monkeypatch.context() as patched:
        planted_at(3, patched)
        with pytest.raises(RuntimeError, match=r"at step 3 the loss .*--config.nonfinite=skip"):
            dpo.train(config)
    names = {path.name for path in (pathlib.Path(config.directory) / "checkpoints").iterdir()}
    assert "2" in names and "4" not in names
    dpo.train(config)  # and the cause gone, it is resumed
    assert math.isfinite(records(config)[6]["train/dpo_loss"])


@pytest.mark.full
def test_a_run_may_skip_it_and_count(tiny_config, monkeypatch):
    config = tiny_config
    config.train_batch_size, config.per_device_parallelism = 8, 8
    config.num_train_steps, config.nonfinite, config.steps_per_checkpoint = 6, "skip", 4
    planted_at(3, monkeypatch)
    dpo.train(config)
    assert [records(config)[at]["train/skipped"] for at in (2, 3, 6)] == [0, 1, 1]
    assert math.isfinite(records(config)[6]["train/dpo_loss"])
    # One that is to stop from now on is not stopped by what was skipped before.
    shutil.rmtree(pathlib.Path(config.directory) / "checkpoints" / "6")
    config.nonfinite = "stop"
    dpo.train(config)
    assert records(config)[6]["train/skipped"] == 1

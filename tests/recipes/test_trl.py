"""Steps of the recipe's own update against TRL's, on the same work.

Of all weights, of adapters, and shorter ones of every loss.
"""

import json
import pathlib
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes.data.ids import mismatched
from recipes.data.ids.examples import AnswerIds, PairIds
from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.preference import objectives
from recipes.training import logps, optimizer, update
from tests.conftest import programs_of, sigmoid
from tests.long_forms import full_but
from tests.trl import work
import zoo
from zoo import adapters, peft
from zoo.parts import adapted, sharding

HOME = pathlib.Path(__file__).parent.parent / "trl"
# What TRL found with each loss.
RUNS = json.loads((HOME / "trajectory_losses.json").read_text())["runs"]


def as_ids(row, pair):
    prompt, chosen, rejected = (
        np.array(pair[name], np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    masks = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PairIds(row, prompt, chosen, rejected, *masks)


@pytest.mark.full
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


@pytest.mark.full
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
            params, begun.sites, lambda x: jax.device_put(x, replicated(mesh))
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


def replicated(mesh):
    return jax.NamedSharding(mesh, jax.P())


def losses_there(name):
    return np.array(json.loads((HOME / f"{name}.json").read_text())["losses"])


def losses_of(graph, policy, frozen, reference, mesh, steps, rate):
    """The loss of every step, of what is trained beside what is frozen."""
    adamw = adamw_at(rate)
    opt_state = optimizer.init(adamw, policy, mesh)
    shape = Shape(rows=4, row_length=256, examples=work.BATCH, answers=2, few=1)
    programs = programs_of(policy, opt_state, graph, adamw, sigmoid(work.BETA), shape)
    forward = logps.compiled(mesh)
    pairs = [as_ids(row, pair) for row, pair in enumerate(work.pairs())]
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    found = []
    for at in range(steps):
        start = at * work.BATCH % work.PAIRS
        packed = batches.pack(pairs[start : start + work.BATCH], shape, [0])
        fields, sums = batches.data_fields(packed, place), programs.zero()
        for batch in packed.micro_batches:
            theirs = forward(graph, reference, batch)
            sums = programs.add(sums, policy, frozen, theirs, fields, batch)
        policy, opt_state, values = programs.apply(sums, policy, opt_state, fields)
        found.append(values["dpo_loss"])
    return found


def adamw_at(rate):
    return optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)


class Ready(NamedTuple):
    """What the runs of all losses share, compiled once: a loss comes in as its gradient."""

    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    first: update.Params  # of policy and reference
    opt_state: object
    forward: logps.Compiled
    programs: update.Programs
    place: batches.Place


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder, mesh = tmp_path_factory.mktemp("model"), sharding.mesh_of(1, -1, 1)
    work.write_model(folder)
    shape = Shape(rows=4, row_length=256, examples=work.BATCH, answers=2, few=4)
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        model = zoo.load(folder, mesh=mesh)
        first, graph = nnx.to_pure_dict(nnx.state(model)), nnx.graphdef(model)
        adamw = adamw_at(work.LEARNING_RATE)
        opt_state = optimizer.init(adamw, first, mesh)
        programs = programs_of(first, opt_state, graph, adamw, sigmoid(work.BETA), shape)
        return Ready(mesh, graph, first, opt_state, logps.compiled(mesh), programs, place)


@pytest.mark.parametrize("name", full_but(RUNS, "sigmoid", "aot", "kto_unwanted"))
def test_losses_are_trls(name, ready):
    run = RUNS[name]
    given = work.short_prompts(work.pairs()) if run["trainer"] == "ORPO" else work.pairs()
    pairs = [as_ids(row, pair) for row, pair in enumerate(given)]
    if run["trainer"] == "KTO":
        rows, starts = work.rows(), range(0, work.PAIRS, work.BATCH)
        pairs = [one for start in starts for one in beside(rows[start : start + work.BATCH])]
    with jax.set_mesh(ready.mesh):
        found = losses_with(objective_of(name, run), pairs, ready)
    apart = np.abs(np.array(found) - np.array(run["losses"])).max()
    print(f"{name}: apart {apart:.2e}")
    assert apart <= 1e-4


def beside(rows):
    """A batch of answers with labels, each beside one to another prompt from the same batch."""
    array = lambda ids: np.array(ids, np.int32)
    answers = [
        AnswerIds(0, array(one["prompt_ids"]), array(one["completion_ids"]),
                  np.ones(len(one["completion_ids"]), bool), (), (float(one["label"]),))
        for one in rows
    ]  # fmt: skip
    return [mismatched.joined(one, answers[i - 1], 512) for i, one in enumerate(answers)]


def objective_of(name, run):
    """Ours, by the options that TRL was given."""
    options = dict(run["options"])
    kinds, weights = options.pop("loss_type", None), options.pop("loss_weights", None)
    if weights:
        name = ",".join(f"{kind}={weight}" for kind, weight in zip(kinds, weights, strict=True))
    name = "kto" if run["trainer"] == "KTO" else name
    if run["trainer"] == "ORPO":  # whose beta is a weight
        name = f"sft,orpo={options['beta']}"
    if name == "simpo":  # whose margin is asked for after beta
        options["gamma_beta_ratio"] = options.pop("simpo_gamma") / options["beta"]
        assert options.pop("cpo_alpha") == 0
    return objectives.objective(options | {"loss": name})


def losses_with(objective, pairs, ready):
    """The loss of every step, each pair met twice."""
    policy, opt_state = jax.tree.map(jnp.copy, (ready.first, ready.opt_state))
    everyone, found = jnp.ones(work.BATCH, bool), []

    @jax.jit
    @jax.value_and_grad
    def of(policy, reference, fields, here):
        each = objective.loss(update.Answers(policy, reference, *fields))
        return jnp.where(here, each, 0).mean()

    for at in range(work.LOSS_STEPS):
        start = at * work.BATCH % work.PAIRS
        packed = batches.pack(pairs[start : start + work.BATCH], ready.place.shape, [0])
        fields, sums = batches.data_fields(packed, ready.place), ready.programs.zero()
        ours, theirs = (
            [ready.forward(ready.graph, params, batch) for batch in packed.micro_batches]
            for params in (policy, ready.first)
        )
        loss, pull = of(sum(ours), sum(theirs), fields, everyone)
        for batch, mine, its in zip(packed.micro_batches, ours, theirs, strict=True):
            if not objective.is_coupled:  # then it is known without the other micro-batches
                _, pull = of(mine, its, fields, batch.is_here)
            sums = ready.programs.add(sums, policy, {}, its, fields, batch, pull)
        policy, opt_state, _ = ready.programs.apply(sums, policy, opt_state, fields)
        found.append(loss)
    return found

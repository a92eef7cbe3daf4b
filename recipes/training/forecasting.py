"""What an update needs of devices, present or not: its programs, compiled and measured."""

import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
import numpy as np

from recipes.data.packed import stripes
from recipes.data.packed.batches import DataFields
from recipes.data.packed.packing import Packed, Shape
from recipes.training import (
    activations,
    adapting,
    collectives,
    learning,
    logps,
    plan,
    trained,
    update,
)
from recipes.training.activations import Remat
from recipes.training.adapting import Adapting
from recipes.training.by_name import Values
from recipes.training.chips import BETWEEN_SLICES, REACHED, Chip
from recipes.training.collectives import Collective
from recipes.training.learning import Learning
from recipes.training.run import Beside
from recipes.training.trained import Chosen
from recipes.training.update import Params
from recipes.training.written import Precision
import zoo
from zoo import adapters
from zoo.parts import adapted, sharding, stack

STEPS = 1000  # steps of a run whose length is unknown; no program depends on it


class Sizes(NamedTuple):
    """Settings that determine the shapes of a micro-batch, under their names."""

    train_batch_size: int
    train_seq_len: int
    row_length: int | None
    per_device_parallelism: int | None


class Job(NamedTuple):
    """An update to be compiled."""

    precision: Precision
    attention: str | None
    remat: str | None  # None: keep as much as fits
    mesh: tuple[int, int, int, int]  # data, fsdp, tensor, context
    beside: Beside | None  # the reference
    given: Values  # what is trained
    loss: update.Loss
    figures: update.Figures
    is_coupled: bool  # the loss of a pair depends on the other pairs of its update
    sizes: Sizes


class Forecast(NamedTuple):
    """The memory, traffic and time of an update; bytes are per device."""

    persistent: dict[str, int]
    temporary: dict[str, int]  # by program
    kept: Remat
    remat: str  # what is rematerialised, in words
    peak: int
    moved: list[Collective]  # by the program that adds a micro-batch, within a slice
    between: list[tuple[str, Collective]]  # the program, and what it sends to another slice
    largest_weight: int  # bytes of the largest weight of a layer, in the compute dtype
    micro_batches: float  # per update
    flops: float  # per update, all devices
    seconds: tuple[float, float]  # per update: compute and traffic overlapped, or not


def forecast(
    job: Job, hf_config: dict[str, object], chip: Chip, devices: list, stored_per_pair: int
) -> Forecast:
    """Compiles one update for `devices`; `stored_per_pair` is a guess at the data."""
    mesh = sharding.mesh_of(*job.mesh, devices=devices)
    needed = job.sizes.train_batch_size * stored_per_pair
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = adapting.blank(job.given, hf_config, job.precision, mesh)
        on_cpus = devices[0].platform == "cpu"  # for which there are no kernels
        model.attention = "blocks" if on_cpus else job.attention
        plan.refuse_cut_rows(job.given, model, mesh.shape["context"])
        given = adapting.of_settings(job.given, model)
        chosen = trained.chosen(job.given, model)
        learnt = learning.learning(
            job.given, model, mesh, STEPS, adapted=given, chosen=chosen, beside=job.beside
        )
        stays, like = sum(learnt.memory.values()), learnt.trained.like
        most = activations.most_positions(model, like, stays, chip.memory, "accelerator")
        batch, shape = _batch(job, mesh, most, needed)
        kept = activations.keeping(model, job.remat, like, shape, stays, chip.memory)
        frozen = _frozen(job, model, given, chosen, mesh)
        compiled = _compiled(
            job, model, learnt, frozen, mesh, batch, shape, adapts=given is not None
        )

    analysed: dict[str, Any] = {name: one.memory_analysis() for name, one in compiled.items()}
    temporary = {name: one.temp_size_in_bytes for name, one in analysed.items()}
    every = [
        (name, one)
        for name, program in compiled.items()
        for one in collectives.of(program.as_text() or "", loops=model.config.sizes["L"])
    ]
    moved = [one for name, one in every if name == "add" and one.kind != collectives.BETWEEN]
    between = [(name, one) for name, one in every if one.kind == collectives.BETWEEN]
    count = needed / batch.tokens.size
    flops = needed * _flops_of_a_position(job, model, kept, adapts=given is not None)
    busy = flops / len(devices) / (REACHED * chip.bf16_flops)
    on_wire = sum(c.bytes * c.times for c in moved) * count / chip.link_bytes
    for name, one in between:
        on_wire += one.bytes * one.times * (1 if name == "apply" else count) / BETWEEN_SLICES
    return Forecast(
        persistent=learnt.memory,
        temporary=temporary,
        kept=kept,
        remat=plan.remat_told(kept, model),
        peak=stays + max(temporary.values()),
        moved=moved,
        between=between,
        largest_weight=_largest_of_a_layer(model) * np.dtype(job.precision.compute).itemsize,
        micro_batches=count,
        flops=flops,
        seconds=(max(busy, on_wire), busy + on_wire),
    )


def _compiled(
    job: Job,
    model: zoo.Model,
    learnt: Learning,
    frozen: Params,
    mesh: Mesh,
    batch: Packed,
    shape: Shape,
    *,
    adapts: bool,
) -> dict[str, jax.stages.Compiled]:
    """The programs of an update by name, with the reference's if that runs in the step."""
    params, graph = learnt.trained.like, nnx.split(model)[0]
    programs = update.compiled(
        params, learnt.opt_state, graph=graph, optimizer=learnt.optimizer, loss=job.loss,
        figures=job.figures, shape=shape,
    )  # fmt: skip
    sums: PyTree = jax.eval_shape(programs.zero)
    fields = DataFields(sums.reference.update(dtype=jnp.int32), sums.reference)
    lowered = {
        "add": programs.add.lower(sums, params, frozen, sums.reference, fields, batch),
        "apply": programs.apply.lower(sums, params, learnt.opt_state, fields),
    }
    if job.beside is not None and job.beside.resident:
        narrow = jax.tree.map(lambda x: x.update(dtype=job.precision.compute), params)
        narrow = adapted.joined(params if adapts else narrow, frozen)
        lowered["reference"] = logps.compiled(mesh).lower(graph, narrow, batch)
    return {name: one.compile() for name, one in lowered.items()}


def _frozen(
    job: Job, model: zoo.Model, given: Adapting | None, chosen: Chosen | None, mesh: Mesh
) -> Params:
    """Shapes of the weights that are not trained."""
    if chosen is not None:
        rest = trained.layout_of(model, trained.others(model, chosen), job.precision.compute)
        return trained.with_room(rest, chosen)
    if given is None:
        return {}
    replicated = NamedSharding(mesh, PartitionSpec())
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
    return adapters.attached(nnx.to_pure_dict(nnx.state(model)), given.sites, put)


def _batch(job: Job, mesh: Mesh, most: int, needed: int) -> tuple[Packed, Shape]:
    """The shapes of a full micro-batch; its rows have the longest text's length, or row_length.

    At most `most` positions per device, and no more rows than `needed` positions fill.
    """
    given, answers = job.sizes, job.given["data.answers"]
    Z, parts = sharding.data_shards(mesh), mesh.shape["context"]
    T = given.row_length or given.train_seq_len
    each = given.per_device_parallelism or max(1, min(most * parts // T, -(-needed // (Z * T))))
    shape = Shape(each * Z, T, given.train_batch_size, answers, Z, Z, context=parts)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    replicated = NamedSharding(mesh, PartitionSpec())
    whole = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=rows)
    tokens, lists = whole(shape.rows, T), whole(Z * parts, shape.listed(each))
    scored = (shape.examples, shape.answers)
    scored = jax.ShapeDtypeStruct(scored, jnp.int32, sharding=replicated)
    order = whole(shape.rows, T // stripes.width(T, parts)) if parts > 1 else None
    batch = Packed(*[tokens] * 5, *[lists] * 3, counts=whole(Z * parts), scored=scored)
    return batch._replace(order=order), shape


def _flops_of_a_position(job: Job, model: zoo.Model, kept: Remat, *, adapts: bool) -> float:
    """FLOPs of the forward and backward pass with recomputation; frozen weights get no gradient.

    The reference, and losses that need all pairs first, add one more forward pass each.
    """
    weights, again = met_by_a_token(model), met_by_a_token(model, read_again=True)
    layers = model.config.sizes["L"]
    share = (kept.layers or layers) / layers if kept.policy in ("products", "none") else 0
    passes = (job.beside is not None and job.beside.resident) + job.is_coupled
    of_each = (6 if adapts else 8) + 2 * passes
    return float(of_each * weights - 2 * share * again)


def met_by_a_token(model: zoo.Model, *, read_again: bool = False) -> int:
    """The number of weights that multiply a token; of the experts, those it is routed to.

    An embedding counts if it is also the head. With `read_again`, only weights of layers whose
    products the backward pass needs: all but an MLP's output, unless expert shares weigh it.
    """
    config = model.config
    count = 0.0
    for path, param in nnx.to_flat_state(nnx.state(model)):
        axes, share = param.get_metadata("axes").split(), 1.0
        is_last = path[-1] == "down" and "E" not in axes
        if read_again and (path[0] != stack.STACKS or is_last):
            continue
        is_head = config.tie_word_embeddings
        if axes == ["V", "R"] or (path == ("embedding",) and not is_head):  # looked up
            continue
        if "E" in axes and "F" in axes:
            share = config.experts_of_a_token / param.shape[axes.index("E")]
        count += share * param.size
    return int(count)


def _largest_of_a_layer(model: zoo.Model) -> int:
    """The size in numbers of the largest weight of one layer."""
    return max(
        math.prod(x.get_value().shape[path[0] == stack.STACKS :])
        for path, x in nnx.to_flat_state(nnx.state(model))
    )

"""What a run will take, without its weights, its data or its devices.

  python recipes/forecast.py --config=recipes/configs/llama8b.py --chip=v5p --devices=8

Compiles the programs of one update for a mesh of so many chips, and prints what a device holds,
what moves between devices, and about how long an update takes. It asks the compiler for TPUs (pip
install libtpu) or for GPUs (pip install 'jax[cuda13-local]' nvidia-cuda-nvcc), which need no chip,
also about memory. Where there is none for GPUs it compiles for CPUs instead: what stays allocated
through an update is exact, the rest an estimate.
"""

from absl import flags

if __name__ == "__main__":  # a wrong flag is answered before the imports below
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # compilers would say that there is no chip
    from recipes.training import command, settings

    flags.DEFINE_string("chip", "h100", "One of a100, h100, h200, rtx4080, rtx4090, v5e, v5p, v6e.")
    flags.DEFINE_integer("devices", 8, "How many chips, of all slices.")
    flags.DEFINE_integer("slices", 1, "In how many slices of a TPU pod they are.")
    flags.DEFINE_integer("stored_per_pair", 1000, "Average positions per pair.")
    flags.DEFINE_float("real_per_stored", 1.25, "Real tokens per position: prompts count twice.")
    command.answer(settings.DPO, writes=False)

import math
import os
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import ml_collections
import numpy as np

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from recipes.data.packed.batches import Said
from recipes.data.packed.packing import Packed, Shape
from recipes.preference import metrics, objectives, reference
from recipes.preference.objectives import Objective
from recipes.training import (
    absent,
    activations,
    adapting,
    by_name,
    checks,
    collectives,
    command,
    logps,
    optimizer,
    plan,
    settings,
    trained,
    update,
    written,
)
from recipes.training.absent import Gpu
from recipes.training.adapting import Adapting
from recipes.training.by_name import Values
from recipes.training.nearest import did_you_mean
from recipes.training.optimizer import AdamW
from recipes.training.run import Beside
from recipes.training.update import Params
from recipes.training.written import Precision
import zoo
from zoo import adapters
from zoo.parts import adapted, sharding, stack


class Chip(NamedTuple):
    """The manufacturer's figures for one chip."""

    bf16_flops: float  # per second, dense
    memory: float  # bytes
    memory_bytes: float  # per second
    link_bytes: float  # per second, to the other chips, in one direction
    tpu: str | None = None  # its name for the TPU compiler
    gpu: Gpu | None = None


ADA = "NVIDIA GeForce RTX 4090"
CHIPS = {
    "a100": Chip(312e12, 80e9, 2.0e12, 300e9, gpu=Gpu("NVIDIA A100", (8, 0), 108)),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, gpu=Gpu("NVIDIA H100", (9, 0), 132)),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, gpu=Gpu("NVIDIA H200", (9, 0), 132)),
    "rtx4080": Chip(97e12, 16e9, 0.72e12, 32e9, gpu=Gpu(ADA, (8, 9), 76)),
    "rtx4090": Chip(165e12, 24e9, 1.01e12, 32e9, gpu=Gpu(ADA, (8, 9), 128)),
    "v5e": Chip(197e12, 16e9, 0.82e12, 100e9, "v5e"),
    "v5p": Chip(459e12, 95e9, 2.77e12, 300e9, "v5p"),
    "v6e": Chip(918e12, 32e9, 1.64e12, 224e9, "v6e"),
}
# Bytes per second and chip from one slice of TPUs to another: hosts of 4 chips at 200 Gbit/s.
BETWEEN_SLICES = 6.25e9
# Share of the peak that a good kernel reaches on products of this size.
REACHED = 0.6


class Sizes(NamedTuple):
    """Settings that decide the shapes of a micro-batch, by their names."""

    train_batch_size: int
    train_seq_len: int
    row_length: int | None
    per_device_parallelism: int | None


class Job(NamedTuple):
    """What is to be compiled."""

    precision: Precision
    attention: str | None
    remat: str | None  # None: what fits
    mesh: tuple[int, int, int, int]  # data, fsdp, tensor, context
    beside: Beside | None  # the reference
    given: Values  # what is trained
    adamw: AdamW
    objective: Objective
    sizes: Sizes


class Forecast(NamedTuple):
    """Bytes are per device."""

    persistent: dict[str, int]
    temporary: dict[str, int]  # by program
    kept: activations.Remat
    remat: str  # the same in words
    peak: int
    moved: list[collectives.Collective]  # of the program that adds a micro-batch, within a slice
    between: list[tuple[str, collectives.Collective]]  # the program, and what it sends to another
    largest_weight: int  # bytes of one layer's largest, in the compute dtype
    micro_batches: float  # per update
    flops: float  # per update, all devices
    seconds: tuple[float, float]  # per update: compute and traffic overlapped, or not


def forecast(
    job: Job,
    hf_config: dict[str, object],
    chip: Chip,
    devices: list,
    stored_per_pair: int,
) -> Forecast:
    """Compiles one update for `devices`; `stored_per_pair` is a guess at the data."""
    mesh, compute = sharding.mesh_of(*job.mesh, devices=devices), job.precision.compute
    pairs = job.sizes.train_batch_size
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = adapting.blank(job.given, hf_config, job.precision, mesh)
        model.attention = job.attention
        if devices[0].platform == "cpu":
            model.attention = "blocks"  # compiled for CPUs, which have no kernels
        plan.refuse_cut_rows(job.given, model, mesh.shape["context"])
        layout = nnx.state(model)
        asked = adapting.of_settings(job.given, model)
        chosen = trained.chosen(job.given, model)
        learnt = trained.of(model, asked, chosen)
        params = learnt.like
        if chosen is None:
            _, frozen = _parts(nnx.to_pure_dict(layout), asked, mesh)
        else:
            rest = trained.layout_of(model, trained.others(model, chosen), compute)
            frozen = trained.with_room(rest, chosen)
        schedule = optimizer.schedule_of(job.adamw, 1000)
        adamw = optimizer.optimizer_of(job.adamw, schedule, *learnt[1:])
        if job.beside and job.beside.follows:
            adamw = optimizer.followed(adamw, *job.beside.follows)
        opt_state = optimizer.layout(adamw, params, mesh)
        resident = job.beside is not None and job.beside.resident
        held = plan.memory(
            model,
            params,
            opt_state,
            chosen,
            resident=job.beside is not None and job.beside.stays,
            shared=job.beside is not None and job.beside.of_policy,
        )
        stays = sum(held.values())
        most = activations.most_positions(model, params, stays, chip.memory, "accelerator")
        answers = job.given["data.answers"]
        batch, shape = _batch(job.sizes, mesh, most, pairs * stored_per_pair, answers)
        kept = activations.keeping(model, job.remat, params, shape, stays, chip.memory)
        graph, _ = nnx.split(model)
        programs = update.compiled(
            params,
            opt_state,
            graph=graph,
            adamw=adamw,
            loss=job.objective.loss,
            figures=lambda answers: metrics.preference(answers, job.objective),
            shape=shape,
        )
        sums: Any = jax.eval_shape(programs.zero)
        of_answers = sums.reference
        said = Said(of_answers.update(dtype=jnp.int32), of_answers)
        narrow = jax.tree.map(lambda x: x.update(dtype=compute), params)
        narrow = adapted.joined(params if asked else narrow, frozen)
        add = programs.add.lower(sums, params, frozen, sums.reference, said, batch).compile()
        apply = programs.apply.lower(sums, params, opt_state, said).compile()
        forward = logps.compiled(mesh).lower(graph, narrow, batch).compile()

    temporary = {}
    programs_of_a_step = [("add", add), ("apply", apply)]
    if resident:
        programs_of_a_step.append(("reference", forward))
    for name, program in programs_of_a_step:
        analysis: Any = program.memory_analysis()
        temporary[name] = analysis.temp_size_in_bytes
    layers = model.config.sizes["L"]
    every = [
        (name, one)
        for name, program in programs_of_a_step
        for one in collectives.of(program.as_text() or "", loops=layers)
    ]
    moved = [one for name, one in every if name == "add" and one.kind != collectives.BETWEEN]
    between = [(name, one) for name, one in every if one.kind == collectives.BETWEEN]
    positions = batch.tokens.size
    count = pairs * stored_per_pair / positions
    weights, again = met_by_a_token(model), met_by_a_token(model, read_again=True)
    # Forward, both gradients, and what is computed again; of a frozen weight its own is not made.
    share = (kept.layers or layers) / layers if kept.policy in ("products", "none") else 0
    per_position = (8 - (2 if asked else 0)) * weights - 2 * share * again
    # One more forward pass each: of the reference, and of losses that see all pairs before one.
    for asked_more in (resident, job.objective.is_coupled):
        per_position += 2 * weights * asked_more
    flops = per_position * positions * count
    per_layer = [
        math.prod(x.get_value().shape[path[0] == stack.STACKS :])
        for path, x in nnx.to_flat_state(layout)
    ]
    busy = flops / len(devices) / (REACHED * chip.bf16_flops)
    on_wire = sum(c.bytes * c.times for c in moved) * count / chip.link_bytes
    for name, one in between:
        on_wire += one.bytes * one.times * (1 if name == "apply" else count) / BETWEEN_SLICES
    return Forecast(
        persistent=held,
        temporary=temporary,
        kept=kept,
        remat=plan.remat_told(kept, model),
        peak=stays + max(temporary.values()),
        moved=moved,
        between=between,
        largest_weight=max(per_layer) * np.dtype(compute).itemsize,
        micro_batches=count,
        flops=flops,
        seconds=(max(busy, on_wire), busy + on_wire),
    )


def job_of(given: Values) -> Job:
    """The job that the settings describe."""
    objective = objectives.objective(given)
    return Job(
        precision=written.precision(given["mp"]),
        attention=given["attention"],
        remat=given["remat"],
        mesh=by_name.mesh_sizes(given),
        beside=reference.wanted(given, objective),
        given=given,
        adamw=by_name.part(AdamW, given),
        objective=objective,
        sizes=by_name.part(Sizes, given),
    )


def met_by_a_token(model: zoo.Model, *, read_again: bool = False) -> int:
    """Weights that multiply a token: of the experts, those it is routed to.

    An embedding counts where it is the head, too. Or those of layers alone whose products the
    backward pass must `read_again`: all but what an MLP gives out, unless it is weighed by shares.
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


def _batch(
    given: Sizes, mesh: jax.sharding.Mesh, most: int, needed: int, answers: int
) -> tuple[Packed, Shape]:
    """The shapes of a full micro-batch; rows are as long as a text may be, or as row_length.

    At most `most` positions per device, and no more rows than `needed` positions fill.
    """
    Z, parts = sharding.data_shards(mesh), mesh.shape["context"]
    T = given.row_length or given.train_seq_len
    each = given.per_device_parallelism or max(1, min(most * parts // T, -(-needed // (Z * T))))
    shape = Shape(each * Z, T, given.train_batch_size, answers, Z, Z, context=parts)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=rows)
    tokens, lists = whole(shape.rows, T), whole(Z * parts, shape.listed(each))
    scored = (shape.examples, shape.answers)
    scored = jax.ShapeDtypeStruct(scored, jnp.int32, sharding=everywhere)
    return Packed(*[tokens] * 5, *[lists] * 3, counts=whole(Z * parts), scored=scored), shape


def _parts(params: Params, asked: Adapting | None, mesh: jax.sharding.Mesh) -> tuple:
    """Shapes of what is trained, and of what is not."""
    if asked is None:
        return params, {}
    everywhere = NamedSharding(mesh, PartitionSpec())
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    return asked.like, adapters.attached(params, asked.sites, put)


def told(
    found: Forecast, chip: Chip, real_tokens: float, less_memory: list[str], *, exact: bool
) -> str:
    """The forecast as text; `less_memory` are flags that help where it does not fit."""
    size = plan.size
    parts = lambda bytes_: ", ".join(f"{name} {size(n)}" for name, n in bytes_.items())
    kinds: dict[str, list] = {}
    for one in found.moved:
        kinds.setdefault(one.kind, []).append(one)
    lines = [
        f"persistent                {size(sum(found.persistent.values()))} per device "
        f"({parts(found.persistent)})",
        f"temporary                 {parts(found.temporary)}"
        + ("" if exact else "   (an estimate, compiled for CPUs: see --help)"),
        f"remat                     {found.remat}",
        f"peak                      {size(found.peak)} of {size(chip.memory)}",
        f"largest weight            {size(found.largest_weight)} in the compute dtype",
    ]
    for kind, some in sorted(kinds.items()):
        total = sum(c.bytes * c.times for c in some)
        lines.append(
            f"{kind:<25} {sum(c.times for c in some)} a micro-batch, {size(total)}; the largest "
            f"{size(max(c.bytes for c in some))}"
        )
    lines += _between(found)
    low, high = found.seconds
    lines += [
        f"per update                {found.micro_batches:.1f} micro-batches, "
        f"{found.flops / 1e15:.4g} PFLOP, {real_tokens:.4g} real tokens",
        f"about                     {low:.3g} to {high:.3g} s: products at {REACHED:.0%} of the "
        "chips' peak, with traffic overlapped or not",
    ]
    if found.peak > 0.95 * chip.memory:
        ways = ["more devices in --config.mesh.fsdp", *less_memory]
        lines.append(
            f"it does not fit: {', '.join(ways)}, shorter rows with --config.row_length, or rows "
            "that devices share with --config.mesh.context"
        )
    return "\n".join(lines)


def _between(found: Forecast) -> list[str]:
    """What a chip sends to another slice."""
    if not found.between:
        return []
    of = lambda once: [one for name, one in found.between if (name == "apply") == once]
    total = lambda some: plan.size(sum(one.bytes * one.times for one in some))
    in_loops = sum(one.in_loop for _, one in found.between)
    return [
        f"between slices            {total(of(True))} an update, and {total(of(False))} a "
        f"micro-batch, of each device; {in_loops or 'none'} of its {len(found.between)} exchanges "
        "in a loop over layers"
    ]


def main(config: ml_collections.ConfigDict) -> None:
    """Prints the forecast.

    Raises:
      ValueError, OSError: a sentence about the settings, the flags or the model.
    """
    asked = flags.FLAGS
    given = checks.checked(config, settings.table_of(settings.DPO))
    if asked.chip not in CHIPS:
        near = did_you_mean(asked.chip, CHIPS)
        raise BadInput(f"--chip={asked.chip} is none of {', '.join(CHIPS)}{near}")
    for name in ("devices", "slices", "stored_per_pair", "real_per_stored"):
        number = getattr(asked, name)
        if not 0 < number < math.inf:
            raise BadInput(f"--{name} must be above 0, not {number}")
    chip = CHIPS[asked.chip]
    hf_config = hf_folder.look_up(given["initialize_from_hf"]).config
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_enable_compilation_cache", False)  # which takes a device to read
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", asked.devices)
    devices = jax.devices()
    if asked.slices > 1 and (not chip.tpu or asked.devices % asked.slices):
        raise BadInput(
            f"--slices={asked.slices} must divide --devices={asked.devices}, and be of TPUs: for "
            "GPUs forecast one node, whose gradients meet those of other nodes once an update"
        )
    if chip.tpu:
        devices = absent.tpus(chip.tpu, asked.devices // asked.slices, asked.slices)
    elif chip.gpu:
        known = chip.memory, chip.memory_bytes
        devices = absent.gpus(chip.gpu, *known, asked.devices) or devices
    if len(devices) != asked.devices:
        raise BadInput(
            f"--devices={asked.devices}, and XLA_FLAGS in the environment make {len(devices)}: "
            "unset it"
        )
    job = job_of(given)
    found = forecast(job, hf_config, chip, devices, asked.stored_per_pair)
    real = given["train_batch_size"] * asked.stored_per_pair * asked.real_per_stored
    less = checks.less_memory(given, has_reference=job.beside is not None)
    if found.kept.policy != "full":
        less.insert(0, "--config.remat=full")
    if given["optimizer"] in ("adamw", "lion", "rmsprop", "muon"):
        less.append("--config.optimizer=adamw8bit")
    print(told(found, chip, real, less, exact=devices[0].platform != "cpu"))


if __name__ == "__main__":
    command.main(main, settings.DPO, writes=False)

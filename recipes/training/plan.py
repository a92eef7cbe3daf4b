"""What a run will need and do, worked out before any long work."""

import math
from typing import NamedTuple

from flax import nnx
import jax
from jaxtyping import PyTree
import numpy as np

from checkpoints_io import places
from checkpoints_io.errors import BadInput, StorageError
from recipes.data import mixture, shown
from recipes.data.ids.examples import Example
from recipes.data.packed import shapes, streams
from recipes.data.packed.packing import Shape
from recipes.training import notes, optimizer, trained
from recipes.training.activations import Remat
from recipes.training.by_name import Values
from recipes.training.run import Run, adapters_alone
from recipes.training.update import Params
import zoo
from zoo import models

# Below this fill the plan suggests how to fill the rows better.
GOOD_FILL = 0.88


class Options(NamedTuple):
    """Settings that only the plan reads."""

    num_epochs: float | None
    max_eval_pairs: int | None
    min_pack_fill: float


def describe(run: Run, options: Options, each: dict[str, int], kept: Remat) -> str:
    """The plan as text; `each` is a device's `memory`, and `kept` what layers keep in the rest.

    Raises:
      ValueError: most of the computation would be spent on padding.
      OSError: the disk does not hold what will be written.
    """
    shape, pairs, devices = run.place.shape, run.examples, run.computing.mesh.devices
    device = devices.flat[0]
    share, count = shapes.fill(pairs, shape)
    if share < options.min_pack_fill:
        raise BadInput(
            f"only {share:.0%} of the rows would be filled: choose a smaller --config.row_length "
            "or --config.per_device_parallelism, assign devices to --config.mesh.tensor, or "
            f"lower --config.min_pack_fill (now {options.min_pack_fill})"
        )
    saved = checkpoint_bytes(run)
    free = refuse_small_disk(run.directory, disk_needed(run))
    apart = sum(not streams.fits_once(pair, shape) for pair in pairs)
    axes = ", ".join(f"{name} {size}" for name, size in run.computing.mesh.shape.items())
    held = ", ".join(f"{len(h.examples)} in {h.name}" for h in run.held_out) or "none"
    parts = ", ".join(f"{name} {size(number)}" for name, number in each.items())
    epochs = run.total_steps * shape.examples / len(pairs)
    what, more = shown.noun(pairs), "two" if shape.answers == 2 else "more"
    hint = ""
    if share < GOOD_FILL and (filled := _parts_that_fill(pairs, shape)):
        times = shape.shards // filled
        hint = f"; {GOOD_FILL:.0%} with {times} x --config.mesh.tensor, or more {what} per update"
    lines = [
        f"devices      {devices.size} {device.device_kind} ({device.platform}); {axes}",
        f"{what:<12} {len(pairs)} for training; held out: {held}",
        *_mixed(run),
        f"updates      {run.total_steps} of {shape.examples} {what} = {epochs:.2f} epochs; "
        f"about {count:.1f} micro-batches per update",
        f"rows         {shape.rows} of {shape.row_length} positions per micro-batch, "
        f"{share:.0%} filled{hint}" + (f"; {apart} {what} need {more} rows" if apart else ""),
        f"rate         {_schedule(run.optimizer_settings, run.total_steps)}",
        *_averaged(run.optimizer_settings),
        f"memory       {size(sum(each.values()))} per device ({parts}), plus activations",
        f"remat        {remat_told(kept, run.blank)}",
        f"disk         {size(saved)} per checkpoint, {checkpoints_kept(run)} kept; "
        f"{size(free)} free in {run.directory}",
        *(
            f"note         {told}"
            for told in notes.of(run, options.num_epochs, options.max_eval_pairs)
        ),
        f"first of the {what}, with scored tokens in ⟦ ⟧:",
        *(f"  {line}" for line in shown.lines_of(pairs[0], run.tokenizer)),
    ]
    return "\n".join(lines)


def remat_told(kept: Remat, model: zoo.Model) -> str:
    """What layers keep for the backward pass, and what is recomputed, in words."""
    if kept.policy == "full":
        return "full: layers are recomputed in the backward pass"
    count = model.config.sizes["L"]
    what = {"attention": "attention", "products": "products", "none": "everything"}[kept.policy]
    many = "all" if kept.layers is None else f"{kept.layers} of {count}"
    room = f" (about {size(kept.kept)} per device)" if kept.kept else ""
    more = "" if kept.layers is None else "; attention kept for the others"
    return f"{what} of {many} layers kept for the backward pass{room}{more}"


def _schedule(given: optimizer.OptimizerSettings, total: int) -> str:
    """The learning rate over the run."""
    warmup, decay = optimizer.phases(given, total)
    parts = [f"0 to {given.learning_rate:g} over {warmup} steps"] if warmup else []
    if given.lr_schedule == "constant" or total > warmup + decay:
        parts.append(f"{given.learning_rate:g}")
    if given.lr_schedule != "constant" and decay:
        share = given.min_lr_ratio
        if given.lr_schedule == "inverse_sqrt":
            share = float(optimizer.inverse_sqrt(decay, warmup, share))
        low = given.learning_rate * share
        parts.append(f"{given.lr_schedule} from {given.learning_rate:g} to {low:g} over {decay}")
    return ", then ".join(parts)


def _averaged(given: optimizer.OptimizerSettings) -> list[str]:
    if given.ema_decay is None:
        return []
    return [
        f"average      of the weights over about {1 / (1 - given.ema_decay):.4g} updates is "
        "evaluated and exported"
    ]


def _mixed(run: Run) -> list[str]:
    """How often the examples of each source are used, where there are several sources."""
    if len(run.parts) == 1:
        return []
    drawn = run.total_steps * run.place.shape.examples
    what = shown.noun(run.examples)
    return [
        f"  {part.name:<10} {len(part.examples)} {what}, {share:.1%} of all examples drawn: "
        f"{drawn * share / len(part.examples):.2f} epochs of it"
        for part, share in zip(run.parts, mixture.shares(run.parts), strict=True)
    ]


def _parts_that_fill(pairs: list[Example], shape: Shape) -> int | None:
    """The most devices that an update can be split over while its rows stay filled."""
    for parts in range(shape.shards - 1, 0, -1):
        if shape.shards % parts:
            continue
        most = shape.rows * shape.row_length // parts // shape.context
        fewer = shapes.choose(
            pairs, per_update=shape.examples, shards=parts, most=most, alike=shape.alike,
            context=shape.context,
        )  # fmt: skip
        if shapes.fill(pairs, fewer).share >= GOOD_FILL:
            return parts
    return None


def refuse_cut_rows(given: Values, model: zoo.Model, context: int) -> None:
    """Refuses rows that cannot be split over `context` devices.

    Raises:
      ValueError: their length is not divisible, or some layer is recurrent.
    """
    if context == 1:
        return
    if recurrent := models.recurrent(model):
        raise BadInput(
            f"--config.mesh.context={context}: {model.config.model_type} has recurrent layers "
            f"({', '.join(recurrent)}), whose rows cannot be split over devices: leave it out, "
            "and assign the devices to --config.mesh.fsdp or --config.mesh.tensor"
        )
    step = 64 * context
    if (length := given["row_length"]) and length % step:
        raise BadInput(
            f"--config.row_length={length} cannot be split over --config.mesh.context={context} "
            f"devices in multiples of 64 tokens: set a multiple of {step} (e.g. "
            f"{-(-length // step) * step}), or leave it out"
        )


def memory(
    model: zoo.Model,
    like: Params,
    opt_state: PyTree,
    chosen: trained.Chosen | None,
    *,
    resident: bool,
    shared: bool = False,
) -> dict[str, int]:
    """Bytes per device that stay allocated through an update; activations are extra.

    `like` is what is trained: all weights, those `chosen`, or adapters; the rest is frozen. A
    `resident` reference is as large as the model, in the compute dtype; if it is `shared` with the
    frozen weights, as large as what is `chosen`.
    """
    weights = nnx.to_pure_dict(nnx.state(model))
    whole = jax.tree.structure(weights) == jax.tree.structure(like)
    rest = {} if whole else weights
    if chosen is not None:
        rest = trained.layout_of(model, trained.others(model, chosen), model.dtype)
    parts = {"frozen": held(rest)} if rest else {}
    parts |= {
        "policy" if whole else "adapters" if chosen is None else "trained": held(like),
        "optimizer": held(opt_state),
        "gradient": held(like),
    }
    if (theirs := optimizer.reference_of(opt_state)) is not None:
        # The copy in the compute dtype that each step makes.
        copied = np.dtype(model.dtype).itemsize * sum(map(_here, jax.tree.leaves(theirs)))
        parts["optimizer"] -= held(theirs)
        parts["reference"] = held(theirs) + copied
    if (average := optimizer.average_of(opt_state)) is not None:
        parts["average"] = held(average)
        parts["optimizer"] -= parts["average"]
    if resident and shared and chosen is not None:
        parts["reference"] = held(trained.layout_of(model, chosen, model.dtype))
    elif resident and not shared:
        mesh = getattr(jax.tree.leaves(weights)[0].sharding, "mesh", None)
        wide = jax.tree.leaves(nnx.state(zoo.abstract(model.config, mesh=mesh)))
        parts["reference"] = np.dtype(model.dtype).itemsize * sum(map(_here, wide))
    return parts


def held(tree: PyTree) -> int:
    """Bytes per device of arrays, which may be given as shapes and shardings."""
    return sum(_here(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _here(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape))


def numbers(model: zoo.Model) -> int:
    """The number of parameters of a model; quantised weights count unpacked."""
    return sum(param.get_value().size for _, param in nnx.to_flat_state(nnx.state(model)))


def trained_weights(run: Run) -> int:
    """The number of parameters that are trained."""
    return sum(x.size for x in jax.tree.leaves(run.trained.like))


def checkpoint_bytes(run: Run) -> int:
    """Bytes of a checkpoint before compression: what is trained, and the optimizer's state."""
    kept = jax.tree.leaves((run.trained.like, run.opt_state))
    return sum(x.size * x.dtype.itemsize for x in kept)


def checkpoints_kept(run: Run) -> int:
    """The largest number of checkpoints that there can be at the end."""
    keep = run.saving.keep
    of_old = run.total_steps // keep.every if keep.every else 0
    return keep.newest + of_old + (keep.highest is not None)


def disk_needed(run: Run) -> int:
    """Bytes still to be written: what is already in the directory is not counted again."""
    every = run.every.steps_per_hf_export
    exports = 0 if every == -1 else 1 if every is None else -(-run.total_steps // every)
    width = np.dtype(run.saving.export_dtype).itemsize
    one = width * numbers(run.blank)
    if adapters_alone(run):
        one = 4 * trained_weights(run)
    exported = exports * one
    saved = (checkpoints_kept(run) + 1) * checkpoint_bytes(run)
    return max(saved + exported - run.directory.taken(), 0)


def refuse_small_disk(directory: places.Place, needed: int) -> int | float:
    """The bytes that are free where the run is kept.

    Raises:
      OSError: they are too few for what will be written.
    """
    free = directory.room()
    if free < needed:
        raise StorageError(
            f"{directory} has {size(free)} free but the run writes about {size(needed)}: choose "
            "another --config.directory, a smaller --config.keep_checkpoints, or fewer exports "
            "with --config.steps_per_hf_export"
        )
    return free


def size(count: int | float) -> str:
    """A number of bytes in words: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"

"""What a run is going to take and do, worked out before any long work."""

from collections.abc import Iterator
from typing import Any

from flax import nnx
import jax
import ml_collections
import numpy as np

from checkpoints_io import places, processes
from checkpoints_io.errors import BadInput, StorageError
from recipes import optimizer, settings
from recipes.data import packing, report, shapes
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds
import zoo

# Positions of a micro-batch, per device, from which on a device is busy.
ENOUGH = {"cpu": 2**12}
# Below this fill a run says what would fill its rows.
GOOD_FILL = 0.88


def told(config: ml_collections.ConfigDict, run: Any, model: zoo.Model) -> str:
    """The plan as a person reads it; `run` is `prepare.Run`.

    Raises:
      ValueError: most of the computation would be spent on padding.
      OSError: the disk does not hold what will be written.
    """
    shape, pairs, device = run.place.shape, run.pairs, run.mesh.devices.flat[0]
    share, count = shapes.fill(pairs, shape)
    if share < config.min_pack_fill:
        raise BadInput(
            f"only {share:.0%} of the rows would be filled: choose a smaller --config.row_length "
            "or --config.per_device_parallelism, give devices to --config.mesh.tensor, or accept "
            f"it with --config.min_pack_fill (now {config.min_pack_fill})"
        )
    bytes_each = memory(model, config)
    saved = checkpoint_bytes(model)
    free = refuse_small_disk(run.directory, disk_needed(config, run, model))
    apart = sum(not packing.fits_once(pair, shape) for pair in pairs)
    axes = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    held = ", ".join(f"{len(h.pairs)} in {h.name}" for h in run.held_out) or "none"
    parts = ", ".join(f"{name} {size(number)}" for name, number in bytes_each.items())
    epochs = run.total_steps * shape.pairs / len(pairs)
    hint = ""
    if share < GOOD_FILL and (filled := _parts_that_fill(pairs, shape)):
        more = shape.shards // filled
        hint = f"; {GOOD_FILL:.0%} with {more} times --config.mesh.tensor, or more pairs an update"
    lines = [
        f"devices      {run.mesh.devices.size} {device.device_kind} ({device.platform}); {axes}",
        f"pairs        {len(pairs)} to train on; held out: {held}",
        *_mixed(run),
        f"updates      {run.total_steps} of {shape.pairs} pairs = {epochs:.2f} epochs; "
        f"about {count:.1f} micro-batches each",
        f"rows         {shape.rows} of {shape.row_length} positions a micro-batch, "
        f"{share:.0%} filled{hint}" + (f"; {apart} pairs need two of them" if apart else ""),
        f"rate         {_schedule(config, run.total_steps)}",
        f"memory       {size(sum(bytes_each.values()))} per device ({parts}), and activations",
        f"disk         {size(saved)} per checkpoint, {checkpoints_kept(config, run)} kept; "
        f"{size(free)} free in {run.directory}",
        *(f"note         {sentence}" for sentence in notes(config, run)),
        "first pair, scored tokens in ⟦ ⟧:",
        *(f"  {line}" for line in report.lines_of(pairs[0], run.tokenizer)),
    ]
    return "\n".join(lines)


def _schedule(config: ml_collections.ConfigDict, total: int) -> str:
    """The learning rate over the run."""
    warmup, decay = optimizer.phases(config, total)
    parts = [f"0 to {config.learning_rate:g} over {warmup} steps"] if warmup else []
    if config.lr_schedule == "constant" or total > warmup + decay:
        parts.append(f"{config.learning_rate:g}")
    if config.lr_schedule != "constant" and decay:
        low = config.learning_rate * config.min_lr_ratio
        parts.append(f"{config.lr_schedule} from {config.learning_rate:g} to {low:g} over {decay}")
    return ", then ".join(parts)


def notes(config: ml_collections.ConfigDict, run: Any) -> list[str]:
    """What the settings ask for and this run cannot give, or what they make of it."""
    return [
        *_notes_on_rate(config, run),
        *_notes_on_pairs(config, run),
        *_notes_on_due(config, run),
    ]


def _notes_on_rate(config: ml_collections.ConfigDict, run: Any) -> Iterator[str]:
    total, peak = run.total_steps, config.learning_rate
    warmup, decay = optimizer.phases(config, total)
    schedule = optimizer.schedule_of(config, total)
    highest = float(jax.device_get(schedule(min(warmup, total - 1))))
    if highest < 0.999 * peak:
        yield (
            f"the learning rate never reaches --config.learning_rate={peak:g}, only {highest:.3g}: "
            f"--config.warmup={config.warmup:g} is {warmup} steps, and the run has {total}"
        )
    # AdamW changes a weight by about the rate; half the spacing of float32 numbers is 2**-25.
    if highest * 2**25 < 0.03:
        yield (
            f"at a learning rate of {highest:.3g} weights larger than {highest * 2**25:.2g} do not "
            "change: in float32 they are rounded back"
        )
    for name, steps in (("warmup", warmup), ("cooldown", decay)):
        if config[name] and not steps:
            yield f"--config.{name}={config[name]:g} of {total} steps rounds to none"


def _notes_on_pairs(config: ml_collections.ConfigDict, run: Any) -> Iterator[str]:
    update, total = run.place.shape.pairs, run.total_steps
    weights = sum(part.weight for part in run.parts)
    for part in run.parts:
        whose = "" if len(run.parts) == 1 else f" of {part.name}"
        drawn = update * part.weight / weights
        if drawn > len(part.pairs):
            yield (
                f"an update of --config.train_batch_size={update} takes about {drawn:.4g} pairs"
                f"{whose} and there are {len(part.pairs)}: each is in it "
                f"{drawn / len(part.pairs):.3g} times"
            )
        if drawn * total < 1:
            yield f"hardly a pair{whose} is drawn in {total} steps: raise its weight"
    if config.num_epochs:
        asked = config.num_epochs * len(run.pairs) / update
        if abs(total - asked) > 0.05 * asked:
            yield (
                f"--config.num_epochs={config.num_epochs:g} would be {asked:.3g} updates of "
                f"{update} pairs, and is rounded to {total}"
            )
    most = config.max_eval_pairs
    if most and run.held_out and all(len(held.pairs) < most for held in run.held_out):
        yield f"--config.max_eval_pairs={most} is more than any held-out set has: all are used"


def _notes_on_due(config: ml_collections.ConfigDict, run: Any) -> Iterator[str]:
    names = ["steps_per_log", "steps_per_checkpoint", "steps_per_hf_export"]
    names += ["steps_per_eval"] if run.held_out else []
    if late := [name for name in names if (config[name] or 0) > run.total_steps]:
        told = ", ".join(f"--config.{name}={config[name]}" for name in late)
        yield f"the run ends at step {run.total_steps}, and {told} come due there alone"
    if config.keep_every and config.keep_every > run.total_steps:
        yield (
            f"--config.keep_every={config.keep_every} keeps no checkpoint: the run ends at step "
            f"{run.total_steps}"
        )


def _mixed(run: Any) -> list[str]:
    """How often the pairs of each source are met, where there are several."""
    if len(run.parts) == 1:
        return []
    total = sum(part.weight for part in run.parts)
    drawn = run.total_steps * run.place.shape.pairs / total
    return [
        f"  {part.name:<10} {len(part.pairs)} pairs, {part.weight / total:.1%} of those drawn: "
        f"{drawn * part.weight / len(part.pairs):.2f} epochs of it"
        for part in run.parts
    ]


def _parts_that_fill(pairs: list[PairIds], shape: Shape) -> int | None:
    """Over how many devices an update may be split and still fill their rows."""
    for parts in range(shape.shards - 1, 0, -1):
        if shape.shards % parts:
            continue
        most = shape.rows * shape.row_length // parts
        fewer = shapes.choose(
            pairs, per_update=shape.pairs, shards=parts, most=most, alike=shape.alike
        )
        if shapes.fill(pairs, fewer).share >= GOOD_FILL:
            return parts
    return None


def most_positions_here(config: ml_collections.ConfigDict, model: zoo.Model) -> int:
    """`most_positions` of the devices that are here; every process is told the same."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    most = most_positions(config, model, limit, device.platform)
    return int(processes.of_first(np.array(most, np.int32)))


def most_positions(
    config: ml_collections.ConfigDict, model: zoo.Model, memory_bytes: float | None, platform: str
) -> int:
    """Positions a device may compute at a time: what its memory leaves room for, or enough.

    More than enough is no faster: the products are large, and the padding grows.
    """
    enough = ENOUGH.get(platform, 2**14)
    if memory_bytes is None:
        return enough
    left = 0.9 * memory_bytes - sum(memory(model, config).values())
    compute = settings.precision(config.mp).compute
    fits = max(int(left / position_bytes(model, compute)), 1)
    return min(enough, max(512, 2 ** (fits.bit_length() - 1)))


def position_bytes(model: zoo.Model, compute: jax.typing.DTypeLike) -> int:
    """Activations of one position going back, about: what layers keep, and one layer's work."""
    sizes = model.config.sizes
    kept = sizes["L"] * sizes["D"]
    met = getattr(model.config, "num_experts_per_tok", 1)  # MLPs that a token goes through
    work = 8 * sizes["D"] * met + 4 * sizes["F"] * met
    work += 4 * (sizes["N"] + 2 * sizes["K"]) * sizes["H"]
    return np.dtype(compute).itemsize * kept + 4 * work


def memory(model: zoo.Model, config: ml_collections.ConfigDict) -> dict[str, int]:
    """Bytes per device of what lives through an update; activations come on top."""
    params = jax.tree.leaves(nnx.state(model))
    held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in params)
    narrow = np.dtype(settings.precision(config.mp).compute).itemsize
    mu = np.dtype(settings.DTYPES[config.adam_mu_dtype]).itemsize
    parts = {
        "policy": 4 * held,
        "optimizer": (4 + mu) * held,
        "gradient": 4 * held,
    }
    if config.reference_mode == "resident":
        parts["reference"] = narrow * held
    return parts


def checkpoint_bytes(model: zoo.Model) -> int:
    """Policy and optimizer, before compression."""
    return 12 * sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def checkpoints_kept(config: ml_collections.ConfigDict, run: Any) -> int:
    """How many there are at the end, at most."""
    of_old = run.total_steps // config.keep_every if config.keep_every else 0
    return config.keep_checkpoints + of_old + (config.keep_best is not None)


def disk_needed(config: ml_collections.ConfigDict, run: Any, model: zoo.Model) -> int:
    """Bytes still to be written: what stands in the directory already is not counted again."""
    every = config.steps_per_hf_export
    exports = 0 if every == -1 else 1 if every is None else -(-run.total_steps // every)
    width = np.dtype(settings.DTYPES[config.hf_save_dtype]).itemsize
    exported = exports * width * sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    saved = (checkpoints_kept(config, run) + 1) * checkpoint_bytes(model)
    return max(saved + exported - run.directory.taken(), 0)


def refuse_small_disk(directory: places.Place, needed: int) -> int | float:
    """The bytes free where the run is kept.

    Raises:
      OSError: they do not hold what will be written.
    """
    free = directory.room()
    if free < needed:
        raise StorageError(
            f"{directory} has {size(free)} free and the run writes about {size(needed)}: choose "
            "another --config.directory, a smaller --config.keep_checkpoints, or fewer exports "
            "with --config.steps_per_hf_export"
        )
    return free


def size(count: int | float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"

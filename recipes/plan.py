"""What a run is going to take and do, worked out before any long work."""

from collections.abc import Sequence
import itertools
import pathlib
import shutil
from typing import Any

from flax import nnx
import jax
import ml_collections
import numpy as np

from recipes import settings
from recipes.data import chat, packing
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds
import zoo


def told(config: ml_collections.ConfigDict, run: Any, model: zoo.Model) -> str:
    """The plan as a person reads it; `run` is `prepare.Run`.

    Raises:
      ValueError: most of the computation would be spent on padding.
      OSError: the disk does not hold what will be written.
    """
    shape, pairs, device = run.shape, run.pairs, run.mesh.devices.flat[0]
    share, count = fill(pairs, shape)
    if share < config.min_pack_fill:
        raise ValueError(
            f"only {share:.0%} of the rows would be filled: choose a smaller --config.row_length "
            "or --config.per_device_parallelism, give devices to --config.mesh.tensor, or accept "
            f"it with --config.min_pack_fill (now {config.min_pack_fill})"
        )
    bytes_each = memory(model, settings.precision(config.mp).compute)
    saved = checkpoint_bytes(model)
    free = refuse_small_disk(run.directory, disk_needed(config, run, model))
    apart = sum(not packing.fits_once(pair, shape) for pair in pairs)
    axes = ", ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    held = ", ".join(f"{len(h.pairs)} in {h.name}" for h in run.held_out) or "none"
    parts = ", ".join(f"{name} {size(number)}" for name, number in bytes_each.items())
    epochs = run.total_steps * shape.pairs / len(pairs)
    lines = [
        f"devices      {run.mesh.devices.size} {device.device_kind} ({device.platform}); {axes}",
        f"pairs        {len(pairs)} to train on; held out: {held}",
        f"updates      {run.total_steps} of {shape.pairs} pairs = {epochs:.2f} epochs; "
        f"about {count:.1f} micro-batches each",
        f"rows         {shape.rows} of {shape.row_length} positions a micro-batch, "
        f"{share:.0%} filled" + (f"; {apart} pairs need two of them" if apart else ""),
        f"memory       {size(sum(bytes_each.values()))} per device ({parts}), and activations",
        f"disk         {size(saved)} per checkpoint, {config.keep_checkpoints} kept; "
        f"{size(free)} free in {run.directory}",
        f"first pair, scored tokens in ⟦ ⟧:\n{example(pairs[0], run.tokenizer)}",
    ]
    return "\n".join(lines)


def fill(pairs: Sequence[PairIds], shape: Shape) -> tuple[float, float]:
    """Stored tokens per position, and micro-batches per update, over pairs as they stand."""
    stored = positions = count = updates = 0
    for start in range(0, min(len(pairs), 8 * shape.pairs), shape.pairs):
        some = pairs[start : start + shape.pairs]
        if len(some) < shape.pairs and updates:
            break
        rows = packing.place(some, shape)
        micro_batches = -(-len(rows) // shape.rows)
        stored += sum(len(placed.stream.tokens) for row in rows for placed in row)
        positions += micro_batches * shape.rows * shape.row_length
        count, updates = count + micro_batches, updates + 1
    return stored / positions, count / updates


def refuse_lone_rows(pairs: Sequence[PairIds], shape: Shape) -> None:
    """Refuses rows too few for a long pair: which pairs train may not depend on the devices.

    Raises:
      ValueError: a micro-batch is a single row, and there are such pairs.
    """
    apart = sum(not packing.fits_once(pair, shape) for pair in pairs)
    if shape.rows < 2 and apart:
        raise ValueError(
            f"{apart} pairs do not fit into one row of --config.row_length={shape.row_length} and "
            "need two: set --config.per_device_parallelism=2, or a longer row_length"
        )


def memory(model: zoo.Model, compute: jax.typing.DTypeLike) -> dict[str, int]:
    """Bytes per device of what lives through an update; activations come on top."""
    params = jax.tree.leaves(nnx.state(model))
    held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in params)
    return {
        "policy": 4 * held,
        "optimizer": 8 * held,
        "gradient, summed and fresh": 8 * held,
        "reference": np.dtype(compute).itemsize * held,
    }


def checkpoint_bytes(model: zoo.Model) -> int:
    """Policy and optimizer, before compression."""
    return 12 * sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def disk_needed(config: ml_collections.ConfigDict, run: Any, model: zoo.Model) -> int:
    """Bytes still to be written: what stands in the directory already is not counted again."""
    there = sum(p.stat().st_size for p in run.directory.rglob("*") if p.is_file())
    every = config.steps_per_hf_export
    exports = 0 if every == -1 else 1 if every is None else -(-run.total_steps // every)
    width = np.dtype(settings.DTYPES[config.hf_save_dtype]).itemsize
    exported = exports * width * sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    return max((config.keep_checkpoints + 1) * checkpoint_bytes(model) + exported - there, 0)


def refuse_small_disk(directory: pathlib.Path, needed: int) -> int:
    """The bytes free where the run is kept.

    Raises:
      OSError: they do not hold what will be written.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} has {size(free)} free and the run writes about {size(needed)}: choose "
            "another --config.directory, a smaller --config.keep_checkpoints, or fewer exports "
            "with --config.steps_per_hf_export"
        )
    return free


def example(pair: PairIds, tokenizer: chat.Tokenizer) -> str:
    """A pair as text, its scored stretches between ⟦ and ⟧."""

    def marked(ids: np.ndarray, scored: np.ndarray) -> str:
        text = ""
        bounds = [0, *(np.flatnonzero(np.diff(scored)) + 1), len(ids)]
        for start, stop in itertools.pairwise(bounds):
            part = str(tokenizer.decode(ids[start:stop]))
            text += f"⟦{part}⟧" if scored[start] else part
        return text

    return (
        f"  prompt    {tokenizer.decode(pair.prompt)!r}\n"
        f"  chosen    {marked(pair.chosen, pair.chosen_scored)!r}\n"
        f"  rejected  {marked(pair.rejected, pair.rejected_scored)!r}"
    )


def size(count: int | float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"

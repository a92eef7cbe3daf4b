"""What a run is going to do, said before any long work: devices, rows, memory, disk, an example."""

from collections.abc import Sequence
import itertools
import pathlib
import shutil

from flax import nnx
import jax
import ml_collections
import numpy as np

from recipes.data import chat, packing
from recipes.data.packing import Shape
from recipes.data.tokens import PairIds


def that_fit(pairs: Sequence[PairIds], shape: Shape) -> tuple[list[PairIds], int]:
    """The pairs that fit into rows of this shape, and how many do not."""
    fit = [p for p in pairs if packing.fits_once(p, shape) or packing.fits_separate(p, shape)]
    return fit, len(pairs) - len(fit)


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


def refuse_empty_rows(share: float, config: ml_collections.ConfigDict) -> None:
    """Raises a sentence if most of the computation would be spent on padding."""
    if share < config.min_pack_fill:
        raise ValueError(
            f"only {share:.0%} of the rows would be filled: choose a smaller --config.row_length "
            "or --config.per_device_parallelism, give devices to --config.mesh.tensor, or accept "
            f"it with --config.min_pack_fill (now {config.min_pack_fill})"
        )


def memory(policy: nnx.Module, compute: jax.typing.DTypeLike, shards: int) -> dict[str, int]:
    """Bytes per device of what lives through the run; activations come on top."""
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param))) // shards
    return {
        "policy": 4 * weights,
        "optimizer": 8 * weights,
        "gradient": 4 * weights,
        "reference": np.dtype(compute).itemsize * weights,
    }


def checkpoint_bytes(policy: nnx.Module) -> int:
    """Policy and optimizer, before compression."""
    return 12 * sum(x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param)))


def refuse_small_disk(directory: pathlib.Path, needed: int) -> int:
    """The bytes free where the run is kept.

    Raises:
      OSError: they do not hold what will be written.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} has {size(free)} free and the run writes about {size(needed)}: choose "
            "another --config.directory, or a smaller --config.keep_checkpoints"
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
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"

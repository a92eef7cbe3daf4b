"""The reference's log-probabilities of every pair, computed once and kept on disk.

The values depend on the reference's weights, the pair's tokens and masks, and how products are
rounded; not on learning rate, beta or loss, so that runs share them. A folder stands for one
reference and one arithmetic; its files are only ever added, each when it is whole.
"""

from collections.abc import Callable, Sequence
import hashlib
import json
from typing import NamedTuple

import jax
import jaxlib
import numpy as np
from safetensors import SafetensorError
import safetensors.numpy

from checkpoints_io import places, processes
from checkpoints_io.errors import RunFailed
from recipes import terminal
from recipes.data.ids import token_cache
from recipes.data.ids.examples import Example, ListIds, texts_as_bytes
from recipes.data.packed import streams
from recipes.data.packed.batches import Place
from recipes.data.packed.packing import Shape
from recipes.training import logps
from recipes.training.logps import Forward
from zoo.parts import token_logps

FORMAT = 1
# Updates between two files, and pairs that are computed again at every start.
UPDATES_PER_FILE, LOOKED_AT = 32, 32


class Cache(NamedTuple):
    """One reference under one arithmetic."""

    folder: places.Place
    known: dict[bytes, np.ndarray]  # a pair's key -> [A] log-probabilities, in nats


def opened(
    directory: places.Place,
    *,
    fingerprint: str,
    compute: jax.typing.DTypeLike,
    attention: str,
    ld_alpha: float | None = None,
) -> Cache:
    """The cached values of a reference. Files that cannot be read are skipped, and made again.

    Raises:
      OSError: the directory cannot be used.
    """
    arithmetic = {
        "format": FORMAT, "reference": fingerprint, "dtype": str(np.dtype(compute)),
        "attention": attention, "platform": jax.devices()[0].device_kind,
        "logits_bytes": token_logps.logits_bytes(1), "fewest_tokens": token_logps.FEWEST,
        "jaxlib": jaxlib.__version__,
    }  # fmt: skip
    if ld_alpha is not None:
        arithmetic["ld_alpha"] = ld_alpha
    name = hashlib.sha256(json.dumps(arithmetic, sort_keys=True).encode()).hexdigest()[:16]
    folder = directory.within(name)
    if processes.is_first():
        folder.make()
        token_cache.clear_rooms(directory)
        told = json.dumps(arithmetic, indent=2) + "\n"
        folder.write_whole("arithmetic.json", told.encode())
    known = {}
    for file in folder.names():
        if not file.endswith(".safetensors"):
            continue
        try:
            content = folder.read(file)
            # None: no file. Another name: some bits are no longer those that were written.
            if content is None or _name(content) != file:
                continue
            part = safetensors.numpy.load(content)
            keys, logps = part["pairs"], part["logps"]
        except (SafetensorError, KeyError, OSError):
            continue
        if keys.dtype == np.uint8 and keys.shape == (len(logps), 16) and np.isfinite(logps).all():
            known |= zip(map(bytes, keys), logps, strict=True)
    return Cache(folder, known)


def of_pairs(
    cache: Cache,
    pairs: Sequence[Example],
    forward: Forward,
    place: Place,
    *,
    reference: str,
    row: Callable[[Example], str],
) -> np.ndarray:
    """Log-probabilities [pairs, A], in nats. Missing ones are computed and kept.

    Errors name the `reference`, and a pair by its `row`.

    Raises:
      RuntimeError: one that was computed is not finite.
    """
    keys = [key(pair, place.shape) for pair in pairs]
    # Process 0 decides: others may see the files of a shared disk a moment later.
    unknown = (np.nan,) * place.shape.answers
    told = np.array([cache.known.get(key, unknown) for key in keys], np.float32)
    told = processes.of_first(told)
    cache.known.update(zip(keys, told, strict=True))
    distinct = dict(zip(keys, pairs, strict=True))
    missing = [(key, pair) for key, pair in distinct.items() if np.isnan(cache.known[key]).any()]
    step = UPDATES_PER_FILE * place.shape.examples
    starts = range(0, len(missing), step)
    for start in terminal.bar(starts, desc="reference", delay=2, leave=False):
        part_keys, part = zip(*missing[start : start + step], strict=True)
        found = logps.of_examples(forward, part, place)
        if odd := np.flatnonzero(~np.isfinite(found).all(1)).tolist():
            raise RunFailed(
                f"{row(part[odd[0]])} has a log-probability under the reference {reference} that "
                "is NaN or infinite: compute in another dtype with --config.mp"
            )
        cache.known.update(zip(part_keys, found, strict=True))
        _write(cache.folder, part_keys, found)
    return np.array([cache.known[key] for key in keys], np.float32)


def check(
    cache: Cache,
    pairs: Sequence[Example],
    forward: Forward,
    place: Place,
    compute: jax.typing.DTypeLike,
) -> float:
    """Computes some pairs again; how far the kept values are off, in nats.

    Raises:
      RuntimeError: further than rounding can explain.
    """
    some = pairs[:: -(-len(pairs) // LOOKED_AT)]
    now = logps.of_examples(forward, some, place)
    off = np.abs(now - np.array([cache.known[key(pair, place.shape)] for pair in some]))
    if not (off <= bound(now, compute)).all():
        raise RunFailed(
            f"the log-probabilities cached in {cache.folder} differ by up to {off.max():.3g} nats "
            "from those of the reference now: delete that folder to have them recomputed"
        )
    return float(off.max())


def bound(logps: np.ndarray, compute: jax.typing.DTypeLike) -> np.ndarray:
    """How far two packings of one pair may round apart, in nats."""
    share, least = (1e-5, 1e-3) if np.dtype(compute) == np.float32 else (1e-2, 0.2)
    return least + share * np.abs(logps)


def key(pair: Example, shape: Shape) -> bytes:
    """Sixteen bytes for the tokens, the masks and the layout of a pair.

    Of a list for the number of answers of the longest one too, which is how many values are kept.
    """
    kept = [shape.answers] if isinstance(pair, ListIds) else []
    content = bytes([*kept, *streams.shared(pair, shape)]) + texts_as_bytes(pair)
    return hashlib.sha256(content).digest()[:16]


def _write(folder: places.Place, keys: Sequence[bytes], values: np.ndarray) -> None:
    if not processes.is_first():
        return
    pairs = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    content = safetensors.numpy.save({"pairs": pairs, "logps": np.ascontiguousarray(values)})
    folder.write_whole(_name(content), content)


def _name(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"

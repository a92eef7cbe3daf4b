"""What the reference says of every pair, worked out once and kept on disk.

The values hang on the reference's weights, the pair's tokens and masks, and how products are
rounded; not on learning rate, beta or loss, so that runs share them. A folder stands for one
reference and one arithmetic; its files are only ever added, each when it is whole.
"""

from collections.abc import Sequence
import hashlib
import json
import pathlib
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jaxlib
import numpy as np
from safetensors import SafetensorError
import safetensors.numpy

from checkpoints_io import whole
from checkpoints_io.errors import RunFailed
from recipes import head, logps, terminal
from recipes.data import streams, tokens
from recipes.data.batches import Place
from recipes.data.packing import Shape
from recipes.data.tokens import Example
from recipes.logps import Forward

FORMAT = 1
# Updates between two files, and pairs that are worked out again at every start.
UPDATES_PER_FILE, LOOKED_AT = 32, 32


class Cache(NamedTuple):
    """One reference under one arithmetic."""

    folder: pathlib.Path
    known: dict[bytes, np.ndarray]  # a pair's key -> [A] log-probabilities, in nats


def opened(
    directory: pathlib.Path, *, fingerprint: str, compute: jax.typing.DTypeLike, attention: str
) -> Cache:
    """What is known of a reference. Files that cannot be read are passed over, and made again.

    Raises:
      OSError: the directory cannot be used.
    """
    arithmetic = {
        "format": FORMAT, "reference": fingerprint, "dtype": str(np.dtype(compute)),
        "attention": attention, "platform": jax.devices()[0].device_kind,
        "logits_bytes": head.logits_bytes(), "jaxlib": jaxlib.__version__,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(arithmetic, sort_keys=True).encode()).hexdigest()[:16]
    folder = directory / name
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for room in directory.iterdir():
            whole.clear(room)
        told = json.dumps(arithmetic, indent=2) + "\n"
        whole.write(folder / "arithmetic.json", told.encode())
    known = {}
    for path in sorted(filter(pathlib.Path.is_file, folder.glob("*.safetensors"))):
        try:
            content = path.read_bytes()
            if _name(content) != path.stem:  # some bits are no longer those that were written
                continue
            part = safetensors.numpy.load(content)
            keys, logps = part["pairs"], part["logps"]
        except (SafetensorError, KeyError, OSError):
            continue
        if keys.dtype == np.uint8 and keys.shape == (len(logps), 16) and np.isfinite(logps).all():
            known |= zip(map(bytes, keys), logps, strict=True)
    return Cache(folder, known)


def of_pairs(cache: Cache, pairs: Sequence[Example], forward: Forward, place: Place) -> np.ndarray:
    """Log-probabilities [pairs, A], in nats. What is not known yet is worked out and kept."""
    keys = [key(pair, place.shape) for pair in pairs]
    # Process 0 says what is known: others may see the files of a shared disk a moment later.
    unknown = (np.nan,) * place.shape.answers
    told = np.array([cache.known.get(key, unknown) for key in keys], np.float32)
    told = multihost_utils.broadcast_one_to_all(told)
    cache.known.update(zip(keys, told, strict=True))
    distinct = dict(zip(keys, pairs, strict=True))
    missing = [(key, pair) for key, pair in distinct.items() if np.isnan(cache.known[key]).any()]
    step = UPDATES_PER_FILE * place.shape.examples
    starts = range(0, len(missing), step)
    for start in terminal.bar(starts, desc="reference", delay=2, leave=False):
        part_keys, part = zip(*missing[start : start + step], strict=True)
        found = logps.of_examples(forward, part, place)
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
    """Works out some pairs again; how far the kept values are off, in nats.

    Raises:
      RuntimeError: further than rounding can explain.
    """
    some = pairs[:: -(-len(pairs) // LOOKED_AT)]
    now = logps.of_examples(forward, some, place)
    off = np.abs(now - np.array([cache.known[key(pair, place.shape)] for pair in some]))
    if not (off <= bound(now, compute)).all():
        raise RunFailed(
            f"the log-probabilities kept in {cache.folder} are up to {off.max():.3g} nats from "
            "what the reference says now: delete that folder, and they are worked out again"
        )
    return float(off.max())


def bound(logps: np.ndarray, compute: jax.typing.DTypeLike) -> np.ndarray:
    """How far two packings of one pair may round apart, in nats."""
    share, least = (1e-5, 1e-3) if np.dtype(compute) == np.float32 else (1e-2, 0.2)
    return least + share * np.abs(logps)


def key(pair: Example, shape: Shape) -> bytes:
    """Sixteen bytes for the tokens, the masks and the layout of a pair."""
    content = bytes([streams.fits_once(pair, shape)]) + tokens.as_bytes(pair)
    return hashlib.sha256(content).digest()[:16]


def _write(folder: pathlib.Path, keys: Sequence[bytes], values: np.ndarray) -> None:
    if jax.process_index():
        return
    pairs = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    content = safetensors.numpy.save({"pairs": pairs, "logps": np.ascontiguousarray(values)})
    whole.write(folder / f"{_name(content)}.safetensors", content)


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]

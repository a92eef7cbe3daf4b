"""Attention over rows of packed pairs, by each backend: milliseconds forward, and with backward.

  python benchmarks/attention.py                       small, of what runs on CPUs
  python benchmarks/attention.py --backends=triton,cudnn --heads=32 --key_heads=8 --width=128 \
      --row_length=2304 --positions=8192               on a GPU, in bfloat16

Prints a JSON line for each backend: what it takes, and how far it is, by norm, from `dense` in
float32: outputs, and gradients of queries, keys and values.
"""

import json
import pathlib
import tempfile
import time

from absl import flags
import jax
import jax.numpy as jnp
import pairs_as_ids
import work

from recipes.data.packed import batches, shapes
from recipes.training import command
from zoo.parts import attention, sharding, spans

BACKENDS = flags.DEFINE_list("backends", ["blocks", "dense"], "To compare.")
HEADS = flags.DEFINE_integer("heads", 4, "Of queries.", lower_bound=1)
KEY_HEADS = flags.DEFINE_integer("key_heads", 2, "Of keys.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 64, "Of a head.", lower_bound=1)
ROW = flags.DEFINE_integer("row_length", 1024, "Positions of a row.", lower_bound=1)
POSITIONS = flags.DEFINE_integer("positions", 2048, "Of all rows, at most.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", None, "How far back a token sees; unset: all of its text.")
TIMES = flags.DEFINE_integer("times", 5, "After one that does not count.", lower_bound=1)


def main() -> None:
    """Prints a line for each backend."""
    where = packed_rows()
    B, T = where.first.shape
    keys = iter(jax.random.split(jax.random.key(0), 4))
    draw = lambda N: jax.random.normal(next(keys), (B, T, N, WIDTH.value), jnp.bfloat16)
    given = [draw(N) for N in (HEADS.value, KEY_HEADS.value, KEY_HEADS.value, HEADS.value)]
    exact = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):
        right = both("dense")(*exact, where)
    for backend in BACKENDS.value:
        found = both(backend)(*given, where)
        told = {
            "backend": backend, "rows": [B, T],
            "forward_ms": milliseconds(forward(backend), *given[:3], where),
            "all_ms": milliseconds(both(backend), *given, where),
            "off": [float(off(*pair)) for pair in zip(found, right, strict=True)],
        }  # fmt: skip
        print(json.dumps(told), flush=True)


def packed_rows() -> spans.Spans:
    """A micro-batch of the comparison's pairs."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "pairs.jsonl"
        work.write_pairs(path, 64)
        pairs = [pairs_as_ids.as_ids(i, row) for i, row in enumerate(work.read_pairs(path))]
    shape = shapes.choose(
        pairs, per_update=64, shards=1, most=POSITIONS.value, row_length=ROW.value
    )
    everywhere = jax.NamedSharding(sharding.mesh_of(1, -1, 1), jax.P())
    updates = batches.in_order(pairs, batches.Place(shape, everywhere))
    first = next(iter(updates)).micro_batches[0]
    return spans.Spans(*map(jnp.asarray, (first.positions, first.first, first.last, first.lengths)))


def forward(backend):
    """What each token gathers."""
    how = dict(scale=WIDTH.value**-0.5, window=WINDOW.value, backend=backend)
    return jax.jit(lambda q, k, v, where: attention.attend(q, k, v, where, **how))


def both(backend):
    """That, and what a gradient of it makes of queries, keys and values."""

    def run(q, k, v, gradient, where):
        made, pull = jax.vjp(lambda *given: forward(backend)(*given, where), q, k, v)
        return made, *pull(gradient)

    return jax.jit(run)


def milliseconds(run, *given) -> float:
    """The least of some runs of ten calls."""
    jax.block_until_ready(run(*given))
    found = []
    for _ in range(TIMES.value):
        since = time.perf_counter()
        for _ in range(10):
            made = run(*given)
        jax.block_until_ready(made)
        found.append((time.perf_counter() - since) * 100)
    return round(min(found), 3)


def off(found, right):
    """By norm."""
    return jnp.linalg.norm((found - right).ravel()) / jnp.linalg.norm(right.ravel())


if __name__ == "__main__":
    command.main_without_config(main)

"""A layer of experts, forward and backward: ours against `jax.lax.ragged_dot`, in turn.

  python benchmarks/experts.py                                a small layer
  python benchmarks/experts.py --shape=30B-A3B --chip=h200    of a published model, in bfloat16

Ours are a loop over tiles, and kernels for all tiles at once, which on CPUs are interpreted. On
GPUs `ragged_dot` takes every row to every expert: `--ways` leaves it out where that is too much.

Prints milliseconds forward, with the gradient of tokens, and with that of weights too; the products
of the last as a share of the chip's peak; and how far outputs and gradients are apart.
"""

import functools
import json
import statistics
import time
from unittest import mock

from absl import flags
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import published

from recipes.training import command
from recipes.training.chips import CHIPS
from zoo.parts import experts, sharding, tiles
from zoo.parts.tiles import Route, Weights

SHAPE = flags.DEFINE_enum(
    "shape",
    "tiny-experts",
    ["tiny-experts", "30B-A3B", "gpt-oss-20b"],
    "Of benchmarks/published.py.",
)
WAYS = flags.DEFINE_multi_enum(
    "ways", ["loop", "kernels", "ragged_dot"], ["loop", "kernels", "ragged_dot"], "In this order."
)
CHIP = flags.DEFINE_enum("chip", None, list(CHIPS), "Whose peak the products are a share of.")
POSITIONS = flags.DEFINE_integer("positions", 8192, "Tokens of the layer.", lower_bound=1)
TIMES = flags.DEFINE_integer("times", 5, "After one that compiles.", lower_bound=1)


def main() -> None:
    """Prints a JSON line for each way."""
    shape = published.SHAPES[SHAPE.value]
    E = shape.get("num_experts") or shape["num_local_experts"]
    F = shape.get("moe_intermediate_size") or shape["intermediate_size"]
    k, D = shape["num_experts_per_tok"], shape["hidden_size"]
    T = POSITIONS.value
    keys = iter(jax.random.split(jax.random.key(0), 5))
    draw = lambda *sizes: jax.random.normal(next(keys), sizes, jnp.bfloat16) / sizes[-2] ** 0.5
    x = draw(1, T, D) * T**0.5  # numbers of about 1
    weights = {"gate_up": draw(E, 2, D, F), "down": draw(E, F, D)}
    route = experts.chosen(draw(1, T, E).astype(jnp.float32), experts.Choice(k, to_one=True))
    here = {(sharding.platform(), "bfloat16")}
    every = {
        "loop": functools.partial(by_tiles, set()),
        "kernels": functools.partial(by_tiles, here),
        "ragged_dot": by_ragged_dot,
    }
    programs = {}
    for name in WAYS.value:
        run = summed(functools.partial(every[name], route))
        programs[name, "forward_ms"] = jax.jit(run)
        programs[name, "of_tokens_ms"] = jax.jit(jax.value_and_grad(run))
        programs[name, "of_all_ms"] = jax.jit(jax.value_and_grad(run, (0, 1)))
    found = {key: jax.block_until_ready(program(x, weights)) for key, program in programs.items()}
    took: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in range(TIMES.value):
        for key, program in programs.items():
            since = time.perf_counter()
            jax.block_until_ready(program(x, weights))
            took[key].append(time.perf_counter() - since)
    products = 3 * 2 * T * k * 3 * D * F  # forward, and both gradients, of three matrices
    for name in WAYS.value:
        usual = {what: statistics.median(took[who, what]) for who, what in took if who == name}
        told = {"way": name} | {what: round(1e3 * x, 2) for what, x in usual.items()}
        told["tflops"] = products / usual["of_all_ms"] / 1e12
        if CHIP.value:
            told["share_of_peak"] = 1e12 * told["tflops"] / CHIPS[CHIP.value].bf16_flops
        first = found[WAYS.value[0], "of_all_ms"]
        print(json.dumps(told | {"apart": apart(first, found[name, "of_all_ms"])}), flush=True)


def summed(way):
    """A number of what a way makes, which has a gradient."""
    return lambda x, weights: (way(x, weights).astype(jnp.float32) ** 2).mean()


def by_tiles(
    by_kernels: set[tuple[str, str]], route: Route, x: Float[Array, "B T D"], weights: Weights
) -> Float[Array, "B T D"]:
    """As the zoo's models do it, by kernels on these platforms in these dtypes."""
    axes = {"gate_up": "E J D F", "down": "E F D"}
    lettered = {name: (weight, axes[name]) for name, weight in weights.items()}
    with mock.patch.object(tiles, "BY_KERNELS", by_kernels):
        return experts.mixed(x, route, lettered, experts.gated_together)


def by_ragged_dot(
    route: Route, x: Float[Array, "B T D"], weights: Weights
) -> Float[Array, "B T D"]:
    """The same sum, by products whose rows are sorted by expert."""
    k, D = route.experts.shape[-1], x.shape[-1]
    chosen = route.experts.reshape(-1)
    order = jnp.argsort(chosen)
    counts = jnp.bincount(chosen, length=weights["down"].shape[0])
    product = functools.partial(jax.lax.ragged_dot, group_sizes=counts)
    own = x.reshape(-1, D)[order // k]
    gate, up = (product(own, weights["gate_up"][:, j]) for j in range(2))
    made = product(jax.nn.silu(gate) * up, weights["down"])
    made = made * route.shares.reshape(-1, 1)[order].astype(x.dtype)
    back = jnp.argsort(order).reshape(-1, k)
    return made[back].astype(jnp.float32).sum(1).astype(x.dtype).reshape(x.shape)


def apart(one, other) -> float:
    """The largest difference of any array, by its largest number."""
    off = lambda a, b: float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-30))
    wide = lambda tree: [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return max(map(off, wide(one), wide(other)))


if __name__ == "__main__":
    command.main_without_config(main)

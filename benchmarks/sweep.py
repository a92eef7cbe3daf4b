"""How the memory and the work of an update grow with each of its sizes; one table per question.

  python benchmarks/sweep.py
  python benchmarks/sweep.py --only=rank,experts

A micro-batch of rows that are full is added to the gradient, and that again. Temporary memory is
XLA's plan for the program, less what every head needs: 8 bytes a parameter, for its gradient and
the product that is being added to it.
"""

import time
from typing import Any

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from checkpoints_io.errors import BadInput
from recipes.data.ids.examples import PairIds
from recipes.data.packed import batches
from recipes.data.packed.packing import Shape
from recipes.preference import metrics, objectives
from recipes.training import command, optimizer, update
import zoo
from zoo import adapters, targets
from zoo.parts import sharding, token_logps

BASE = dict(
    width=256, mlp=688, layers=6, vocabulary=32000, rows=4, row_length=1024, pairs=16, experts=0,
    rank=0,
)  # fmt: skip
ASKED = {
    "vocabulary": [8000, 32000, 128000, 256000],
    "pairs": [8, 16, 64, 256],
    "row_length": [512, 1024, 2048, 4096],
    "rows": [1, 2, 4, 8],
    "layers": [3, 6, 12, 24],
    "width": [128, 256, 512],
    "experts": [0, 4, 16, 64],
    "rank": [0, 8, 32, 128],
}
ONLY = flags.DEFINE_list("only", None, f"Some of {', '.join(ASKED)}; unset: all.")
# Each token goes to so many of the experts, which together are as wide as the MLP.
CHOSEN = 2


def model_of(*, width, mlp, layers, vocabulary, experts, **_) -> dict[str, Any]:
    """A config.json: of a Llama, or with experts of a Mixtral."""
    given = dict(
        model_type="mixtral" if experts else "llama", vocab_size=vocabulary, hidden_size=width,
        intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=width // 8, rms_norm_eps=1e-5, rope_theta=5e5,
        tie_word_embeddings=False,
    )  # fmt: skip
    if experts:
        given |= dict(
            intermediate_size=mlp // CHOSEN, num_local_experts=experts, num_experts_per_tok=CHOSEN
        )
    return given


def batch_of(shape: Shape, vocabulary: int) -> Any:
    """Rows that pairs of one length fill, a quarter of each its prompt."""
    draw = np.random.default_rng(0)
    each = shape.rows * shape.row_length // shape.examples
    prompt, answer = each // 4, each * 3 // 8
    ids = lambda n: draw.integers(1, vocabulary, n).astype(np.int32)
    pairs = [
        PairIds(i, ids(prompt), ids(answer), ids(answer), *[np.ones(answer, bool)] * 2)
        for i in range(shape.examples)
    ]
    (batch,) = batches.pack(pairs, shape, [0]).micro_batches
    return batch


def measured(**sizes) -> tuple[float, float]:
    """MiB that come and go in a micro-batch, without the head's own, and its CPU seconds."""
    rows, row_length, pairs = sizes["rows"], sizes["row_length"], sizes["pairs"]
    mesh = sharding.mesh_of(1, -1, 1)
    with jax.set_mesh(mesh):
        model = zoo.fresh(model_of(**sizes), mesh=mesh)
        graph, state = nnx.split(model)
        params, frozen = nnx.to_pure_dict(state), {}
        if rank := sizes["rank"]:
            sites = targets.sites(model, targets.Lora(rank, float(rank)))
            frozen = adapters.attached(params, sites)
            params = adapters.fresh(frozen, adapters.layout(model, sites), zero="B", seed=0)
        adamw, shape = optax.adamw(1e-4), Shape(rows, row_length, pairs, 2, rows)
        objective = objectives.objective({"loss": "sigmoid", "beta": 0.1})
        programs = update.compiled(
            params, optimizer.layout(adamw, params, mesh), graph=graph, optimizer=adamw,
            loss=objective.loss, figures=lambda answers: metrics.preference(answers, objective),
            shape=shape,
        )  # fmt: skip
        place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        batch = batches.put(batch_of(shape, sizes["vocabulary"]), place)
        sums = programs.zero()
        fields = batches.DataFields(jnp.zeros_like(sums.reference, jnp.int32), sums.reference)
        given = params, frozen, jnp.zeros_like(sums.reference), fields, batch
        add = programs.add.lower(sums, *given).compile()
        bytes_ = add.memory_analysis().temp_size_in_bytes
        sums = jax.block_until_ready(add(sums, *given))
        since = time.process_time()
        jax.block_until_ready(add(sums, *given))
        seconds = time.process_time() - since
    head = 0 if frozen else 8 * sizes["vocabulary"] * sizes["width"]
    return (bytes_ - head) / 2**20, seconds


def main() -> None:
    """Prints how each size matters, the others held."""
    names = ONLY.value or [*ASKED]
    if unknown := [name for name in names if name not in ASKED]:
        raise BadInput(f"--only={unknown[0]} is none of {', '.join(ASKED)}")
    print(f"Others: {BASE}; logits {token_logps.logits_bytes(1) / 2**20:.0f} MiB at a time.\n")
    for name in names:
        print(f"| {name} | temporary MiB, less the head's | CPU s |\n|---|---|---|")
        for size in ASKED[name]:
            bytes_, seconds = measured(**BASE | {name: size})
            print(f"| {size} | {bytes_:.0f} | {seconds:.1f} |", flush=True)
        print()


if __name__ == "__main__":
    command.main_without_config(main)

"""How the memory and the work of an update grow, compiled but not run; one table per question.

  python benchmarks/sweep.py

Temporary memory is XLA's plan for the program that adds a micro-batch, less what every head needs:
8 bytes a parameter, for its gradient and the product that is being added to it.
"""

from flax import nnx
import jax
import numpy as np
import optax

from recipes.data.ids.pair_ids import PairIds
from recipes.data.packed import batches
from recipes.data.packed.batches import Said
from recipes.data.packed.packing import Shape
from recipes.preference import metrics, objectives
from recipes.training import command, optimizer, update
from zoo import llama
from zoo.parts import rope, sharding, token_logps

BASE = dict(width=256, mlp=688, layers=6, vocabulary=32000, rows=4, row_length=1024, pairs=16)


def temporary(*, width, mlp, layers, vocabulary, rows, row_length, pairs) -> float:
    """MiB that come and go in a micro-batch, without the head's own."""
    config = llama.Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, rms_norm_eps=1e-5,
        tie_word_embeddings=False, rope_parameters=rope.Rope(rope_theta=5e5),
    )  # fmt: skip
    mesh = sharding.mesh_of(1, -1, 1)
    with jax.set_mesh(mesh):
        graph, layout = nnx.split(nnx.eval_shape(lambda: llama.Model(config, nnx.Rngs(0))))
        here = jax.NamedSharding(mesh, jax.P())
        placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        params = jax.tree.map(placed, nnx.to_pure_dict(layout))
        adamw = optax.adamw(1e-4)
        objective = objectives.objective({"loss": "sigmoid", "beta": 0.1})
        shape = Shape(rows, row_length, pairs, 2, rows)
        programs = update.compiled(
            params, optimizer.layout(adamw, params, mesh), graph=graph, adamw=adamw,
            loss=objective.loss, figures=lambda answers: metrics.preference(answers, objective),
            shape=shape,
        )  # fmt: skip
        ids = np.arange(8, dtype=np.int32)
        pair = PairIds(0, ids, ids, ids, *[np.ones(8, bool)] * 2)
        (batch,) = batches.pack([pair], shape, [0]).micro_batches
        sums = jax.tree.map(placed, jax.eval_shape(programs.zero))
        said = Said(sums.reference.update(dtype=np.int32), sums.reference)
        lowered = programs.add.lower(
            sums, params, {}, sums.reference, said, jax.tree.map(placed, batch)
        )
        bytes_ = lowered.compile().memory_analysis().temp_size_in_bytes
    return (bytes_ - 8 * vocabulary * width) / 2**20


def main() -> None:
    """Prints how each size matters, the others held."""
    asked = {
        "vocabulary": [32000, 128000, 256000],
        "pairs": [16, 64, 256],
        "row_length": [512, 1024, 2048, 4096],
        "rows": [1, 2, 4, 8],
        "layers": [3, 6, 12, 24],
    }
    print(f"Others: {BASE}; logits {token_logps.logits_bytes() / 2**20:.0f} MiB at a time.\n")
    for name, sizes in asked.items():
        print(f"| {name} | temporary MiB, less the head's |\n|---|---|")
        for size in sizes:
            print(f"| {size} | {temporary(**BASE | {name: size}):.0f} |")
        print()


if __name__ == "__main__":
    command.main_without_config(main)

"""Loss and gradient of some families on eight devices against one; one JSON record a family.

Started by test_devices.py with a folder and their names, in a process whose platform shows eight
devices. gpt-oss has an MLP as wide as the model: then only the axes' letters tell its biases apart.
"alternating" has layers of several kinds, and is an architecture of the tests alone. Run by
tests/in_float64.py.
"""

import json
import pathlib
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from tests.zoo import alternating, twins
import zoo
from zoo import adapters, targets
from zoo.parts import sharding, spans

FAMILIES = {
    "gpt_oss": "plain", "gemma3_text": "scaled, capped", "phi3": "plain", "gpt2": "plain",
    "qwen3_5_text": "plain", "qwen3_5_moe_text": "plain", "qwen3_next": "plain",
    "gemma4_text": "experts, one key head",
    "gemma4_text of E2B": "inputs of each layer, shared keys",
    "glm4_moe": "groups, one key head", "deepseek_v3": "groups, yarn", "mistral4": "plain",
    "llama4_text": "dense first",
    "deepseek_v2": "tied, odd, no latent of queries",  # 7 experts, on 2 devices
    "minimax_m2": "plain", "lfm2": "plain", "granitemoehybrid": "plain", "falcon_h1": "plain",
    "nemotron_h": "plain",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 96, (8, 40)).astype(np.int32)


def laid_out(model: zoo.Model, mesh: jax.sharding.Mesh, *, adapted: bool) -> tuple:
    """The graph of a model, what is trained of it and what is frozen, over the devices of a mesh.

    All of it is trained, or new adapters beside it.
    """
    layout = zoo.abstract(model.config, mesh=mesh)
    graph, state = nnx.split(model)
    like = nnx.to_pure_dict(nnx.state(layout))
    put = lambda x, to: jax.device_put(x, to.sharding)
    params = jax.tree.map(put, nnx.to_pure_dict(state), like)
    if not adapted:
        return graph, params, {}
    found = targets.sites(layout, targets.Lora(4, 8.0))
    everywhere = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
    frozen = adapters.attached(params, found, everywhere)
    return graph, adapters.fresh(frozen, adapters.layout(layout, found), zero="A", seed=0), frozen


def outcome(folder: pathlib.Path, mesh: jax.sharding.Mesh):
    with jax.set_mesh(mesh):
        model = zoo.load(folder, mesh=mesh)
        tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))

        def loss(model):
            logits = model.unembed(model.hidden(tokens, spans.causal(*tokens.shape)))
            logps = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logps, tokens[:, 1:, None], -1).mean()

        value, gradient = jax.jit(nnx.value_and_grad(loss))(model)
        return float(value), [np.asarray(x) for x in jax.tree.leaves(gradient)]


def in_float32(file: pathlib.Path) -> None:
    """What is never narrowed was written as it is, and float32 is another name of float64 here."""
    found = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({k: x.astype(np.float32) for k, x in found.items()}, file)


def main() -> None:
    zoo.ARCHITECTURES["alternating"] = alternating
    one = sharding.mesh_of(1, 1, 1, devices=jax.devices()[:1])
    many = sharding.mesh_of(1, 4, 2)
    for family in sys.argv[2:]:
        folder = pathlib.Path(sys.argv[1]) / family
        alone = family == "alternating"
        model = (
            alternating.untrained()
            if alone
            else twins.untrained(family.split()[0], FAMILIES[family])
        )
        zoo.save(model, folder, dtype=np.float32)
        in_float32(folder / "model.safetensors")
        (expected, of_one), (found, of_many) = outcome(folder, one), outcome(folder, many)
        apart = [
            np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)
            for a, b in zip(of_one, of_many, strict=True)
        ]
        record = {"family": family, "loss": abs(found - expected), "gradient": float(np.max(apart))}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

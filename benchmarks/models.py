"""What the zoo itself costs: compiling, loading, importing, and writing text; one line each.

  python benchmarks/models.py

Every measurement is a process of its own. Memory is what a process holds that no file backs
(RssAnon), above what it held before; simulated devices are in the host's memory, so that 1.0 times
the file is the least there can be. Text is written greedily by this project and by transformers, if
torch is there, from the same folder, one after the other and again.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from absl import app, flags

from checkpoints_io.errors import RunFailed

PART = flags.DEFINE_string("part", None, "One measurement, in this process.")
FOLDER = flags.DEFINE_string("folder", None, "The model it is made on.")
LAYERS = flags.DEFINE_integer("layers", 4, "For part compile.", lower_bound=1)
NEW_TOKENS = 128
EIGHT = "--xla_force_host_platform_device_count=8"


def main(_: list[str]) -> None:
    """Prints every measurement, or makes one."""
    if PART.value:
        print(json.dumps(PARTS[PART.value]()))
        return
    seconds = {n: measured("compile", f"--layers={n}")["s"] for n in (4, 32, 64)}
    told = ", ".join(f"{n} layers {s:.1f} s" for n, s in seconds.items())
    print(f"compile a step   {told}: {max(seconds.values()) / min(seconds.values()):.2f} times")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "model")
        size = measured("make", f"--folder={folder}")["bytes"]
        for name, devices in (("8 devices", EIGHT), ("1 device", "")):
            peak = measured("load", f"--folder={folder}", XLA_FLAGS=devices)["bytes"]
            print(f"load             {size / 2**30:.2f} GiB on {name}: {peak / size:.2f} times")
        for module in ("zoo", "zoo.llama"):
            found = [measured_import(module) for _ in range(3)]
            print(f"import {module:9} {statistics.median(s for s, _ in found):.2f} s{found[0][1]}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "model")
        measured("make_small", f"--folder={folder}")
        rates: dict[str, list[float]] = {"decode": [], "decode_of_transformers": []}
        for _ in range(2):
            for part, found in rates.items():
                if part == "decode" or importlib.util.find_spec("torch"):
                    found.append(measured(part, f"--folder={folder}")["tokens_per_s"])
        for part, found in rates.items():
            told = ", ".join(f"{rate:.1f}" for rate in found)
            print(f"{part:24} {f'{told} tokens/s' if found else 'no torch here'}")


def measured(part: str, *args: str, **environment: str) -> dict:
    """The JSON line of one part, from a process of its own."""
    command = [sys.executable, __file__, f"--part={part}", *args]
    told = subprocess.run(
        command, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip
    if told.returncode:
        raise RunFailed(told.stderr[-2000:])
    return json.loads(told.stdout.splitlines()[-1])


def measured_import(module: str) -> tuple[float, str]:
    """Seconds, and which of the large libraries came with it."""
    code = (
        "import sys, time; since = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - since); "
        "print(*sorted({n.split('.')[0] for n in sys.modules} & set("
        "'jax flax orbax numpy torch transformers datasets safetensors grain'.split())))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, libraries = told.stdout.splitlines()
    return float(seconds), f" ({libraries})"


def config_of(layers: int, width: int, vocabulary: int):
    """A Llama with heads of 64, two for each key head."""
    from zoo import llama
    from zoo.parts import rope

    return llama.Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, head_dim=64, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters=rope.Rope(rope_theta=5e5),
    )  # fmt: skip


def compile_step() -> dict:
    """Seconds to trace and compile the recipe's step: one micro-batch, and the optimizer."""
    from flax import nnx
    import jax
    import numpy as np
    import optax

    from recipes.data.ids.examples import PairIds
    from recipes.data.packed import batches
    from recipes.data.packed.batches import DataFields
    from recipes.data.packed.packing import Shape
    from recipes.preference import metrics, objectives
    from recipes.training import optimizer, update
    from zoo import llama
    from zoo.parts import sharding

    config, mesh = config_of(LAYERS.value, 256, 4096), sharding.mesh_of(1, -1, 1)
    ids = np.arange(8, dtype=np.int32)
    pair, shape = PairIds(0, ids, ids, ids, *[np.ones(8, bool)] * 2), Shape(4, 512, 16, 2, 4)
    (batch,) = batches.pack([pair], shape, [0]).micro_batches
    with jax.set_mesh(mesh):
        graph, layout = nnx.split(nnx.eval_shape(lambda: llama.Model(config, nnx.Rngs(0))))
        here = jax.NamedSharding(mesh, jax.P())
        placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        params = jax.tree.map(placed, nnx.to_pure_dict(layout))
        adamw = optax.adamw(1e-4)
        opt_state = optimizer.layout(adamw, params, mesh)
        objective = objectives.objective({"loss": "sigmoid", "beta": 0.1})
        jax.jit(lambda x: x + 1)(1)  # jax itself is awake
        since = time.perf_counter()
        programs = update.compiled(
            params, opt_state, graph=graph, optimizer=adamw, loss=objective.loss,
            figures=lambda answers: metrics.preference(answers, objective), shape=shape,
        )  # fmt: skip
        sums = jax.tree.map(placed, jax.eval_shape(programs.zero))
        batch = jax.tree.map(placed, batch)
        fields = DataFields(sums.reference.update(dtype=np.int32), sums.reference)
        programs.add.lower(sums, params, {}, sums.reference, fields, batch).compile()
        programs.apply.lower(sums, params, opt_state, fields).compile()
    return {"s": time.perf_counter() - since}


def make(layers: int = 28, width: int = 1280, vocabulary: int = 32000) -> dict:
    """Writes a model of random weights; its bytes."""
    from flax import nnx
    import jax.numpy as jnp

    import zoo
    from zoo import llama

    folder = pathlib.Path(FOLDER.value)
    model = llama.Model(config_of(layers, width, vocabulary), nnx.Rngs(0))
    zoo.save(model, folder, dtype=jnp.bfloat16)
    return {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}


def load() -> dict:
    """The most that loading holds, above what was held before, in the file's dtype."""
    import jax
    import jax.numpy as jnp

    import zoo
    from zoo.parts import sharding

    mesh = sharding.mesh_of(1, -1, 1)
    jax.block_until_ready(jnp.zeros(8))
    before, most, stop = held(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], held())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = zoo.load(FOLDER.value, dtype=jnp.bfloat16, mesh=mesh)
    jax.block_until_ready(model.embedding[...])
    stop.set()
    watcher.join()
    return {"bytes": most[0] - before}


def held() -> int:
    """Bytes of this process that no file backs."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def decode() -> dict:
    """Tokens a second of this project, after a run that compiles."""
    import zoo
    from zoo import generate

    model = zoo.load(FOLDER.value)
    write = lambda: generate.generate(model, [list(range(3, 35))], max_new_tokens=NEW_TOKENS)
    write()
    since = time.perf_counter()
    write()
    return {"tokens_per_s": NEW_TOKENS / (time.perf_counter() - since)}


def decode_of_transformers() -> dict:
    """The same by transformers, in float32 too."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER.value, dtype=torch.float32)
    ids = torch.arange(3, 35)[None]
    write = lambda: model.generate(
        ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    write()
    since = time.perf_counter()
    write()
    return {"tokens_per_s": NEW_TOKENS / (time.perf_counter() - since)}


PARTS = {
    "compile": compile_step,
    "make": make,
    "make_small": lambda: make(layers=12, width=768),
    "load": load,
    "decode": decode,
    "decode_of_transformers": decode_of_transformers,
}

if __name__ == "__main__":
    app.run(main)

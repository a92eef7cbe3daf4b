"""What several tests start from: small models, and the folder of shared facts, if it is there."""

import atexit
from collections.abc import Callable, Iterator
import contextlib
import gc
import itertools
import json
import os
import pathlib
import re
import shutil
import struct
import sys
import tempfile


def asks_for(mark: str, arguments: list[str]) -> bool:
    """Does `-m` of this command line choose the tests with this mark?"""
    chosen = re.findall(r"(?:^|\x1f)-m(?:=|\x1f)?([^\x1f]*)", "\x1f".join(arguments))
    return bool(chosen) and re.search(rf"(?<!not )\b{mark}\b", chosen[-1]) is not None


# Processes side by side cannot share a GPU, and its products are rounded otherwise: tests, and the
# programs they start, take the CPU. Set before jax is imported.
if not asks_for("gpu", sys.argv):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The tests, and the programs they start, compile the same small models again and again. Set before
# jax is imported; all processes of a test run share one.
if "TESTS_CACHE" not in os.environ:
    os.environ["TESTS_CACHE"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["TESTS_CACHE"], ignore_errors=True)
CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["TESTS_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Most of their time is the compiler's: with less of its optimisation the same programs come out, a
# little slower; and threads cost more than they give to programs this small. Long forms, which run
# longer and compare sums of more numbers, get some of it. `XLA_FLAGS=` asks for that of users.
LEVEL = 1 if asks_for("full", sys.argv) else 0
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_backend_optimization_level={LEVEL} --xla_cpu_use_fusion_emitters=false "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_multi_thread_eigen=false",
)
# Threads of torch that wait for each other take the cores from the other files' tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tests.checked  # noqa: F401, which checks the annotations of what is imported below

# isort: split
from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from tensorboardX.proto import event_pb2

from recipes.configs import tiny
from recipes.data.packed.packing import Shape
from recipes.preference import metrics, objectives
from recipes.training import by_name, loop, optimizer, settings, update
from recipes.training.run import Run
from zoo import llama
from zoo.parts import rope, sharding

# Where a plugin imported jax before.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
TINY = ROOT / "recipes" / "tiny"

logging.set_verbosity(logging.WARNING)


def small_config(**other) -> llama.Config:
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
        tie_word_embeddings=False, rope_parameters=rope.Rope(rope_theta=1e4),
    )  # fmt: skip
    return llama.Config(**(sizes | other))


def large_weights(model: nnx.Module, seed: int = 0, scale: float = 1.0) -> nnx.Module:
    """Weights of std 0.5 sqrt(32 / fan_in): with small ones a wrong rope is invisible."""
    draw = np.random.default_rng(seed)

    def fill(param: nnx.Param) -> nnx.Param:
        axes, shape = param.axes.split(), param.shape
        sizes = dict(zip(axes, shape, strict=True))
        noise = draw.standard_normal(shape).astype(np.float32)
        given = lambda numbers: param.replace(jnp.asarray(numbers, jnp.float32))
        if "W" in axes:  # taps of a convolution
            return given(0.5 * noise)
        is_router = axes[-2:] == ["D", "E"]
        if not is_router and not {"D"} < {a for a in axes if a not in "LE"}:  # norms, biases, sinks
            return given(np.asarray(param[...]) + np.float32(0.1) * noise)
        into_d = axes[-1] == "D" and axes[0] not in "VM" and "J" not in axes
        # o and down sum over what comes before D.
        fan_in = np.prod([sizes[a] for a in axes if a in "NHUQFX"]) if into_d else sizes["D"]
        return given(np.float32(scale * 0.5 * np.sqrt(32 / fan_in)) * noise)

    is_param = lambda x: isinstance(x, nnx.Variable)
    nnx.update(model, jax.tree.map(fill, nnx.state(model), is_leaf=is_param))
    return model


def given_by(config: ml_collections.ConfigDict, **other) -> by_name.Values:
    """Every setting of a config by its name, without a check."""
    return by_name.plain(config, settings.ALL) | other


def optimizer_settings_of(config: ml_collections.ConfigDict) -> optimizer.OptimizerSettings:
    return by_name.part(optimizer.OptimizerSettings, given_by(config))


def sigmoid(beta: float = 0.1) -> objectives.Objective:
    return objectives.objective({"loss": "sigmoid", "beta": beta})


def programs_of(
    trained: update.Params, opt_state, graph: nnx.GraphDef, descent, objective, shape: Shape
) -> update.Programs:
    """The programs of an update, as the recipe compiles them."""
    return update.compiled(
        trained, opt_state, graph=graph, optimizer=descent, loss=objective.loss,
        figures=lambda answers: metrics.preference(answers, objective), shape=shape,
    )  # fmt: skip


# Settings that a config need not state: of adapters, some losses, a reference that moves.
OF_SOME_RUNS = settings.ADAPTER.keys() | {
    name for name, setting in settings.PREFERENCE.items() if setting.default is None
} | {"reference_sync_steps", "reference_mixup_alpha"}  # fmt: skip


def run_with(**parts) -> Run:
    """A run of these parts alone."""
    return Run(*[None] * len(Run._fields))._replace(**parts)


def meshes() -> dict[str, jax.sharding.Mesh]:
    """Of one of eight devices, and of all of them, split in three ways."""
    return {
        "one": sharding.mesh_of(1, 1, 1, devices=jax.devices()[:1]),
        "fsdp 8": sharding.mesh_of(1, -1, 1),
        "fsdp 4, tensor 2": sharding.mesh_of(1, 4, 2),
        "data 2, fsdp 4": sharding.mesh_of(2, 4, 1),
    }


def devices(count: int) -> dict[str, str]:
    """The environment of a program whose platform shows so many devices."""
    more = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {more}", "JAX_PLATFORMS": "cpu"}


def few_pairs(folder: pathlib.Path, every: int) -> str:
    """A file with one in so many of the tiny run's pairs."""
    rows = (TINY / "train.jsonl").read_text().splitlines()[::every]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "rows.jsonl")


CLOCK = {"train/tokens_per_second", "train/input_wait"}


def records(config: ml_collections.ConfigDict, *, clock: bool = False) -> list[dict]:
    """What a run has recorded, without the figures that hang on the clock."""
    lines = (pathlib.Path(config.directory) / "metrics.jsonl").read_text().splitlines()
    own = lambda name: clock or not (name in CLOCK or name.startswith("time/"))
    return [{k: v for k, v in json.loads(line).items() if own(k)} for line in lines]


def events(folder: pathlib.Path) -> Iterator[event_pb2.Event]:
    """What TensorBoard is given: each event lies between its length and two checksums."""
    (path,) = folder.glob("events.*")
    content, at = path.read_bytes(), 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        at += size + 16


def exported(config: ml_collections.ConfigDict, step: int | str) -> dict[str, np.ndarray]:
    """The weights that a run has exported, or its adapters."""
    folder = pathlib.Path(config.directory) / f"hf/step-{step}"
    (file,) = folder.glob("*model.safetensors")
    return safetensors.numpy.load_file(file)


def held(folder: pathlib.Path | str) -> int:
    """The bytes of all files in a folder."""
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


class Stopped(Exception):
    """In place of a death."""


@contextlib.contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """A run in this block ends without a word after so many steps, and must come so far."""
    taken, real = [], loop.applied

    def applied(*args) -> loop.Taken:
        if len(taken) == steps:
            raise Stopped
        taken.append(real(*args))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(loop, "applied", applied)
        yield


def check_resume(
    train: Callable[[ml_collections.ConfigDict], None],
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    capfd: pytest.CaptureFixture,
    *,
    after: int,
) -> None:
    """A run like the finished one of `config`, stopped after so many steps and resumed, is equal.

    In all figures but those of the clock, and in every bit of what it exports last.
    """
    parts = config.copy_and_resolve_references()
    parts.directory = str(folder)
    with stopped_after(after):
        train(parts)
    capfd.readouterr()
    train(parts)
    assert f"resuming from step {after}" in capfd.readouterr().out
    assert records(parts) == records(config)
    ours, theirs = (exported(one, config.num_train_steps) for one in (parts, config))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def pytest_configure(config):
    if asks_for("gpu", sys.argv) and config.getoption("numprocesses", 0):
        raise pytest.UsageError("processes side by side cannot share a GPU: add -n0")


# Files of tests run side by side; those that take minutes go first, so that none is left alone.
LONG = ("test_dpo", "test_devices", "test_killed", "test_families", "test_stopping", "test_attacks",
        "test_full_disk", "test_reference_cache", "test_command", "test_programs",
        "test_strangers")  # fmt: skip


def pytest_collection_finish():
    """Garbage is looked for less often, and not among all that was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items):
    place = lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)
    items.sort(key=place)


# A process may hold 65,530 pieces of memory (vm.max_map_count), a compiled program is several of
# them, and one more is a crash: far below it, programs of earlier tests are given back.
MANY_PIECES = 25_000
counted = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Looked at now and then: a long form of one file alone may make too many."""
    yield
    pieces = pathlib.Path("/proc/self/maps")
    if next(counted) % 25 or not pieces.exists():
        return
    if pieces.read_bytes().count(b"\n") > MANY_PIECES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def small_model() -> llama.Model:
    return large_weights(llama.Model(small_config(), nnx.Rngs(0)))


@pytest.fixture
def tiny_config(tmp_path) -> ml_collections.ConfigDict:
    """The tiny run, with absolute paths, shortened to what a test can wait for."""
    config = tiny.get_config()
    config.initialize_from_hf = str(TINY / "model")
    config.train_data = str(TINY / "train.jsonl")
    config.validation.heldout = str(TINY / "heldout.jsonl")
    config.directory = str(tmp_path / "run")
    config.tensorboard = False
    config.compile_cache = None  # the tests share one of their own
    config.token_cache = f"{CACHE}/tokens"  # and tokenise once
    config.run_initial_eval = False
    config.steps_per_log = 1
    config.steps_per_hf_export = -1
    config.max_eval_pairs = 8
    config.sample_tokens = 0
    return config


@pytest.fixture
def shared() -> pathlib.Path:
    if not SHARED.is_dir():
        pytest.skip("the folder of shared facts is not here")
    return SHARED

"""kill -9 at any moment, again and again: the run that comes back is the run that would have been.

`-m full` kills 220 times, a run of adapters 50 times, and those of other architectures eleven times
each. Half of the kills come at any time of a run's life, half while files are being written.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import time

import ml_collections
import pytest
import tensorboardX  # noqa: F401  which takes seconds

from checkpoints_io import places
from checkpoints_io.run_state import RunStore
from recipes import dpo
from recipes.configs import tiny
from recipes.training import metering
from tests.conftest import TINY

STEPS = 12
# Architectures beside the embedded Llama, and what their models are like.
OTHERS = {
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "gemma4_text": dict(shape="inputs of each layer, shared keys", vocab_size_per_layer_input=1024),
    "glm4_moe": dict(shape="groups, one key head"),
    "deepseek_v3": dict(shape="groups, yarn"),
    "nemotron_h": {},
    "lfm2": {},
}
# Forked where everything is imported and nothing has begun: a life takes half as long to start.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([__name__])


def config_of(directory: pathlib.Path, what: str) -> ml_collections.ConfigDict:
    """Two sources, more than one epoch, accumulation, a kept reference: all there is to go on."""
    config = tiny.get_config()
    config.initialize_from_hf = str(TINY / "model")
    if what in OTHERS:
        config.initialize_from_hf = config.reference_model_path = f"{directory.parent}/model"
    data = {"mine": {"path": f"{directory.parent}/mine.jsonl", "weight": 3.0},
            "theirs": {"path": f"{directory.parent}/theirs.jsonl"}}  # fmt: skip
    with config.ignore_type():
        config.train_data = ml_collections.ConfigDict(data)
        config.validation = ml_collections.ConfigDict({})
    config.validation_split_fraction = 0.1
    config.max_eval_pairs = 8
    config.directory = str(directory)
    config.compile_cache = None  # the tests share one of their own
    config.token_cache = f"{directory}-tokens"
    config.reference_mode, config.reference_cache = "cached", f"{directory}-reference"
    config.train_batch_size, config.per_device_parallelism, config.num_train_steps = 16, 1, STEPS
    config.steps_per_log = 1
    config.steps_per_checkpoint, config.steps_per_eval, config.steps_per_hf_export = 3, 4, 5
    config.hf_save_dtype = "f32"
    config.sample_tokens = 0
    if what == "adapters":
        config.adapter = dict(rank=4, dora=True, lora_plus=4.0)
        config.learning_rate = 1e-3
    return config


def live(directory: pathlib.Path, what: str) -> None:
    """One life of the run, in a process of its own, which notes the rows of every step."""
    told = os.open(f"{directory}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 1)
    os.dup2(told, 2)
    counted = metering.Meter.add
    with open(f"{directory}-rows.txt", "a") as rows:

        def noting(meter, update):
            rows.write(f"{update.source_rows.tolist()}\n")
            rows.flush()
            counted(meter, update)

        metering.Meter.add = noting
        print("\n— a life —", flush=True)
        dpo.train(config_of(directory, what))


def born(directory: pathlib.Path, what: str) -> multiprocessing.Process:
    process = server.Process(target=live, args=(directory, what))
    process.start()
    return process


def busy(directory: pathlib.Path) -> bool:
    """Are there files that are being written?"""
    rooms = [directory / "checkpoints", directory / "hf", pathlib.Path(f"{directory}-tokens")]
    with contextlib.suppress(FileNotFoundError):
        return any("tmp" in p.name or p.name.startswith(".") for r in rooms if r.exists()
                   for p in r.iterdir())  # fmt: skip
    return True


def killed(process: multiprocessing.Process, directory: pathlib.Path, wait: float) -> bool:
    """Kills it after `wait` seconds, or, where that is negative, while it writes."""
    deadline = time.monotonic() + abs(wait)
    while process.is_alive() and time.monotonic() < deadline:
        if wait < 0 and busy(directory):
            time.sleep(random.uniform(0, 0.06))
            break
        time.sleep(0.002)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert alive or process.exitcode == 0, pathlib.Path(f"{directory}.txt").read_text()[-3000:]
    return alive


def trace(directory: pathlib.Path) -> dict:
    """All that a run leaves but the clock, with the rows of the last time each step was taken."""
    clock = ("second", "input_wait", "time/")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [
        {name: v for name, v in json.loads(line).items() if not any(c in name for c in clock)}
        for line in lines
    ]
    exported = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (directory / "hf").rglob("*")
        if path.is_file()
    }
    with contextlib.closing(RunStore(places.Disk(directory / "checkpoints"), keep=None)) as store:
        facts = [store.facts(step) for step in store.steps()]
    return {"records": records, "exported": exported, "checkpoints": facts}


def rows_of(directory: pathlib.Path) -> list[str]:
    return pathlib.Path(f"{directory}-rows.txt").read_text().splitlines()


@pytest.mark.full
@pytest.mark.parametrize(
    ("kills", "what"),
    [(11, "llama"), (220, "llama"), (50, "adapters"), *((11, family) for family in OTHERS)],
)
def test_a_run_killed_at_any_moment_is_the_run_that_was_not(tmp_path, kills, what, capsys):
    if what in OTHERS:
        pytest.importorskip("transformers")
        from tests.recipes import random_models

        random_models.write(tmp_path / "model", what, **OTHERS[what])
    pairs = (TINY / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text("".join(pairs[:96]))
    (tmp_path / "theirs.jsonl").write_text("".join(pairs[96:140]))
    whole = tmp_path / "whole"
    live_at = time.monotonic()
    process = born(whole, what)
    process.join()
    life = time.monotonic() - live_at
    assert process.exitcode == 0, pathlib.Path(f"{whole}.txt").read_text()[-3000:]
    true, rows = trace(whole), rows_of(whole)
    assert [r["step"] for r in true["records"] if "train/dpo_loss" in r] == [*range(1, STEPS + 1)]
    assert len(rows) == STEPS == len(set(rows))

    seed = random.randrange(2**32)
    draw = random.Random(seed)
    where = {"starting": 0, "training": 0, "writing": 0}
    done = chains = 0
    while done < kills:
        directory = tmp_path / f"parted-{chains}"
        chains += 1
        ended = False
        while not ended:
            taken = len(rows_of(directory)) if directory.exists() else 0
            process = born(directory, what)
            # The last chain is let to its end.
            wait = draw.choice([1, -1]) * draw.uniform(0, life) if done < kills else 1e9
            ended = not killed(process, directory, wait)
            if not ended:
                done += 1
                began = len(rows_of(directory)) > taken if directory.exists() else False
                where["writing" if busy(directory) else "training" if began else "starting"] += 1
        assert trace(directory) == true, (seed, directory)
        at = 0  # every life begins behind its newest checkpoint and goes on step by step
        for row in rows_of(directory):
            step = rows.index(row)
            assert step <= at, (seed, directory, "a step was skipped")
            at = step + 1
        assert at == STEPS
        left = [p.name for r in ("checkpoints", "hf", ".") for p in (directory / r).iterdir()]
        assert not [name for name in left if "tmp" in name or name.startswith(".")], left
        assert not [*tmp_path.glob(f"{directory.name}-*/*/.*")]  # of tokens, and of the reference
    with capsys.disabled():
        print(f"\n{done} kills over {chains} runs, of {life:.1f} s each: {where} (seed {seed})")

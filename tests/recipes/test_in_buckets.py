"""A run in a bucket is the run on a disk: killed, harmed, badly served, and of two processes.

The buckets are servers on this machine (tests/checkpoints_io/buckets.py); all of it is `-m full`.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from checkpoints_io import lease, places
from recipes import dpo
from tests.checkpoints_io import buckets
from tests.conftest import ROOT, TINY, devices
from tests.recipes import test_killed
from tests.recipes.test_killed import server, trace
from tests.recipes.training.test_preemption import FLAGS, figures

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The folder of a run that nothing happened to, beside its data; and what it left."""
    folder = tmp_path_factory.mktemp("on-disk")
    pairs = (TINY / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "mine.jsonl").write_text("".join(pairs[:96]))
    (folder / "theirs.jsonl").write_text("".join(pairs[96:140]))
    process = server.Process(target=live, args=(folder / "run", None, {}))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "run.txt").read_text()[-3000:]
    return folder / "run", trace(folder / "run")


@pytest.fixture
def served(request, monkeypatch):
    """Of a kind of bucket: the environment of who uses it, with which this process does."""
    with buckets.served(request.param) as environment:
        buckets.configured(environment, monkeypatch)
        fsspec.get_filesystem_class(request.param).clear_instance_cache()
        yield request.param, environment


def live(like: pathlib.Path, url: str | None, environment: dict[str, str]) -> None:
    """One life of the run on a disk, or of its like in a bucket."""
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    lease.RENEWED, lease.RUNS_OUT = 1.0, 4.0
    told = os.open(f"{like}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, 1)
    os.dup2(told, 2)
    config = test_killed.config_of(like, "llama")
    if url is not None:
        config.directory, config.steps_per_log = url, 1
    print("\n— a life —", flush=True)
    dpo.train(config)


def left_by(url: str, folder: pathlib.Path) -> dict:
    """What a run has left in a bucket, as on a disk."""
    place = places.at(url)
    for path in place._below():
        here = folder / pathlib.PurePosixPath(path).relative_to(place._path())
        here.parent.mkdir(parents=True, exist_ok=True)
        place._fs.get_file(path, str(here))
    try:
        return trace(folder)
    finally:
        shutil.rmtree(folder)


def busy(place: places.Place) -> bool:
    """Is there a checkpoint or an export of which the last object is missing?"""
    checkpoints, exports = place.within("checkpoints"), place.within("hf")
    return any(name.endswith(".part") for name in exports.names()) or any(
        not checkpoints.exists(f"{name}/commit_success.txt") for name in checkpoints.names()
    )


def killed(process, place: places.Place, wait: float) -> str | None:
    """Kills it after `wait` seconds, or, where that is negative, while it writes; says in what."""
    deadline = time.monotonic() + abs(wait)
    while process.is_alive() and time.monotonic() < deadline:
        if wait < 0 and busy(place):
            time.sleep(random.uniform(0, 0.05))
            break
        time.sleep(0.005)
    alive = process.is_alive()
    process.kill()
    process.join()
    return ("writing" if busy(place) else "other") if alive else None


@pytest.mark.parametrize(("served", "kills"), [("gs", 40), ("s3", 20)], indirect=["served"])
def test_killed_in_a_bucket_it_is_the_run_on_a_disk(served, kills, on_disk, tmp_path, capsys):
    (kind, environment), (like, true) = served, on_disk
    where, chains, start = {"writing": 0, "other": 0}, 0, time.monotonic()
    while min(where.values()) < kills / 2:
        url = f"{kind}://runs/parted-{chains}"
        place, chains, ended = places.at(url), chains + 1, False
        while not ended:
            process = server.Process(target=live, args=(like, url, environment))
            process.start()
            # Half of the deaths at any time of a life, half while something goes up.
            sign = random.choice([1, -1]) if where["other"] < kills / 2 else -1
            enough = min(where.values()) >= kills / 2
            at = killed(process, place, 1e9 if enough else sign * random.uniform(3, 40))
            ended = at is None
            if ended:
                told = pathlib.Path(f"{like}.txt").read_text()[-3000:]
                assert process.exitcode == 0, told
            else:
                where[at] += 1
        assert left_by(url, tmp_path / "left") == true, url
        assert not busy(place)
        assert place.within("lock").names() == []
    with capsys.disabled():
        print(f"\n{kind}: {where} over {chains} runs, {time.monotonic() - start:.0f} s")


@pytest.mark.parametrize("served", ["gs"], indirect=True)
def test_badly_served_it_is_the_run_on_a_disk(served, on_disk, tmp_path, capsys):
    """A tenth of requests is answered 503, late, or not at all."""
    (kind, environment), (like, true) = served, on_disk
    port = buckets.free_port()
    proxy = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoints_io.bad_proxy", str(port),
         environment["BUCKET_PORT"]],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert proxy.stdout.readline() == "ready\n"
        through = {
            name: value.replace(environment["BUCKET_PORT"], str(port))
            for name, value in environment.items()
        }
        lives = 0
        while True:
            process = server.Process(target=live, args=(like, f"{kind}://runs/bad", through))
            process.start()
            process.join()
            lives += 1
            told = pathlib.Path(f"{like}.txt").read_text()[-3000:]
            if process.exitcode == 0:
                break
            assert "Error: gs://" in told and lives < 5, told  # a sentence, and it goes on
    finally:
        proxy.send_signal(signal.SIGTERM)
        answered = proxy.communicate(timeout=10)[0]
    assert left_by(f"{kind}://runs/bad", tmp_path / "left") == true
    with capsys.disabled():
        print(f"\n{lives} starts; {answered.strip()}")


@pytest.mark.parametrize("served", ["gs"], indirect=True)
def test_two_processes_in_a_bucket(served, tmp_path):
    """Four devices each; asked to stop and resumed, they are the run of two on a disk."""
    _, environment = served

    def both(directory, asked_at=None):
        where = f"127.0.0.1:{buckets.free_port()}"
        command = [
            sys.executable, "recipes/dpo.py", "--config=recipes/configs/tiny.py",
            f"--config.directory={directory}", "--config.token_cache=None",
            "--config.tensorboard=False", "--config.compile_cache=None",
            "--config.steps_per_log=1", "--config.sample_tokens=0",
            "--config.run_initial_eval=False", "--config.max_eval_pairs=8",
            "--config.distributed.enabled", f"--config.distributed.coordinator_address={where}",
            "--config.distributed.num_processes=2", "--config.per_device_parallelism=1",
            "--config.min_pack_fill=0.3", *FLAGS, "--config.num_train_steps=6",
            "--config.steps_per_checkpoint=2",
        ]  # fmt: skip
        started = [
            subprocess.Popen(
                [*command, f"--config.distributed.process_id={i}"], cwd=ROOT, text=True,
                env=os.environ | environment | devices(4), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for i in range(2)
        ]  # fmt: skip
        if asked_at is not None:
            place = places.at(f"{directory}/checkpoints")
            while f"{asked_at}" not in place.names():
                assert started[0].poll() is None, started[0].communicate()[0][-2000:]
                time.sleep(0.1)
            started[1].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=900)[0] for process in started]
        return {process.returncode for process in started}, told[0]

    status, told = both(tmp_path / "on-disk")
    assert status == {0}, told[-2000:]
    url = "gs://runs/both"
    status, told = both(url, asked_at=2)
    assert status == {75}, told[-2000:]
    status, told = both(url)
    assert status == {0}, told[-2000:]
    assert "resuming from step" in told
    place = places.at(url)
    (tmp_path / "in-bucket").mkdir()
    (tmp_path / "in-bucket" / "metrics.jsonl").write_bytes(place.read("metrics.jsonl"))
    assert figures(tmp_path / "in-bucket") == figures(tmp_path / "on-disk")
    weights = (tmp_path / "on-disk" / "hf" / "step-6" / "model.safetensors").read_bytes()
    assert place.read("hf/step-6/model.safetensors") == weights

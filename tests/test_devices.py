"""Eight simulated devices against one, in a process of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from recipes.preference import losses
from tests import in_float64, lora_on_devices
from tests.conftest import CLOCK, ROOT, devices

MESHES = ["fsdp 8", "fsdp 4, tensor 2", "data 2, fsdp 4"]


def in_float64_on_eight_devices(program, folder, *more):
    """The JSON records that a program prints, where the platform shows eight devices."""
    told = in_float64.ran(program, folder, *more, **devices(8))
    return list(map(json.loads, told.splitlines()))


def on_eight_devices(program, folder, *more):
    """The same in float32."""
    told = subprocess.run(
        [sys.executable, f"tests/{program}.py", str(folder), *more],
        cwd=ROOT,
        env=os.environ | devices(8) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return list(map(json.loads, told.stdout.splitlines()))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What tests/eight_devices.py measured: one record per mesh."""
    found = on_eight_devices("eight_devices", tmp_path_factory.mktemp("model"))
    return {record["mesh"]: record for record in found}


@pytest.mark.full
@pytest.mark.parametrize(
    "families",
    [
        ("gpt_oss", "alternating"),
        ("gemma3_text", "phi3", "gpt2"),
        ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "gemma4_text", "gemma4_text of E2B"),
        ("glm4_moe", "deepseek_v3", "mistral4", "minimax_m2"),
        ("llama4_text", "deepseek_v2"),
        ("lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h"),
    ],
    ids="-".join,
)
def test_every_kind_of_layer_is_split_over_devices(tmp_path, families):
    """Experts, biases, sinks, windows, recurrences: eight devices give what one gives."""
    found = in_float64_on_eight_devices("families_on_devices", tmp_path, *families)
    assert len(found) == len(families)
    for record in found:
        assert record["loss"] <= 1e-12, record
        assert record["gradient"] <= 1e-11, record


@pytest.mark.full
@pytest.mark.parametrize("families", [("llama", "adapters"), ("gpt_oss",), ("gemma3_text",)])
def test_slices_exchange_a_gradient_once_an_update(families):
    """Windows, sinks, soft caps and experts too; with each micro-batch only log-probabilities."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.slices_on_devices", *families], cwd=ROOT,
        env=os.environ | devices(8), capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    found = list(map(json.loads, told.stdout.splitlines()))
    assert len(found) == 3 * len(families)
    for record in found:
        print(record)
        assert record["apart"] <= 1e-6, record
        assert record["gradient"] <= 1e-5, record
        assert record["micro_batches"] > 1, record
        numbers = 3 * record["pairs"] * 2  # three of each answer
        assert record["add"] == [[4 * numbers, False]], record
        assert sum(size for size, _ in record["apply"]) == record["weights_per_device"], record
        assert not any(in_loop for _, in_loop in record["apply"]), record


@pytest.mark.full
@pytest.mark.parametrize(
    "families",
    [("llama", "uneven"), ("adapters", "gpt_oss", "gemma3_text"), ("llama4_text", "deepseek_v3"),
     ("gpt2", "gemma4_text of E2B")],
    ids="-".join,
)  # fmt: skip
def test_rows_that_devices_share_give_what_one_gives(families):
    """Windows, sinks, soft caps, chunks, experts, latents, and rows cut in every way."""
    found = in_float64_on_eight_devices("context_on_devices", *families)
    assert len(found) == 7 * len(families)
    for record in found:
        print(record)
        assert record["loss"] <= 1e-12, record
        assert record["gradient"] <= 1e-11 < record["largest"], record
        if record["family"] == "llama":  # a device gathers keys and values, 2 heads of 8 or one
            assert set(record["whole"]) <= {"2,8", "1,8"} != set(), record


@pytest.mark.full
def test_a_run_whose_rows_two_devices_share(tmp_path):
    """From its start to its export: reference, several micro-batches, evaluation, answers.

    It goes on from a checkpoint to the same bits, and on one device.
    """

    def ran(name, *flags, count=2):
        short = (
            "num_train_steps=4 train_batch_size=16 row_length=512 per_device_parallelism=2 "
            "min_pack_fill=0.2 steps_per_log=1 steps_per_eval=2 steps_per_checkpoint=2 "
            "max_eval_pairs=8 sample_tokens=8 hf_save_dtype=f32 tensorboard=False "
            f"directory={tmp_path / name}"
        )
        told = subprocess.run(
            [sys.executable, "recipes/dpo.py", "--config=recipes/configs/tiny.py",
             *(f"--config.{flag}" for flag in [*short.split(), *flags])],
            cwd=ROOT, env=os.environ | devices(count), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr[-3000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [
            {k: v for k, v in json.loads(line).items() if k not in CLOCK and "time/" not in k}
            for line in lines
        ]
        file = tmp_path / name / "hf" / "step-4" / "model.safetensors"
        return records, safetensors.numpy.load_file(file)

    def near(ours, theirs):
        for found, expected in zip(ours, theirs, strict=True):
            assert found.keys() == expected.keys()
            for name, value in found.items():  # others are differences of large sums
                apart = 1e-6 if "dpo_" in name else 1e-5
                assert value == pytest.approx(expected[name], abs=apart, rel=1e-6), name

    shared = "mesh.fsdp=1", "mesh.context=2"
    alone, weights_alone = ran("one", count=1)
    found, weights = ran("two", *shared)
    for name in ("again", "moved"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "4")
        shutil.rmtree(tmp_path / name / "hf")
    assert [len(found), sum("train/dpo_loss" in record for record in found)] == [7, 4]
    near(found, alone)
    again, weights_again = ran("again", *shared)
    assert again == found
    moved, weights_moved = ran("moved", count=1)
    near(moved, found)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weights_again[name], weight)
        np.testing.assert_allclose(weights_moved[name], weight, atol=1e-5)
        np.testing.assert_allclose(weights_alone[name], weight, atol=1e-5)


@pytest.mark.full
def test_adapters_begin_and_move_alike_on_any_devices(tmp_path):
    """Their first step of Adam is that of one device, in whatever bits the base is kept."""
    found = on_eight_devices("lora_on_devices", tmp_path)
    how = [(one["zero"], one["frozen"], one["remat"], one["mesh"]) for one in found]
    assert how == [(*how, mesh) for how in lora_on_devices.HOW for mesh in ("one", *MESHES)]
    for record in found:
        assert record["ratios"] == 0, record
        assert abs(record["loss"] - np.log(2)) <= 1e-7, record
        assert record["far"] <= 1e-5, record
        assert record["specs"] > 1 or record["mesh"] == "one", record


@pytest.mark.full
def test_the_update_of_a_loss_depends_on_no_layout(tmp_path):
    """Of every loss, in 1 to 7 micro-batches, on one device and on eight, in float64."""
    names = [name for name in losses.LOSSES if name != "reference_free"]  # whose form cpo has
    for record in in_float64_on_eight_devices("losses_on_devices", tmp_path, *names):
        assert {"7 micro-batches", "2 micro-batches", "fsdp 8"} <= record.keys(), record
        for layout, apart in record.items():
            assert layout in ("loss", "length") or apart <= 1e-12, record


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(figures, mesh):
    one, many = figures["one"]["losses"], figures[mesh]["losses"]
    assert len(one) == 10
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_no_gather_is_larger_than_the_largest_weight(figures, mesh):
    record = figures[mesh]
    print(mesh, {k: v for k, v in record.items() if k != "losses"})
    assert record["gathers"] > 0
    assert record["largest_gather"] <= record["largest_weight"]


@pytest.mark.parametrize("mesh", MESHES)
def test_head_and_embedding_are_gathered_once_per_micro_batch(figures, mesh):
    """In the compute dtype, outside of any loop."""
    assert figures[mesh]["head_and_embedding_gathers"] == 2
    assert figures[mesh]["of_them_in_loops"] == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_optimizer_state_is_split_as_the_weights(figures, mesh):
    assert figures[mesh]["optimizer_as_weights"]
    assert figures[mesh]["weights_per_device"] < 0.3


@pytest.mark.full
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_two_processes_are_one(tmp_path, loss):
    """Two processes of four devices over loopback: the losses and the export of one of eight."""

    def start(directory, count, *flags):
        short = (
            "num_train_steps=2 per_device_parallelism=1 min_pack_fill=0.3 steps_per_log=1 "
            "run_initial_eval=False hf_save_dtype=f32 sample_tokens=8 max_eval_pairs=8 "
            f"tensorboard=False loss={loss}"
        )
        flags = [*short.split(), f"directory={directory}", *flags]
        return subprocess.Popen(
            [sys.executable, "recipes/dpo.py", "--config=recipes/configs/tiny.py",
             *(f"--config.{flag}" for flag in flags)],
            cwd=ROOT, env=os.environ | devices(count), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = f"distributed.coordinator_address=127.0.0.1:{port}"
    who = ["distributed.enabled", where, "distributed.num_processes=2"]
    both = [start(tmp_path / "two", 4, *who, f"distributed.process_id={i}") for i in range(2)]
    told = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "".join(t[-1500:] for t in told)
    alone = start(tmp_path / "one", 8)
    told = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, told[-3000:]

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        return [r["train/dpo_loss"] for r in records if "train/dpo_loss" in r]

    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    one, two = (
        safetensors.numpy.load_file(tmp_path / name / "hf" / "step-2" / "model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        # Adam divides by what is nearly nothing: one step of 5e-5 is the most they can be apart.
        np.testing.assert_allclose(one[name], two[name], atol=5e-5)
        assert np.abs(one[name] - two[name]).mean() < 1e-7

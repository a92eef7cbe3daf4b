"""Eight simulated devices against one, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What tests/eight_devices.py measured: one record per mesh."""
    told = subprocess.run(
        [sys.executable, "tests/eight_devices.py", str(tmp_path_factory.mktemp("model"))],
        cwd=ROOT,
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return {record["mesh"]: record for record in map(json.loads, told.stdout.splitlines())}


MESHES = ["fsdp 8", "fsdp 4, tensor 2", "data 2, fsdp 4"]


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
def test_the_head_is_gathered_once_per_model_and_micro_batch(figures, mesh):
    """Once for the policy and once for the reference, in the compute dtype, outside of any loop."""
    assert figures[mesh]["head_gathers"] == 2
    assert figures[mesh]["head_gathers_in_loops"] == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_optimizer_state_is_split_as_the_weights(figures, mesh):
    assert figures[mesh]["optimizer_as_weights"]
    assert figures[mesh]["weights_per_device"] < 0.3

"""On which device the tests run, and how they are compiled."""

import os

import jax
import pytest

from tests.conftest import asks_for


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("pytest", False), ("pytest -m gpu -n0", True), ("pytest -mgpu", True),
        ("pytest tests/test_gpu.py", False), ("pytest -m full", False),
        (["pytest", "-m", "not full and not gpu"], False), (["pytest", "-m", "full or gpu"], True),
        ("pytest -k gpu", False), ("pytest -m full -m gpu", True),
    ],
)  # fmt: skip
def test_a_gpu_is_taken_by_those_who_ask(command, asked):
    assert asks_for("gpu", command.split() if isinstance(command, str) else command) == asked


def test_long_forms_are_known_by_their_mark():
    assert asks_for("full", ["pytest", "-m", "full"])
    assert not asks_for("full", ["pytest", "-m", "not full and not gpu"])


def test_the_tests_and_what_they_start_run_on_the_cpu():
    if os.environ["JAX_PLATFORMS"] != "cpu":
        pytest.skip("somebody asked for another")
    assert jax.default_backend() == "cpu"

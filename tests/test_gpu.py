"""What only a GPU can show, run on one with `python -m pytest -m gpu -n0`."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes import dpo
from tests.zoo.parts import test_grouped
from tests.zoo.test_attention import outcome, work
from zoo.parts import attention, tiles

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(
            "jax finds no GPU here: it needs one, pip install -e '.[cuda]', and JAX_PLATFORMS unset"
        )


SINKS = dict(sinks=jnp.linspace(-2.0, 3.0, 4))


@pytest.mark.parametrize("how", [{}, dict(window=20), dict(softcap=1.5), SINKS], ids=str)
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("backend", ["blocks", "triton", "tokamax", "tokamax_chunked", "cudnn"])
def test_backends_are_the_plain_products(backend, width, how):
    """In bfloat16, gradients too, against float32 without tf32."""
    if how.keys() & attention.CANNOT.get(backend, set()):
        pytest.skip(f"{backend} cannot do this, and says so")
    if backend.startswith("tokamax"):
        pytest.importorskip("tokamax")
    arrays, where, pull = work(256, 4, 2, width)
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    with jax.default_matmul_precision("highest"):
        wide = outcome("dense", [x.astype(jnp.float32) for x in narrow], where, pull, **how)
    found = outcome(backend, narrow, where, pull.astype(jnp.bfloat16), **how)
    for ours, theirs in zip(found, wide, strict=True):
        off = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs)).max()
        assert off <= 0.03 * np.abs(theirs).max()


def test_experts_by_kernels_are_the_loop(monkeypatch):
    """In bfloat16, against the loop in float32: outputs, and all gradients."""
    given = test_grouped.drawn(6, 256, 128)
    with jax.default_matmul_precision("highest"):
        wide = test_grouped.outcome(*given)
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, given
    )
    monkeypatch.setattr(tiles, "_tile_by_tile", None)  # the loop is not asked
    found = test_grouped.outcome(*narrow)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wide)), strict=True):
        off = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs)).max()
        assert off <= 0.05 * np.abs(theirs).max()


def test_logits_are_those_of_the_cpu(small_model):
    tokens = jnp.arange(80).reshape(2, 40) % 97
    with jax.default_matmul_precision("highest"):
        here = np.asarray(small_model(tokens))
        small = jax.device_put((small_model, tokens), jax.devices("cpu")[0])
        there = np.asarray(small[0](small[1]))
    np.testing.assert_allclose(here, there, atol=1e-4)


@pytest.mark.parametrize("mp", ["p=f32,c=f32", "p=f32,c=bf16"])
def test_the_tiny_run_learns(tiny_config, mp):
    """From ln 2, through the gates, with the attention that a GPU takes by itself."""
    tiny_config.mp, tiny_config.num_train_steps = mp, 20
    dpo.train(tiny_config)
    lines = (pathlib.Path(tiny_config.directory) / "metrics.jsonl").read_text().splitlines()
    losses = [r["train/dpo_loss"] for r in map(json.loads, lines) if "train/dpo_loss" in r]
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]

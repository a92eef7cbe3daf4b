"""The forecast: exact where it says so, and a sentence where it does not fit."""

import json

from flax import nnx
import jax
import numpy as np
import pytest

from checkpoints_io import hf_folder
from recipes import forecast
from recipes.configs import tiny
from recipes.training import absent, checks, collectives, forecasting
from recipes.training.chips import CHIPS
from tests.conftest import TINY, given_by
from tests.long_forms import full_but
from tests.zoo import twins
import zoo

TEXT = """
%body.1 (p: f32[8]) -> f32[8] {
  %gather.1 = bf16[1024,8]{1,0} all-gather(bf16[128,8]{1,0} %w), dimensions={0}
  %begun = (bf16[128,8]{1,0}, bf16[1024,8]{1,0}) all-gather-start(%w), dimensions={0}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = f32[8]{0} while(%p), condition=%cond.1, body=%body.1
  %met = ((f32[64], f32[8]), (f32[8], f32[1])) reduce-scatter-start(%a), replica_groups=[1,8]<=[8]
  %all = ((f32[64]{0}), f32[64]{0}) all-to-all-start(%a), dimensions={0}
  %part = f32[128,8]{1,0} reduce-scatter(%g), replica_groups=[1,8]<=[8], dimensions={0}
  %moved = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%g)
  %sum = (f32[16]{0}, f32[4]{0}) all-reduce(%a, %b), to_apply=%add
}
"""


def test_collectives_are_read():
    found = collectives.of(TEXT, loops=32)
    assert [(c.kind, c.bytes, c.times) for c in found] == [
        ("all-gather", 16384, 32),
        ("all-gather", 16384, 32),
        ("reduce-scatter", 288, 1),
        ("all-to-all", 256, 1),
        ("reduce-scatter", 32768, 1),
        ("collective-permute", 256, 1),
        ("all-reduce", 80, 1),
    ]


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("replica_groups={{0,4},{1,5}}, dimensions={0}", [[0, 4], [1, 5]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("%s = (f32[2]{0}, u32[], token[]) send(%a, %t), channel_id=2", []),
    ],
)
def test_groups_are_read(line, groups):
    assert collectives.groups(line) == groups


def test_what_is_sent_to_another_slice_is_counted_apart():
    sent = "%send.1 = (f32[48,8,128]{2,1,0}, u32[], token[]) send(%a, %token), channel_id=2"
    ended = "%send-done.1 = token[] send-done(%send.1), channel_id=2"
    told = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{sent}\n{ended}\n}}"
    assert [(c.kind, c.bytes) for c in collectives.of(told)] == [("send", 4 * 48 * 8 * 128)]


@pytest.fixture
def config():
    config = tiny.get_config()
    config.train_batch_size = 8
    return config


def forecast_of(config, **chip):
    chip = CHIPS["h100"]._replace(**chip)
    given = given_by(config)
    found = forecasting.forecast(
        forecast.job_of(given), hf_folder.read_config(TINY / "model"), chip, jax.devices()[:1], 100
    )
    less = checks.less_memory(given)
    return found, forecast.told(found, chip, 1000.0, less, exact=False)


def test_what_lives_through_an_update_is_exact(config):
    found, told = forecast_of(config)
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(zoo.load(TINY / "model"))))
    assert found.persistent["policy"] == found.persistent["gradient"] == 4 * weights
    assert found.persistent["optimizer"] == pytest.approx(8 * weights, abs=64)
    assert found.persistent["reference"] == 4 * weights
    # Four rows of 256 hold the 800 positions of an update: no more are computed at a time.
    assert found.micro_batches == pytest.approx(8 * 100 / (4 * 256))
    assert "does not fit" not in told


def test_a_reference_that_follows_is_kept_wide_beside_what_it_computes_with(config):
    config.reference_sync_steps = 5
    found, _ = forecast_of(config)
    assert found.persistent["reference"] == 2 * found.persistent["policy"]


def test_settings_have_an_effect(config):
    config.reference_mode = "cached"
    config.adam_mu_dtype = "bfloat16"
    found, _ = forecast_of(config)
    assert "reference" not in found.persistent
    assert found.persistent["optimizer"] == pytest.approx(1.5 * found.persistent["policy"], abs=64)


@pytest.mark.full
def test_what_does_not_fit_is_said(config):
    _, told = forecast_of(config, memory=1e6)
    assert "it does not fit" in told
    assert "--config.reference_mode=cached" in told
    assert "nf4" not in told
    config.adapter = dict(rank=4)  # its reference takes no memory, and its weights could take less
    _, told = forecast_of(config, memory=1e6)
    assert "--config.frozen=nf4" in told
    assert "reference_mode" not in told


def test_flops_are_those_of_the_parameters(config):
    config.remat = "full"
    found, _ = forecast_of(config)
    assert np.isfinite(found.seconds).all()
    config.reference_mode = "cached"
    cached, _ = forecast_of(config)
    assert cached.flops == pytest.approx(found.flops * 8 / 10)
    # Of a layer's matrices all are multiplied again but the MLP's last; the head is not.
    sizes = json.loads((TINY / "model" / "config.json").read_text())
    D, F = sizes["hidden_size"], sizes["intermediate_size"]
    L, V = sizes["num_hidden_layers"], sizes["vocab_size"]
    width = sizes["head_dim"] * (
        2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]
    )
    again, all_of = L * D * (width + 2 * F), L * D * (width + 3 * F) + V * D + (2 * L + 1) * D
    config.remat = "products"
    kept, _ = forecast_of(config)
    assert kept.flops / cached.flops == pytest.approx(1 - 2 * again / (8 * all_of), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "share"),
    full_but(
        [("gemma4_text", 2 / 6), ("qwen3_5_moe_text", 3 / 7), ("gpt_oss", 2 / 6), ("llama", 1.0)],
        ("gpt_oss", 2 / 6),
        ("llama", 1.0),
    ),
)
def test_of_its_experts_a_token_meets_those_it_goes_to(family, share):
    pytest.importorskip("transformers")
    model = twins.untrained(family, twins.RICHEST[family])
    flat = [(param.axes.split(), param.size) for _, param in nnx.to_flat_state(nnx.state(model))]
    experts = sum(size for axes, size in flat if {"E", "F"} <= {*axes})
    whole = sum(size for _, size in flat)
    if not model.config.tie_word_embeddings:  # looked up
        whole -= model.embedding.size
    assert forecasting.met_by_a_token(model) == pytest.approx(whole - (1 - share) * experts, abs=1)


# Widths that fill a TPU's lanes, so that nothing is padded.
WIDE = dict(
    model_type="llama", vocab_size=1024, hidden_size=512, intermediate_size=1024,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
    rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.full
def test_two_slices_of_tpus_exchange_the_gradient_once_an_update(config):
    """By the TPU compiler: no layer and no micro-batch waits for the other slice."""
    pytest.importorskip("libtpu")
    config.mesh.data, config.mesh.fsdp, config.mp = 2, 4, "p=f32,c=bfloat16"
    config.train_batch_size, config.train_seq_len = 256, 512
    chip, job = CHIPS["v5p"], forecast.job_of(given_by(config))
    found = forecasting.forecast(job, WIDE, chip, absent.tpus("v5p", 4, 2), 300)
    of = lambda name: sum(one.bytes * one.times for who, one in found.between if who == name)
    told = forecast.told(found, chip, 1000.0, [], exact=True)
    print(told)
    gradient = found.persistent["gradient"]
    assert gradient <= of("apply") <= 1.1 * gradient
    assert of("add") <= 4 * 3 * 2 * 256 * 2  # log-probabilities, and what is rounded up
    assert not any(one.in_loop for _, one in found.between)
    assert "none of its " in told


@pytest.mark.full
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_a_gpu_that_is_not_here_takes_what_its_compiler_says(model_type, config):
    """With our kernels: nothing of a row's length squared, and the optimizer works in place."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    experts = dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=128)
    hf_config = WIDE | dict(model_type=model_type, **(experts if model_type == "gpt_oss" else {}))
    chip = CHIPS["rtx4090"]
    gpus = absent.gpus(chip.gpu, chip.memory, chip.memory_bytes, 1)
    config.mp, config.train_batch_size, config.remat = "p=f32,c=bfloat16", 64, "full"
    temporary = {}
    for length in (512, 2048):
        config.train_seq_len, config.row_length = 512, length
        config.per_device_parallelism = 8192 // length
        job = forecast.job_of(given_by(config))
        found = forecasting.forecast(job, hf_config, chip, gpus, 300)
        temporary[length] = found.temporary["add"]
        assert found.temporary["apply"] < 2**20
    assert temporary[2048] < 1.05 * temporary[512]


MORE = {
    "qwen3_moe": dict(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
    ),
    "qwen3_5_text": dict(
        linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4,
        rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25),
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "qwen3_5_text"])
def test_what_is_kept_fits_by_the_compiler(model_type, config):
    """What is counted from shapes is enough, and most of the memory is used where it is scarce."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    hf_config = WIDE | dict(model_type=model_type, num_hidden_layers=16, vocab_size=4096)
    hf_config |= MORE.get(model_type, {}) | dict(max_position_embeddings=2048)
    config.mp, config.train_batch_size = "p=f32,c=bfloat16", 64
    config.train_seq_len, config.row_length, config.per_device_parallelism = 2048, 2048, 4
    share, said = [], []
    for memory in (2.2e9, 3e9, 6e9) if model_type != "qwen3_5_text" else (3e9, 4e9, 6e9):
        chip = CHIPS["h100"]._replace(memory=memory)
        gpus = absent.gpus(chip.gpu, chip.memory, chip.memory_bytes, 1)
        found = forecasting.forecast(forecast.job_of(given_by(config)), hf_config, chip, gpus, 300)
        share.append(found.peak / memory)
        said.append(found.remat)
    assert max(share) < 0.95 and share[0] > 0.75
    assert "products of all layers" in said[-1] != said[0]

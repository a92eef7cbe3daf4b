"""Every backend that runs here against the dense one, on the same key ranges."""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data.packed import stripes
from tests import in_float64
from tests.conftest import large_weights, small_config
from tests.long_forms import full_but
from zoo import llama
from zoo.parts import attention, attention_kernels, attention_triton, sharding, spans


def work(T, N, K, H, U=None, seed=0):
    """Rows of packed pairs with their prompts once, and padding at the end."""
    draw = np.random.default_rng(seed)
    B, U = 2, U or H
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, U), (B, T, N, U)]
    q, k, v, pull = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in shapes)
    first = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    last, positions = first + 1, np.zeros_like(first)
    for b in range(B):
        t = 0
        while True:
            c, p, r = draw.integers(1, T // 5, 3)
            if t + c + p + r > T:
                break
            at = slice(t, t + c + p + r)
            first[b, at] = t + np.concatenate([np.arange(c), np.full(p + r, c)])
            last[b, at] = t + np.concatenate(
                [np.full(c, c + p), c + np.arange(p) + 1, c + p + np.arange(r) + 1]
            )
            positions[b, at] = np.concatenate(
                [p + np.arange(c)[::-1], np.arange(p), p + np.arange(r)]
            )
            t = at.stop
    where = spans.Spans(*map(jnp.asarray, (positions, first, last, np.full_like(first, T))))
    return (q, k, v), where, pull


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels of GPUs and TPUs run here, too, slowly, and in float32."""
    kernels = {"splash": attention_kernels.splash, "triton": attention_triton.attend}
    for name, kernel in kernels.items():
        monkeypatch.setitem(attention.BACKENDS, name, functools.partial(kernel, interpret=True))
    monkeypatch.setitem(attention.CANNOT, "triton", set())


def outcome(backend, arrays, where, pull, **how):
    attend = functools.partial(attention.attend, where=where, scale=0.3, backend=backend, **how)
    pulled = lambda *arrays: (attend(*arrays) * pull).sum()
    return jax.jit(attend)(*arrays), *jax.jit(jax.grad(pulled, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "U"),
    full_but(
        [(256, 4, 2, 16, 16), (130, 6, 2, 8, 8), (64, 3, 3, 32, 24), (40, 4, 1, 8, 12)],
        (130, 6, 2, 8, 8),
        (40, 4, 1, 8, 12),
    ),
)
@pytest.mark.parametrize("backend", ["blocks", "tokamax_chunked", "splash", "triton"])
def test_backends_are_the_dense_one(backend, T, N, K, H, U, anywhere):
    """Values as wide as keys, narrower and wider."""
    if backend == "tokamax_chunked":
        pytest.importorskip("tokamax")
    given = work(T, N, K, H, U)
    for ours, theirs in zip(outcome(backend, *given), outcome("dense", *given), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


HOW = [dict(window=20), dict(window=1), dict(softcap=1.5), dict(window=50, softcap=0.7),
       dict(window=1, chunk=9)]  # fmt: skip


@pytest.mark.parametrize(
    "how",
    full_but(HOW, HOW[3]),
    ids=str,
)
@pytest.mark.parametrize("backend", ["blocks", "tokamax_chunked", "splash", "triton"])
def test_windows_and_soft_caps_are_the_dense_ones(backend, how, anywhere):
    """In rows with prompts once, where a window is not one run of keys."""
    if backend == "tokamax_chunked":
        pytest.importorskip("tokamax")
    given = work(256, 4, 2, 16)
    expected = outcome("dense", *given, **how)
    for ours, theirs in zip(outcome(backend, *given, **how), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    plain = outcome("dense", *given)[0]
    assert jnp.abs(expected[0] - plain).max() > 0.1


@pytest.mark.parametrize("backend", ["dense", "blocks", "splash", "triton"])
def test_scores_are_in_float32_whatever_is_scored(backend, anywhere):
    """256 and 256.75, which in bfloat16 are one number."""
    q = jnp.ones((1, 256, 1, 8), jnp.bfloat16).at[..., 0].set(16).at[..., 2:].set(0)
    k = q.at[:, 0, :, 1].set(0.0).at[:, 1, :, 1].set(0.75)
    v = jnp.zeros_like(q).at[:, 1].set(1)
    found = attention.attend(q, k, v, spans.causal(1, 256), scale=1.0, backend=backend)
    np.testing.assert_allclose(found[0, 1], jax.nn.sigmoid(0.75), rtol=4e-3)


def test_in_bfloat16_gradients_are_of_the_types_of_what_they_are_of(anywhere):
    arrays, where, pull = work(130, 6, 2, 8)
    arrays, pull = [[x.astype(jnp.bfloat16) for x in given] for given in (arrays, [pull])]
    sinks = jnp.linspace(-2.0, 3.0, 6).astype(jnp.bfloat16)

    def gradient(backend):
        pulled = lambda sinks, *arrays: (
            attention.attend(*arrays, where, scale=0.3, backend=backend, sinks=sinks) * pull[0]
        ).sum()
        return jax.jit(jax.grad(pulled, argnums=(0, 1, 2, 3)))(sinks, *arrays)

    for ours, theirs in zip(gradient("triton"), gradient("dense"), strict=True):
        assert ours.dtype == theirs.dtype == jnp.bfloat16
        off = jnp.abs(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).max()
        assert off <= 0.03 * jnp.abs(theirs).max()


def test_a_chunk_by_hand():
    """Seven tokens in chunks of three: each gathers the mean of its chunk up to itself."""
    T = 7
    q = k = jnp.zeros((1, T, 1, 2))
    v = jnp.arange(1.0, T + 1).reshape(1, T, 1, 1)
    found = attention.attend(q, k, v, spans.causal(1, T), scale=1.0, window=1, chunk=3)
    np.testing.assert_allclose(found.ravel(), [1, 1.5, 2, 4, 4.5, 5, 7], rtol=1e-6)


@pytest.mark.parametrize("how", [{}, dict(window=20, softcap=1.5)], ids=str)
@pytest.mark.parametrize("backend", ["blocks", "triton"])
def test_sinks_are_the_dense_ones_gradients_included(backend, how, anywhere):
    arrays, where, pull = work(130, 6, 2, 8)
    sinks = jnp.linspace(-2.0, 3.0, 6)

    def gradient(backend):
        pulled = lambda sinks, *arrays: (
            attention.attend(*arrays, where, scale=0.3, backend=backend, sinks=sinks, **how) * pull
        ).sum()
        return jax.jit(jax.value_and_grad(pulled, argnums=(0, 1, 2, 3)))(sinks, *arrays)

    (expected, of_dense), (found, of_ours) = gradient("dense"), gradient(backend)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(of_ours, of_dense, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert jnp.abs(of_dense[0]).max() > 0.1


@pytest.mark.parametrize("backend", ["blocks", "tokamax_chunked", "splash", "triton"])
def test_a_part_of_a_row_sees_keys_of_all_of_it(backend, anywhere):
    """As where several devices share a row: fewer queries than keys, in a window."""
    if backend == "tokamax_chunked":
        pytest.importorskip("tokamax")
    arrays, where, _ = work(256, 4, 2, 16)
    compared(backend, arrays, where, slice(128, 256), None)


@pytest.mark.parametrize("window", full_but([None, 60], 60))
def test_a_long_row_has_the_mask_of_a_part_at_a_time(window, anywhere, monkeypatch):
    """Of a TPU's kernel: that of all of it grows with the square of its length."""
    arrays, where, pull = work(384, 2, 1, 16)
    expected = outcome("dense", arrays, where, pull, window=window)
    for mask, count in ((384 * 384, 1), (384 * 384 - 1, 3), (1, 3)):
        monkeypatch.setattr(attention_kernels, "MASK", mask)
        assert attention_kernels._parts(384, 384, 128) == count
    found = outcome("splash", arrays, where, pull, window=window)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("backend", ["blocks", "triton"])
def test_a_part_that_is_no_tile_sees_keys_of_all_of_its_row(backend, anywhere):
    arrays, where, _ = work(130, 6, 2, 8)
    compared(backend, arrays, where, slice(26, 52), jnp.linspace(-2.0, 3.0, 6))


@pytest.mark.parametrize("backend", full_but(["dense", "blocks", "splash", "triton"], "blocks"))
def test_stripes_of_a_row_may_be_stored_in_any_order(backend, anywhere):
    """As where devices share a row, which is one here: with its keys, windows and gradients."""
    arrays, where, pull = work(256, 4, 2, 16)
    order = np.array([[2, 0, 3, 1], [3, 1, 0, 2]])
    stored = lambda x: jnp.asarray(stripes.stored(np.asarray(x), order))
    striped = spans.Spans(*map(stored, where[:4]), jnp.asarray(order))
    wide = lambda x: jnp.stack([stored(x[..., n, h]) for n, h in np.ndindex(x.shape[2:])], -1)
    as_stored = lambda x: wide(x).reshape(x.shape)
    with jax.set_mesh(sharding.mesh_of(1, 1, 1, devices=jax.devices()[:1])):
        expected = outcome(backend, arrays, where, pull, window=60)
        given = [as_stored(x) for x in arrays]
        found = outcome(backend, given, striped, as_stored(pull), window=60)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, as_stored(theirs), atol=2e-5)
        assert jnp.abs(ours - theirs).max() > 0.1


def compared(backend, arrays, where, at, sinks):
    q, k, v = arrays
    looking = spans.Window(jnp.asarray(20), where.positions, where.positions)
    run = lambda backend, q, *more: attention.BACKENDS[backend](
        q, k, v, *more, sinks, scale=0.3, softcap=1.5
    )
    whole = run("dense", q, where.first, where.last, looking)
    own = looking._replace(queries=where.positions[:, at])
    part = run(backend, q[:, at], where.first[:, at], where.last[:, at], own)
    np.testing.assert_allclose(part, whole[:, at], atol=2e-5)


def test_what_a_kernel_cannot_do_is_said_or_done_by_blocks(monkeypatch):
    arrays, where, _ = work(64, 4, 2, 8)
    sinks = jnp.ones(4)
    with pytest.raises(ValueError, match=r"tokamax cannot do sinks.*use attention=blocks"):
        attention.attend(*arrays, where, scale=0.3, backend="tokamax", sinks=sinks)
    with pytest.raises(ValueError, match="cudnn cannot do float32 and sinks and softcap"):
        attention.attend(*arrays, where, scale=1.0, backend="cudnn", sinks=sinks, softcap=2.0)
    monkeypatch.setitem(attention.BY_PLATFORM, "cpu", "tokamax")
    found = attention.attend(*arrays, where, scale=0.3, sinks=sinks)
    expected = attention.attend(*arrays, where, scale=0.3, sinks=sinks, backend="dense")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_key_too_many_would_be_seen():
    arrays, where, pull = work(256, 4, 2, 16)
    wider = where._replace(last=jnp.minimum(where.last + 1, 256))
    right, wrong = (outcome("blocks", arrays, k, pull)[0] for k in (where, wider))
    assert jnp.abs(right - wrong).max() > 0.1


@pytest.mark.parametrize("backend", ["blocks", "triton"])
def test_tiles_that_nobody_sees_are_not_computed(backend, anywhere):
    """What stands outside of every range may be anything, even not a number."""
    (q, k, v), where, _ = work(256, 4, 2, 16)
    ends = jnp.full((2, 256), 64, jnp.int32)
    where = where._replace(first=jnp.zeros_like(ends), last=ends)
    spoilt = v.at[:, 64:].set(jnp.nan)
    assert jnp.isfinite(attention.attend(q, k, spoilt, where, scale=0.3, backend=backend)).all()


def test_memory_grows_with_the_row_and_not_with_its_square():
    def temporary(T, backend):
        arrays, where, pull = work(T, 4, 2, 16)
        pulled = lambda *a: (attention.attend(*a, where, scale=0.3, backend=backend) * pull).sum()
        compiled = jax.jit(jax.grad(pulled, argnums=(0, 1, 2))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2048, "blocks") < 2.5 * temporary(1024, "blocks")
    assert temporary(2048, "blocks") < temporary(2048, "dense") / 8


def gradient_keeping(remat):
    model = large_weights(llama.Model(small_config(), nnx.Rngs(0)))
    tokens = jnp.arange(80).reshape(2, 40) % 97
    model.remat = remat
    graph, state = nnx.split(model)
    summed = lambda state: jax.nn.log_softmax(nnx.merge(graph, state)(tokens))[..., 3].sum()
    return jax.tree.leaves(jax.jit(jax.grad(summed))(state))


def test_what_is_kept_for_the_way_back_does_not_change_the_numbers():
    gradients = map(gradient_keeping, ("attention", "full"))
    for ours, full in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, full, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_whatever_is_kept_for_the_way_back_does_not_change_the_numbers():
    found = json.loads(in_float64.ran("zoo.kept_in_float64"))
    assert found.keys() == {"attention", "products", "none"}
    assert max(found.values()) <= 1e-12


def test_an_absent_backend_is_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokamax._src.ops.attention.api", None)
    (q, k, v), where, _ = work(64, 4, 2, 8)
    with pytest.raises(ValueError, match=r"pip install 'nnx-zoo\[tokamax\]'"):
        attention.attend(q, k, v, where, scale=0.3, backend="tokamax")

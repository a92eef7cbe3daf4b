"""Log-probabilities of scored tokens, a chunk at a time, against all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.parts import last_step
from zoo.parts import token_logps as token_logps_file
from zoo.parts.last_step import LastStep
from zoo.parts.token_logps import token_logps, with_beside


@pytest.mark.parametrize("last", [LastStep(), LastStep(softcap=3.0), LastStep(0.5, 2.0)])
def test_values_and_gradients_are_those_of_whole_logits(monkeypatch, last):
    """Two lists of twelve places, of which five and twelve count; chunks of four."""
    monkeypatch.setattr("zoo.parts.token_logps.LOGITS_BYTES", {"cpu": 2 * 4 * 11 * 4})
    monkeypatch.setattr("zoo.parts.token_logps.FEWEST", 1)
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.standard_normal((2, 12, 6)), jnp.float32)
    head = jnp.asarray(draw.standard_normal((11, 6)), jnp.float32)
    target = jnp.asarray(draw.integers(0, 11, (2, 12)), jnp.int32)
    scores = jnp.array([5, 12], jnp.int32)
    # Places that do not count are nobody's, and weigh nothing.
    weights = jnp.asarray(draw.standard_normal((2, 12)) * (np.arange(12) < [[5], [12]]))

    def chunked(hidden, head):
        logps = token_logps(hidden, head, target, scores, jnp.float32, last)
        return (logps * weights).sum(), logps

    def whole(hidden, head):
        logits = last_step.capped(last.scale * (hidden @ head.T), last.softcap)
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1)[..., 0]
        return (each * weights).sum(), each

    def with_more(hidden, head):
        logps, beside = with_beside(hidden, head, target, scores, jnp.float32, last)
        return (logps * weights).sum() + beside.log_p2.sum(), (logps, beside)

    gradients, found = jax.grad(chunked, (0, 1), has_aux=True)(hidden, head)
    expected, each = jax.grad(whole, (0, 1), has_aux=True)(hidden, head)
    counted = np.arange(12) < np.array([[5], [12]])
    np.testing.assert_allclose(found[counted], each[counted], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    same, (logps, beside) = jax.grad(with_more, (0, 1), has_aux=True)(hidden, head)
    np.testing.assert_array_equal(logps, found)
    for ours, theirs in zip(same, gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    shares = jax.nn.softmax(last_step.capped(last.scale * (hidden @ head.T), last.softcap))
    log_p2 = jnp.log((shares * shares).sum(-1))
    np.testing.assert_allclose(beside.log_p2[counted], log_p2[counted], rtol=1e-5)
    best = shares.argmax(-1) == target
    np.testing.assert_array_equal(beside.is_best[counted], best[counted])


def test_a_chunk_has_so_many_bytes_or_so_many_tokens():
    """64 MiB of 32,000 logits are 524 tokens; of 150,000 they would be 111."""
    of = lambda vocabulary, C: token_logps_file._chunk(
        jnp.zeros((1, C, 2)), jnp.zeros((vocabulary, 2))
    )
    assert [of(32_000, C) for C in (512, 1024, 1572)] == [512, 512, 524]
    assert [of(150_000, C) for C in (64, 1024, 750)] == [64, 256, 250]

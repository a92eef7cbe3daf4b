"""Recurrences over packed rows: each token goes on from the one before it on its path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data.ids.examples import PairIds
from recipes.data.packed import streams
from zoo.parts import chunks, convolution, delta_rule, mamba2, paths, spans

# Of each pair of a row: tokens of its prompt, and what is stored of its two answers.
ROWS = [
    [(5, 3, 9), (70, 40, 33), (1, 1, 1), (2, 2, 60)],
    [(130, 64, 30)],
    [(64, 64, 64), (1, 20, 0), (1, 0, 0), (2, 0, 3), (3, 1, 2)],
]
T = 250


def packed(rows, T):
    """Spans of rows of pairs with their prompt once, and the path to every stored token."""
    found, truth = [], []
    for row in rows:
        said, past = [], []
        for p, first, second in row:
            ids = [np.arange(n) for n in (p, first + 1, second + 1)]
            pair = PairIds(0, *ids, np.ones(first + 1, bool), np.ones(second + 1, bool))
            stream, begin = streams.prompt_once(pair), len(said)
            for t, place in enumerate(stream.positions):
                seen = np.arange(stream.first[t], stream.last[t])
                past.append((begin + seen[np.argsort(stream.positions[seen])]).tolist())
                said.append((place, begin + stream.first[t], begin + stream.last[t], stream.length))
        for t in range(len(said), T):  # padding
            said.append((0, t, t + 1, 1))
            past.append([t])
        found.append(said)
        truth.append(past)
    return spans.Spans(*jnp.moveaxis(jnp.array(found, jnp.int32), 2, 0)), truth


def test_a_row_by_hand():
    """The one in the head of paths.py, and a text of two tokens after it."""
    where = spans.Spans(
        positions=jnp.array([[3, 2, 0, 1, 2, 3, 0, 1]]),
        first=jnp.array([[0, 1, 2, 2, 2, 2, 6, 6]]),
        last=jnp.array([[4, 4, 3, 4, 5, 6, 7, 8]]),
        lengths=jnp.array([[5] * 6 + [2] * 2]),
    )  # fmt: skip
    path = paths.of(where)
    stored = np.array([list("yxabuvmn")])
    assert "".join(stored[0][path.order[0]]) == "abxyuvmn"
    assert path.root.tolist() == [[0] * 6 + [6, 6]]
    assert path.second.tolist() == [[4] * 6 + [8, 8]]
    start, end = path.runs()
    assert start.tolist() == [[0, 0, 0, 0, 4, 4, 6, 6]]
    assert end.tolist() == [[-1, -1, -1, -1, 1, 1, 5, 5]]
    before = paths.back(jnp.array([[*map(float, range(1, 9))]]), path, 2)  # a is 1, b is 2
    assert before.tolist() == [[0, 0, 1, 2, 1, 2, 0, 0]]


def test_paths_are_what_tokens_see():
    draw = np.random.default_rng(0)
    rows = [[tuple(draw.integers([1, 0, 0], 8)) for _ in range(4)] for _ in range(40)]
    where, truth = packed([*rows, *ROWS], T)
    path = jax.tree.map(np.asarray, paths.of(where))
    start, end = path.runs()
    for row, past in enumerate(truth):
        np.testing.assert_array_equal(path.order[row][path.time[row]], np.arange(T))
        for t in range(T):
            i = path.time[row, t]
            places = [*range(path.root[row, i], end[row, i] + 1), *range(start[row, i], i + 1)]
            assert path.order[row, places].tolist() == past[t]


def test_moving_in_time_and_back():
    """Values, and gradients: each is that of plain lookups."""
    where, truth = packed(ROWS, T)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((len(ROWS), T, 3)), jnp.float32)
    path = paths.of(where)
    np.testing.assert_array_equal(paths.stored(paths.in_time(x, path), path), x)
    weights = jnp.arange(1.0, T + 1)[:, None]

    def summed(x, by):
        return (paths.stored(paths.back(paths.in_time(x, path), path, by), path) * weights).sum()

    for by in (1, 2, 3):
        found = paths.stored(paths.back(paths.in_time(x, path), path, by), path)
        wanted, gradient = np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
        for row, past in enumerate(truth):
            for t in range(T):
                if len(past[t]) > by:
                    wanted[row, t] = x[row, past[t][-1 - by]]
                    gradient[row, past[t][-1 - by]] += weights[t]
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(jax.grad(summed)(x, by), gradient)


N, H, U = 2, 8, 6
RULES = pytest.mark.parametrize("rule", [delta_rule, mamba2])


def inputs(rule, rows, T, dtype=np.float32):
    """Queries, keys, values, decays, betas; to Mamba all heads have queries and keys in common."""
    draw = np.random.default_rng(0)
    normal = lambda *more: draw.standard_normal((rows, T, N, *more))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(H), normal(H)))
    decay, beta = -draw.uniform(0.001, 0.5, (rows, T, N)), draw.uniform(0, 1, (rows, T, N))
    given = [q, k, normal(U), decay, beta]
    if rule is mamba2:
        given = [q[:, :, :1], k[:, :, :1], *given[2:4]]
    return tuple(x.astype(dtype) for x in given)


def token_by_token(truth, q, k, v, decay, beta=None):
    """What the rules mean, in float64."""
    found, scale = np.zeros((len(truth), T, N, U)), 1 if beta is None else H**-0.5
    for row, past in enumerate(truth):
        states = {}
        for t in sorted(range(T), key=lambda t: len(past[t])):
            state = states[past[t][-2]] if len(past[t]) > 1 else np.zeros((N, H, U))
            state = state * np.exp(decay[row, t])[:, None, None]
            new = v[row, t]
            if beta is not None:
                held = np.einsum("NHU,NH->NU", state, k[row, t])
                new = beta[row, t, :, None] * (new - held)
            states[t] = state + k[row, t, :, :, None] * new[:, None]
            found[row, t] = (states[t] * q[row, t, :, :, None]).sum(1) * scale
    return found


@RULES
def test_chunks_are_token_by_token(rule):
    where, truth = packed(ROWS, T)
    given = inputs(rule, len(ROWS), T, np.float64)
    wanted = token_by_token(truth, *given)
    found, _ = jax.jit(rule.whole)(where, *(x.astype(np.float32) for x in given))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@RULES
def test_the_gradient_of_chunks_is_that_of_steps(rule):
    """One text through `step`, which jax differentiates as it stands."""
    given = inputs(rule, 1, 150)
    pull = np.random.default_rng(1).standard_normal((1, 150, N, U)).astype(np.float32)

    def stepped(*given):
        one = lambda state, now: rule.step(state, *(x[:, None] for x in now))[::-1]
        now = tuple(jnp.moveaxis(x, 1, 0) for x in given)
        _, out = jax.lax.scan(one, jnp.zeros((1, N, H, U)), now)
        return (jnp.moveaxis(out[:, :, 0], 0, 1) * pull).sum()

    chunked = lambda *given: (rule.whole(spans.causal(1, 150), *given)[0] * pull).sum()
    every = tuple(range(len(given)))
    wanted = jax.jit(jax.grad(stepped, every))(*given)
    for one, other in zip(jax.jit(jax.grad(chunked, every))(*given), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@RULES
def test_the_state_at_the_end_of_a_text(rule):
    """Rows of two lengths: what stands after a text changes nothing, and steps go on from there."""
    given, lengths = tuple(map(jnp.asarray, inputs(rule, 2, 100))), jnp.array([37, 100])
    out, state = jax.jit(rule.whole)(spans.causal(2, 100, lengths), *given)
    stepped, step = jnp.zeros((2, N, H, U)), jax.jit(rule.step)
    for t in range(100):
        one, stepped = step(stepped, *(x[:, t : t + 1] for x in given))
        np.testing.assert_allclose(one[1, 0], out[1, t], atol=1e-5)
        if t == 36:
            np.testing.assert_allclose(stepped[0], state[0], atol=1e-5)
    np.testing.assert_allclose(stepped[1], state[1], atol=1e-5)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9, 1.0])
def test_an_inverse_where_keys_repeat(alike):
    """Equal keys, no decay: the hard case."""
    draw = np.random.default_rng(0)
    keys = alike * draw.standard_normal(16) + (1 - alike) * draw.standard_normal((64, 16))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    below = np.tril(keys @ keys.T, -1)
    found = chunks.inverse(jnp.asarray(below, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(64) + below), atol=1e-5)


def test_a_convolution_is_of_the_tokens_before():
    where, truth = packed(ROWS, T)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((len(ROWS), T, 5)).astype(np.float32)
    taps = draw.standard_normal((5, 4)).astype(np.float32)
    bias = draw.standard_normal(5).astype(np.float32)
    wanted = np.zeros(x.shape)
    for row, past in enumerate(truth):
        for t in range(T):
            for by, place in enumerate(past[t][::-1][:4]):
                wanted[row, t] += x[row, place] * taps[:, 3 - by]
    found, _ = jax.jit(convolution.whole)(where, x, taps)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    found, _ = jax.jit(convolution.whole)(where, x, taps, bias)
    np.testing.assert_allclose(found, wanted + bias, atol=1e-5)


def test_a_convolution_goes_on():
    """A text of two tokens, shorter than the taps, and one of nine."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((2, 10, 5)), jnp.float32)
    taps = jnp.asarray(draw.standard_normal((5, 4)), jnp.float32)
    _, state = convolution.whole(spans.causal(2, 10, jnp.array([2, 9])), x, taps)
    begun = [np.pad(x[row, :n], [(4 - min(n, 4), 0), (0, 0)])[-4:] for row, n in ((0, 2), (1, 9))]
    np.testing.assert_array_equal(state, begun)
    bias = jnp.arange(5.0)
    whole, _ = convolution.whole(spans.causal(2, 10), x, taps, bias)
    more = jnp.stack([x[0, 2:3], x[1, 9:10]])
    found, _ = convolution.step(state, more, taps, bias)
    np.testing.assert_allclose(found[:, 0], [whole[0, 2], whole[1, 9]], atol=1e-6)

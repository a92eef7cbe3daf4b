"""One more token of each answer: what attention over the whole text gives it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.parts import attention, attention_decoding, spans

N, K, H, U = 6, 2, 8, 12  # heads of queries and of keys, their width and that of values
LENGTHS = [9, 4]  # of prompts, in 12 places
MOST = 16  # tokens of a prompt with an answer
NEW = [[1, 6, 3], [1, 7, 2]]  # tokens of three answers to each, in 8 places

HOW = [{}, dict(window=5), dict(window=1, chunk=4), dict(window=11, softcap=0.7)]


@pytest.mark.parametrize("sinks", [None, jnp.linspace(-2.0, 3.0, N)], ids=["", "sinks"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_answers_of_unlike_lengths_share_the_keys_of_their_prompt(how, sinks):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)
    q = normal(6, 1, N, H)
    # What is beyond the end of a prompt or an answer is there, too, and nobody may see it.
    prompts, answers = [(normal(n, S, K, H), normal(n, S, K, U)) for n, S in ((2, 12), (6, 8))]
    ends = np.repeat(LENGTHS, 3) + np.ravel(NEW)
    attend = functools.partial(attention_decoding.attend, scale=0.3, sinks=sinks, **how)
    found = jax.jit(attend)(q, prompts, answers, jnp.array(LENGTHS), jnp.asarray(ends - 1))
    dense = functools.partial(attention.attend, scale=0.3, backend="dense", sinks=sinks, **how)
    dense = jax.jit(dense)
    for row, (T, new) in enumerate(zip(ends.tolist(), np.ravel(NEW).tolist(), strict=True)):
        k, v = (
            jnp.concatenate([shared[row // 3, : T - new], own[row, :new]])[None]
            for shared, own in zip(prompts, answers, strict=True)
        )
        # What follows the token is not seen: every text goes through one program.
        queries = jnp.zeros((1, MOST, N, H)).at[:, T - 1].set(q[row])
        k, v = (jnp.pad(x, ((0, 0), (0, MOST - T), (0, 0), (0, 0))) for x in (k, v))
        whole = dense(queries, k, v, spans.causal(1, MOST))
        np.testing.assert_allclose(found[row, 0], whole[0, T - 1], atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 2])
def test_scores_are_in_float32_whatever_is_scored(prompt):
    """256 and 256.75, which in bfloat16 are one number: of prompts, and of answers."""
    q = jnp.zeros((1, 2, 1, 8), jnp.bfloat16).at[..., 0].set(16).at[..., 1].set(1)
    k = q.at[:, 0, :, 1].set(0.0).at[:, 1, :, 1].set(0.75)
    v = jnp.zeros_like(q).at[:, 1].set(1)
    k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
    found = attention_decoding.attend(
        q[:, 1:], (k[:, :prompt], v[:, :prompt]), (k[:, prompt:], v[:, prompt:]),
        jnp.array([prompt]), jnp.array([1]), scale=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(found[0, 0], jax.nn.sigmoid(0.75), rtol=4e-3)

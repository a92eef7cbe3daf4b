"""Greedy generation. Each new token reads the whole text again: simple, and fast enough to look."""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

import zoo
from zoo import attention


def greedy(
    model: zoo.Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and with the first of `stop_ids`.

    Raises:
      ValueError: a prompt is empty, or holds an id that the model has no embedding for.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError("a prompt to continue needs at least one token")
    if (top := max(map(max, prompts))) >= model.config.vocab_size:
        raise ValueError(f"token id {top} is beyond the model's {model.config.vocab_size} ids")
    room = -(-(int(lengths.max()) + max_new_tokens) // 64) * 64  # few lengths, few compilations
    tokens = np.zeros((len(prompts), room), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    graph, state = nnx.split(model)
    stops = tuple(stop_ids)
    tokens, ends = _continue(graph, stops, state, tokens, lengths, lengths + max_new_tokens)
    texts = zip(np.asarray(tokens), lengths, np.asarray(ends), strict=True)
    return [row[start:end].tolist() for row, start, end in texts]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(
    graph: nnx.GraphDef,
    stops: tuple[int, ...],
    state: nnx.State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    limits: Int[Array, " B"],
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """The tokens with their continuations, and where each row ends."""
    model = nnx.merge(graph, state)
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    keys, rows = attention.causal(B, T), jnp.arange(B)

    def going(carry: tuple) -> Array:
        return ~carry[2].all()

    def step(carry: tuple) -> tuple:
        tokens, ends, done = carry
        hidden = model.hidden(tokens, positions, keys)[rows, ends - 1]
        best = model.unembed(hidden[:, None])[:, 0].argmax(-1).astype(tokens.dtype)
        tokens = jnp.where(done[:, None], tokens, tokens.at[rows, ends].set(best))
        ends = jnp.where(done, ends, ends + 1)
        done |= (ends >= limits) | jnp.isin(best, jnp.array(stops, jnp.int32))
        return tokens, ends, done

    start = (tokens, lengths, jnp.zeros(B, bool))
    tokens, ends, _ = jax.lax.while_loop(going, step, start)
    return tokens, ends

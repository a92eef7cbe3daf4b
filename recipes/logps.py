"""Packed rows -> the log-probability of every answer."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from recipes import head
from recipes.data import batches
from recipes.data.batches import Place
from recipes.data.packing import Packed
from recipes.data.tokens import PairIds
import zoo
from zoo import sharding, spans, stack

# A model's forward pass: micro-batch -> log-probabilities [P, A], in nats.
Forward = Callable[[Packed], Float[Array, "P A"]]


def answer_logps(
    model: zoo.Model, batch: Packed, so_far: stack.Weights | None = None
) -> Float[Array, "P A"]:
    """Log-probability of each answer given its prompt, summed over its scored tokens, in nats.

    Slots whose pair is not in this micro-batch hold 0. `so_far` as in `stack.run`.
    """
    where = spans.Spans(batch.positions, batch.first, batch.last, batch.lengths)
    hidden = model.hidden(batch.tokens, where, functools.partial(stack.run, so_far=so_far))
    # The rows of a device are one list of tokens; no hidden state moves between devices.
    Z, D = len(batch.scores), hidden.shape[-1]
    lists = sharding.constrain(hidden.reshape(Z, -1, D), "Z T D")
    at_scores = jnp.take_along_axis(lists, batch.source[..., None], axis=1)
    logps = head.token_logps(
        sharding.constrain(at_scores, "Z C D"),
        model.unembedding()[...],
        batch.target,
        batch.scores,
        model.dtype,
        model.last_step(),
    )
    return _summed(logps, batch.slot, batch.answer, batch.is_pair)


def _summed(
    logps: Float[Array, "Z C"],
    slot: Int[Array, "Z C"],
    answer: Int[Array, "Z C"],
    is_pair: Bool[Array, " P"],
) -> Float[Array, "P A"]:
    """Sums each answer's tokens wherever they stand; masked, so in the same order every time."""
    P = len(is_pair)
    owner = jnp.where(slot < 0, -1, 2 * slot + answer)
    mine = owner[..., None] == jnp.arange(2 * P)
    return jnp.where(mine, logps[..., None], 0).sum((0, 1)).reshape(P, 2)


def of_params(
    graph: nnx.GraphDef,
    params: dict[str, Any],
    batch: Packed,
    so_far: stack.Weights | None = None,
) -> Float[Array, "P A"]:
    """`answer_logps` of the model with these weights."""
    return answer_logps(nnx.merge(graph, nnx.State(params)), batch, so_far)


def compiled(mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """`of_params`, one program for policy and reference: equal weights give equal bits."""
    everywhere = jax.NamedSharding(mesh, jax.P())
    return jax.jit(of_params, static_argnums=0, out_shardings=everywhere)


def of_pairs(
    forward: Forward, pairs: Sequence[PairIds], place: Place
) -> Float[np.ndarray, "pairs A"]:
    """Log-probabilities of every pair, in order, in nats."""
    found = []
    for update in batches.in_order(pairs, place):
        total = np.zeros((place.shape.pairs, 2), np.float32)
        for batch in update.micro_batches:
            total += np.asarray(forward(batches.put(batch, place)))
        found.append(total[: len(update.rows)])
    return np.concatenate(found)

"""Hidden states of scored tokens -> log-probabilities. Nothing of shape [B, T, V] ever exists."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recipes.data.packing import Packed
import zoo
from zoo import attention, sharding

# Logits in float32 that a device may hold at a time, in bytes.
LOGITS_BYTES = 2**28


def answer_logps(model: zoo.Model, batch: Packed) -> Float[Array, "P A"]:
    """Log-probability of each answer given its prompt, summed over its scored tokens, in nats.

    Slots whose pair is not in this micro-batch hold 0.
    """
    keys = attention.KeyRange(batch.first, batch.last)
    hidden = model.hidden(batch.tokens, batch.positions, keys)
    at_scores = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
    logps = token_logps(model, sharding.constrain(at_scores, "B C D"), batch.target)
    return _summed(logps, batch.slot, batch.answer, batch.is_pair)


def token_logps(
    model: zoo.Model, hidden: Float[Array, "B C D"], target: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """Log-probability of each target, in nats, float32; the logits exist a chunk at a time."""
    B, C = target.shape
    unembed = model.unembedder()
    chunks = _chunks(B, C, model.config.vocab_size)

    @jax.checkpoint
    def of_chunk(part: tuple[Array, Array]) -> Array:
        hidden, target = part
        logits = unembed(hidden)
        at_target = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return at_target - jax.nn.logsumexp(logits, axis=-1)

    split = lambda x: jnp.moveaxis(x.reshape(B, chunks, C // chunks, *x.shape[2:]), 1, 0)
    logps = jax.lax.map(of_chunk, (split(hidden), split(target)))
    return jnp.moveaxis(logps, 0, 1).reshape(B, C)


def _chunks(B: int, C: int, V: int) -> int:
    """Into how many parts C is cut: the fewest that divide it and stay within LOGITS_BYTES."""
    mesh = jax.sharding.get_abstract_mesh().shape
    shards = mesh["data"] * mesh["fsdp"] if mesh else 1
    wanted = B // min(shards, B) * C * V * 4 / LOGITS_BYTES
    return next((n for n in range(1, C) if C % n == 0 and n >= wanted), C)


def _summed(
    logps: Float[Array, "B C"],
    slot: Int[Array, "B C"],
    answer: Int[Array, "B C"],
    is_pair: Bool[Array, " P"],
) -> Float[Array, "P A"]:
    """Sums each answer's tokens wherever they stand; masked, so in the same order every time."""
    P = len(is_pair)
    owner = jnp.where(slot < 0, -1, 2 * slot + answer)
    mine = owner[..., None] == jnp.arange(2 * P)
    return jnp.where(mine, logps[..., None], 0).sum((0, 1)).reshape(P, 2)

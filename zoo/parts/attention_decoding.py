"""Attention for decoding: one token per answer over the keys of its prompt and its own.

Several answers to a prompt share its cached keys, which are read once for all of them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from zoo.parts import last_step, layers


def attend(
    q: Float[Array, "B 1 N H"],
    of_prompts: tuple[Float[Array, "P S K H"], Float[Array, "P S K U"]],
    of_answers: tuple[Float[Array, "B Z K H"], Float[Array, "B Z K U"]],
    lengths: Int[Array, " P"],
    positions: Int[Array, " B"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B 1 N U"]:
    """The same as `attention.attend` for the token at `positions`, which sees all before it.

    The keys of P prompts with `lengths` are [P, S, …]; those of their B answers are [B, Z, …], with
    room for Z tokens and the answers to one prompt next to each other.
    """
    B, P = len(q), len(lengths)
    keys, values = zip(of_prompts, (_by_prompt(x, P) for x in of_answers), strict=True)
    S, Z, K = keys[0].shape[1], keys[1].shape[2], keys[0].shape[2]
    grouped = _by_prompt(q[:, 0].reshape(B, K, -1, q.shape[-1]), P)
    dot = functools.partial(layers.dot, out=jnp.float32)
    scores = [dot("PAKGH,PSKH->PAKGS", grouped, keys[0])]
    scores += [dot("PAKGH,PAZKH->PAKGZ", grouped, keys[1])]

    now, begins = _by_prompt(positions, P)[..., None], lengths[:, None, None]
    places = jnp.arange(S), begins + jnp.arange(Z)
    seen = [places[0] < begins, places[1] <= now]
    if window is not None:
        since = now // chunk * chunk if chunk else now
        seen = [mask & (since - at < window) for mask, at in zip(seen, places, strict=True)]
    scores = [
        jnp.where(mask[:, :, None, None], last_step.capped(some * scale, softcap), -jnp.inf)
        for mask, some in zip(seen, scores, strict=True)
    ]
    if sinks is not None:  # one more key per head, with a score but no value
        sink = sinks.astype(jnp.float32).reshape(K, -1, 1)
        scores.append(jnp.broadcast_to(sink, (*scores[0].shape[:-1], 1)))
    shares = jax.nn.softmax(jnp.concatenate(scores, -1), axis=-1).astype(values[0].dtype)
    gathered = dot("PAKGS,PSKU->PAKGU", shares[..., :S], values[0])
    gathered += dot("PAKGZ,PAZKU->PAKGU", shares[..., S : S + Z], values[1])
    return gathered.astype(q.dtype).reshape(B, 1, q.shape[2], -1)


def _by_prompt(x: Shaped[Array, "*all"], P: int) -> Array:
    """Groups rows of answers by prompt, [P, A, …]."""
    return x.reshape(P, len(x) // P, *x.shape[1:])

"""The gated delta rule (https://arxiv.org/abs/2412.06464, Eq. 10).

The state S of a head, H x U, decays by exp(decay), and the value that it stores for a key moves
towards the key's new value:

  S = exp(decay) S;  S = S + k (beta (v - S^T k))^T;  out = S^T q / sqrt(H)

All in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.parts import chunks, layers, mixing, spans


def unit(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Normalises queries and keys to length 1, as the rule requires, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def whole(
    where: spans.Spans,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N U"],
    decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N H U"]]:
    """The output of each token of whole rows, and the final state if a row is one text."""
    q = q.astype(jnp.float32) * q.shape[-1] ** -0.5
    return chunks.whole(where, q, k, v, decay, beta)


def step(
    state: Float[Array, "B N H U"],
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 N H"],
    v: Float[Array, "B 1 N U"],
    decay: Float[Array, "B 1 N"],
    beta: Float[Array, "B 1 N"],
) -> tuple[Float[Array, "B 1 N U"], Float[Array, "B N H U"]]:
    """The output and new state for one more token of each row."""
    q, k, v, decay, beta = (x[:, 0].astype(jnp.float32) for x in (q, k, v, decay, beta))
    state = state * jnp.exp(decay)[..., None, None]
    move = (v - layers.dot("BNHU,BNH->BNU", state, k)) * beta[..., None]
    state = state + k[..., None] * move[..., None, :]
    return layers.dot("BNHU,BNH->BNU", state, q * q.shape[-1] ** -0.5)[:, None], state


RULE = mixing.Recurrence(whole, step)

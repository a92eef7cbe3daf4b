"""Chunkwise linear recurrences over packed rows, along paths.

At each token of a head the state S, H x U, decays by exp(decay) and stores a value for the key:

  S = exp(decay) S;  S = S + k v^T;  out = S^T q

With a beta it adds k (beta (v - S^T k))^T instead, which updates the value stored for k.

The tokens of a chunk are computed together (https://arxiv.org/abs/2406.06484, section 3), which
inverts a triangular matrix if there is a beta; states pass from chunk to chunk. A chunk need not
start with a text: a mask says which tokens of the chunk lie on a token's path, and two states are
carried: of the current run, and of the last prompt from which a second answer will continue. All in
float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.parts import layers, paths, spans

CHUNK = 64


def whole(
    where: spans.Spans,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N U"],
    decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"] | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N H U"]]:
    """The output of each token of whole rows, and the final state if a row is one text."""
    path = paths.of(where)
    T = q.shape[1]
    given = jax.tree.map(
        lambda x: _filled(paths.in_time(x.astype(jnp.float32), path), T), (q, k, v, decay, beta)
    )
    q, k, v, decay, beta = given
    # Padding after the end of a text changes no state.
    real = _filled(path.begun, T)[..., None]
    k, decay = jnp.where(real[..., None], k, 0), jnp.where(real, decay, 0)
    out, state = _chunked(q, k, v, decay, beta, path)
    return paths.stored(out[:, :T], path), state


def _filled(x: Array, T: int) -> Array:
    """Pads to whole chunks with tokens that change nothing."""
    return jnp.pad(x, [(0, 0), (0, -T % CHUNK), *[(0, 0)] * (x.ndim - 2)])


class _Seen(NamedTuple):
    """The visibility of tokens within each chunk, and the state that each continues from."""

    inside: Bool[Array, "B I t s"]  # token s lies on the path to token t
    whence: Bool[Array, "B I 2 t"]  # the current run; the saved prompt
    last_fork: Array  # [B, I]: the last token at which a prompt's state is saved; -1: none


def _seen(path: paths.Paths) -> _Seen:
    T = path.root.shape[1]
    # Padding of a chunk continues from the last token, so that the text's state passes through.
    cut = lambda x: jnp.pad(x, [(0, 0), (0, -T % CHUNK)], mode="edge").reshape(len(x), -1, CHUNK)
    start, end, root = (cut(x) for x in (*path.runs(), path.root))
    forks = cut((path.fork == jnp.arange(T)) & (path.second < T))
    begin = (jnp.arange(start.shape[1]) * CHUNK)[:, None]
    t = begin + jnp.arange(CHUNK)
    t, s = jnp.broadcast_to(t, start.shape)[..., None], t[:, None]
    on = lambda x: x[..., None]
    inside = ((on(start) <= s) & (s <= t)) | ((on(root) <= s) & (s <= on(end)))
    apart = end >= root  # part of the path lies elsewhere
    run = (start < begin) | (apart & (end >= begin) & (root < begin))
    kept = (start >= begin) & apart & (end < begin)
    last_fork = jnp.where(forks, jnp.arange(CHUNK), -1).max(-1)
    return _Seen(inside, jnp.stack([run, kept], axis=2), last_fork)


def _chunked(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N U"],
    decay: Float[Array, "B S N"],
    beta: Float[Array, "B S N"] | None,
    path: paths.Paths,
) -> tuple[Float[Array, "B S N U"], Float[Array, "B N H U"]]:
    seen, dot = _seen(path), layers.dot
    tiles = lambda x: jnp.moveaxis(x.reshape(len(x), -1, CHUNK, *x.shape[2:]), 3, 2)
    q, k, v, decay, beta = jax.tree.map(tiles, (q, k, v, decay, beta))  # B I N t …
    inside = seen.inside[:, :, None]
    # How much of what stood at s is left at t: the decays along the path between them.
    passed = dot("BIts,BINs->BINt", seen.inside.astype(jnp.float32), decay)
    left = jnp.exp(jnp.where(inside, passed[..., None] - passed[..., None, :], -jnp.inf))
    of_state = jnp.where(seen.whence[:, :, :, None], jnp.exp(passed)[:, :, None], 0)
    if beta is None:
        new, known = v, None
    else:  # what a token writes depends on what is there: that of its chunk, and of the state
        to_k = dot("BINtH,BINsH->BINts", k * beta[..., None], k)
        solve = inverse(to_k * jnp.where(jnp.eye(CHUNK, dtype=bool), 0, left))
        new = dot("BINts,BINsU->BINtU", solve, v * beta[..., None])
        known = dot("BIeNts,BINsH->BIeNtH", solve[:, :, None] * of_state[..., None, :],
                    k * beta[..., None])  # fmt: skip
    asked = q[:, :, None] * of_state[..., None]
    here = dot("BINtH,BINsH->BINts", q, k) * left
    # The outgoing states: after the last token, and after the last prompt that forks.
    ends = jnp.stack([jnp.full_like(seen.last_fork, CHUNK - 1), seen.last_fork], axis=-1)
    end = jax.nn.one_hot(ends, CHUNK, dtype=jnp.float32)
    given = dot("BIet,BINts->BIeNs", end, left)[..., None] * k[:, :, None]
    through = dot("BIft,BIeNt->BIefN", end, of_state)

    def chunk(states: Array, of: tuple) -> tuple[Array, Array]:
        new, known, asked, here, given, through, forks = of
        if known is not None:
            new = new - dot("BeNtH,BeNHU->BNtU", known, states)
        out = dot("BeNtH,BeNHU->BNtU", asked, states) + dot("BNts,BNsU->BNtU", here, new)
        after = dot("BefN,BeNHU->BfNHU", through, states)
        after = after + dot("BfNsH,BNsU->BfNHU", given, new)
        kept = jnp.where(forks[:, None, None, None], after[:, 1], states[:, 1])
        return jnp.stack([after[:, 0], kept], axis=1), out

    B, _, N, _, H = q.shape
    begin = jnp.zeros((B, 2, N, H, v.shape[-1]), jnp.float32)
    of = (new, known, asked, here, given, through, seen.last_fork >= 0)
    states, out = jax.lax.scan(chunk, begin, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), of))
    out = jnp.moveaxis(out, (0, 3), (1, 2))  # I B N t U -> B I t N U
    return out.reshape(B, -1, N, v.shape[-1]), states[:, 0]


@jax.custom_vjp
def inverse(below: Float[Array, "*B t s"]) -> Float[Array, "*B t s"]:
    """The inverse of 1 + `below`, which is strictly lower triangular with a power-of-two side.

    Forward substitution by doubling blocks needs only products, and is as exact as solving row by
    row (unlike the product of 1 + N, 1 + N^2, …, whose terms explode for repeated keys).
    """
    return _inverted(below)


def _inverted(below: Array) -> Array:
    lead, C = below.shape[:-2], below.shape[-1]
    found = jnp.ones((*lead, C, 1, 1), below.dtype)
    for size in (1 << i for i in range(C.bit_length() - 1)):
        n = C // (2 * size)
        blocks = below.reshape(*lead, n, 2, size, n, 2, size)
        corner = jnp.diagonal(blocks[..., 1, :, :, 0, :], axis1=-4, axis2=-2)
        corner = jnp.moveaxis(corner, -1, -3)
        two = found.reshape(*lead, n, 2, size, size)
        upper, lower = two[..., 0, :, :], two[..., 1, :, :]
        product = layers.dot("...ts,...su->...tu", lower, corner)
        corner = -layers.dot("...ts,...su->...tu", product, upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], -1)
        found = jnp.concatenate([top, jnp.concatenate([corner, lower], -1)], -2)
    return found[..., 0, :, :]


def _inverse_backward(found: Array, gradient: Array) -> tuple[Array]:
    pulled = layers.dot("...ut,...us->...ts", found, gradient)
    return (-jnp.tril(layers.dot("...tu,...su->...ts", pulled, found), -1),)


def _inverse_forward(below: Array) -> tuple[Array, Array]:
    found = _inverted(below)
    return found, found


inverse.defvjp(_inverse_forward, _inverse_backward)

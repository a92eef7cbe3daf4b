"""The order in which a recurrence reads packed rows: the predecessors of each token on its path.

An ordinary text is a path. For two answers that share a prompt (recipes/data/packed/streams.py) the
stored row holds the first answer backwards; in time the order is prompt, first answer, second
answer, and the second continues from the prompt's last token. The row is thus a forest, and the
state at the end of a prompt is saved until its second answer begins. A stream occupies the same
indices in both orders.

  stored      y x a b u v
  in time     a b x y u v
  root        0 0 0 0 0 0    where the stream begins
  fork        1 1 1 1 1 1    where its prompt ends
  second      4 4 4 4 4 4    where its second answer begins
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from zoo.parts import spans


class Paths(NamedTuple):
    """The time order of stored tokens, and the path to the token at each time.

    For a stream with one answer and for an ordinary text, `second` lies beyond the row.
    """

    order: Int[Array, "B T"]  # the stored index of the token at each time
    time: Int[Array, "B T"]  # the time of each stored token
    root: Int[Array, "B T"]
    fork: Int[Array, "B T"]
    second: Int[Array, "B T"]
    begun: Bool[Array, "B T"]  # False for padding after the end of a text

    def runs(self) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The `start` and `end` of the path to t: it is `root` to `end`, then `start` to t.

        The first range is empty where `end` is before `root`.
        """
        t = jnp.arange(self.root.shape[1])
        of_second = t >= self.second
        start = jnp.where(of_second, self.second, self.root)
        return start, jnp.where(of_second, self.fork, self.root - 1)


def of(where: spans.Spans) -> Paths:
    """The paths of rows stored with the spans `where`."""
    T = where.positions.shape[1]
    t = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), where.positions.shape)
    backwards = where.last > t + 1  # of a first answer: it sees what is stored after it
    is_root = (where.positions == 0) & ~backwards
    after = jax.lax.cummin(jnp.where(is_root, t, T - 1), axis=1, reverse=True)
    before = jax.lax.cummax(jnp.where(is_root, t, 0), axis=1)
    # Where the stream's prompt begins in the stored row, and where the stream begins.
    prompt = jnp.where(backwards, after, before)
    forwards = jax.lax.cummax(jnp.where(backwards, -1, t), axis=1)  # the last place that is
    root = jnp.where(prompt > 0, _at(forwards, jnp.maximum(prompt - 1, 0)) + 1, 0)
    first = prompt - root  # tokens of the first answer
    fork = _at(where.last, root) - 1 - first
    # A stream occupies the same indices in both orders, so per-stream values need no reordering.
    second = jnp.where(first > 0, fork + 1 + first, T)
    second = jnp.where(_at(root, jnp.minimum(second, T - 1)) == root, second, T)
    answer = (first > 0) & (t > fork) & (t <= fork + first)
    order = jnp.where(answer, root + fork + first - t, jnp.where(t <= fork, t + first, t))
    order = jnp.where(first > 0, order, t)
    of_prompt = ~backwards & (first > 0) & (t - first <= fork)
    time = jnp.where(backwards, root + where.positions, jnp.where(of_prompt, t - first, t))
    begun = _at(where.positions < where.lengths, order)
    return Paths(order, time, root, fork, second, begun)


def _at(x: Array, places: Int[Array, "B T"]) -> Array:
    return jnp.take_along_axis(x, places, axis=1)


def in_time(x: Array, paths: Paths) -> Array:
    """Reorders stored tokens [B, T, …] by time."""
    return _moved(x, paths.order, paths.time)


def stored(x: Array, paths: Paths) -> Array:
    """The inverse of `in_time`: puts tokens back in stored order."""
    return _moved(x, paths.time, paths.order)


@jax.custom_vjp
def _moved(x: Array, source: Int[Array, "B T"], target: Int[Array, "B T"]) -> Array:
    """`x[source]`, with a gradient that is a gather too instead of a scatter-add."""
    del target
    return jnp.take_along_axis(x, _wide(source, x), axis=1)


_moved.defvjp(
    lambda x, source, target: (_moved(x, source, target), (source, target)),
    lambda kept, gradient: (_moved(gradient, kept[1], kept[0]), None, None),
)


def back(x: Array, paths: Paths, by: int) -> Array:
    """The value `by` steps before each token on its path, or 0 if the path is shorter.

    Tokens [B, T, …] are in the order of time.
    """
    T = x.shape[1]
    t = jnp.arange(T)
    start, end = paths.runs()
    shifted = jnp.pad(x, [(0, 0), (by, 0), *[(0, 0)] * (x.ndim - 2)])[:, :T]
    near = jnp.where(_wide(t - by >= start, x), shifted, 0)
    # The first tokens of a second answer have it in the prompt.
    place = end + 1 - by + (t - start)
    source = jnp.where((t - start < by) & (place >= paths.root) & (place <= end), place, -1)
    # The same map read from the prompt: the token of the second answer that each place is for.
    ahead = paths.second + by - 1 - (paths.fork - t)
    there = (t <= paths.fork) & (ahead >= paths.second) & (ahead < T)
    there &= _at(paths.root, jnp.minimum(ahead, T - 1)) == paths.root
    return near + _fetched(x, source, jnp.where(there, ahead, -1))


def _wide(mask: Array, x: Array) -> Array:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))


@jax.custom_vjp
def _fetched(x: Array, source: Int[Array, "B T"], target: Int[Array, "B T"]) -> Array:
    """`x[source]`, or 0 where the index is below 0; `target` is the inverse map."""
    del target
    found = jnp.take_along_axis(x, _wide(jnp.maximum(source, 0), x), axis=1)
    return jnp.where(_wide(source >= 0, x), found, 0)


_fetched.defvjp(
    lambda x, source, target: (_fetched(x, source, target), (source, target)),
    lambda kept, gradient: (_fetched(gradient, kept[1], kept[0]), None, None),
)

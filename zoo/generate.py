"""Text from a model: keys and values are kept, and each step reads one new token a row.

Prompts of different lengths stand side by side. Programs are compiled for a few sizes (powers of
two) and for no particular length.
"""

from collections.abc import Iterable, Sequence
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from checkpoints_io.errors import BadInput
from zoo import attention, rope, sharding, spans, stack, token_rows

SMALLEST = 64  # tokens that a program has room for, at least


class Sampling(NamedTuple):
    """How a token is drawn; a temperature of 0 takes the likeliest.

    What remains is drawn by its probability at that temperature: at most `top_k` tokens (0: all);
    the likeliest whose probabilities add up to `top_p`; those at least `min_p` times as probable as
    the likeliest. The likeliest always remains.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()


class Cache(NamedTuple):
    """Keys and values of every layer, at the places of their tokens."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[list[int]]:
    """A continuation of each prompt, up to and with the first of `stop_ids`.

    As in transformers, a text that grows past the threshold of longrope is read again there, and
    with the dynamic rope a key keeps the turn that it had when it was read.

    Example:
      generate.generate(model, [[1, 15, 7], [1]], max_new_tokens=20)

    Raises:
      ValueError: a prompt is empty, holds an id that the model has no embedding for, or would grow
        beyond the model's positions; or a setting of `sampling` means nothing.
    """
    _check(sampling)
    if not len(prompts) or not all(map(len, prompts)):
        raise BadInput("a prompt to continue needs at least one token")
    ids = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
    token_rows.check_ids(ids, model.config.vocab_size)
    longest = max(map(len, prompts))
    most = most_new_tokens(model, longest)
    if most is not None and max_new_tokens > most:
        raise BadInput(
            f"a prompt of {longest} tokens cannot grow by {max_new_tokens}: the model has "
            f"positions for {most} more"
        )
    texts, going, left = (
        [list(prompt) for prompt in prompts],
        list(range(len(prompts))),
        max_new_tokens,
    )
    key = jax.random.key(seed)
    while going and left:
        key, now = jax.random.split(key)
        some = [texts[row] for row in going]
        more = min(left, _until_a_turn(model, map(len, some), left))
        for row, new in zip(
            going, _continued(model, some, more, stop_ids, sampling, now), strict=True
        ):
            texts[row] += new
        going = [row for row in going if texts[row][-1] not in stop_ids]
        left -= more
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def most_new_tokens(model: Any, longest: int) -> int | None:
    """How many tokens may follow a prompt of this length; None: any number."""
    positions = model.config.sizes.get("C")
    return max(0, positions - longest) if positions else None


def _until_a_turn(model: Any, lengths: Iterable[int], most: int) -> int:
    """After how many tokens, at most, the first of the texts has to be read again."""
    ropes: Any = getattr(model.config, "rope_parameters", None)
    if getattr(ropes, "rope_type", None) != "longrope":
        return most
    last = rope.limit(ropes)
    assert last
    return min((last - length + 1 for length in lengths if length <= last), default=most)


def _continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    more: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    key: Key[Array, ""],
) -> list[list[int]]:
    """As `generate`, where no text has to be read again on the way."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    tokens = np.zeros((len(prompts), _room(longest + more)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    graph, state = nnx.split(model)
    shown = min(_room(longest), tokens.shape[1])
    cache, first = _read(graph, tokens.shape[1], state, tokens[:, :shown], lengths)
    tokens, ends, _ = _continue(
        graph, tuple(stop_ids), sampling.temperature > 0, state, cache, first, tokens, lengths,
        lengths + more, jax.tree.map(np.asarray, sampling), key,
    )  # fmt: skip
    texts = zip(np.asarray(tokens), lengths, np.asarray(ends), strict=True)
    return [row[start:end].tolist() for row, start, end in texts]


def _check(sampling: Sampling) -> None:
    right = sampling.temperature >= 0 and sampling.top_k >= 0
    right &= 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
    if not right:
        raise BadInput(
            f"{sampling}: temperature and top_k are 0 or more, top_p above 0 and at most 1, and "
            "min_p from 0 to 1"
        )
    if not sampling.temperature and sampling != GREEDY:
        raise BadInput(f"{sampling}: without a temperature the likeliest token is taken anyway")


def _room(length: int) -> int:
    return max(SMALLEST, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    graph: nnx.GraphDef,
    room: int,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[Cache, Float[Array, "B V"]]:
    """The cache with the prompts in it, and the logits after each prompt's last token."""
    model = nnx.merge(graph, state)
    keeping = Keeping(None, room)
    B, T = tokens.shape
    where = spans.causal(B, T, lengths)
    hidden = model.hidden(tokens, where, keeping)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    assert keeping.cache
    return keeping.cache, model.unembed(last)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _continue(
    graph: nnx.GraphDef,
    stops: tuple[int, ...],
    draws: bool,
    state: nnx.State,
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    limits: Int[Array, " B"],
    sampling: Sampling,
    key: Key[Array, ""],
) -> tuple[Int[Array, "B S"], Int[Array, " B"], Cache]:
    """The tokens with their continuations, where each row ends, and the cache in its old place."""
    model = nnx.merge(graph, state)
    rows = jnp.arange(len(tokens))

    def going(carry: tuple) -> Bool[Array, ""]:
        return ~carry[3].all()

    def step(carry: tuple) -> tuple:
        logits, tokens, ends, done, cache, key = carry
        key, now = jax.random.split(key)
        new = drawn(logits, sampling, now) if draws else logits.argmax(-1)
        new = new.astype(tokens.dtype)
        tokens = jnp.where(done[:, None], tokens, tokens.at[rows, ends].set(new))
        stopped = done | (ends + 1 >= limits) | jnp.isin(new, jnp.array(stops, jnp.int32))
        where = spans.Spans(*(x[:, None] for x in (ends, jnp.zeros_like(ends), ends + 1, ends + 1)))
        keeping = Keeping(cache, tokens.shape[1])
        logits = model.unembed(model.hidden(new[:, None], where, keeping))[:, 0]
        return logits, tokens, jnp.where(done, ends, ends + 1), stopped, keeping.cache, key

    start = (logits, tokens, lengths, lengths >= limits, cache, key)
    _, tokens, ends, _, cache, _ = jax.lax.while_loop(going, step, start)
    return sharding.whole(tokens), sharding.whole(ends), cache


def drawn(logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]) -> Int[Array, " B"]:
    """One token a row, by `sampling`."""
    ids = jnp.argsort(logits, axis=-1, descending=True)
    sorted_ = jnp.take_along_axis(logits, ids, -1) / sampling.temperature
    shares = jax.nn.softmax(sorted_, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    rank = jnp.arange(logits.shape[-1])
    remains = (before < sampling.top_p) & (shares >= sampling.min_p * shares[:, :1])
    remains &= (rank < sampling.top_k) | (sampling.top_k == 0)
    remains |= rank == 0
    choice = jax.random.categorical(key, jnp.where(remains, sorted_, -jnp.inf))
    return jnp.take_along_axis(ids, choice[:, None], -1)[:, 0]


class Keeping:
    """Goes through the blocks as `stack.run` does, and keeps keys and values in `cache`.

    Without a cache the tokens are whole prompts, and a cache with this much room is made of them.
    """

    def __init__(self, cache: Cache | None, room: int):
        self.cache, self.room = cache, room

    def __call__(
        self, model: Any, x: Array, where: spans.Spans, *shared: Any, each: Any = None
    ) -> Array:
        graph, state = nnx.split(model.blocks)
        weights = nnx.to_pure_dict(state)
        once = self._reads if self.cache is None else self._adds
        steps = jnp.arange(model.config.sizes["L"])

        def layer(carry: tuple, one: tuple) -> tuple:
            x, cache = carry
            i, weights, own = one
            fresh: list = []
            attend = functools.partial(once, fresh, cache, i, where, model.attention)
            x = stack.block_of(graph, x, weights, own, (attend, *shared))
            (cache, made) = fresh
            return (x, cache), made

        (x, cache), made = jax.lax.scan(layer, (x, self.cache), (steps, weights, each))
        self.cache = Cache(*made) if self.cache is None else cache
        return x

    def _reads(self, fresh, cache, i, where, backend, q, k, v, **how) -> Array:
        """A prompt sees itself; what it leaves is kept."""
        longer = lambda x: jnp.pad(x, [(0, 0), (0, self.room - x.shape[1]), (0, 0), (0, 0)])
        fresh += [cache, (longer(k), longer(v))]
        return attention.attend(q, k, v, where, backend=backend, **how)

    def _adds(self, fresh, cache, i, where, backend, q, k, v, **how) -> Array:
        """A token is put in its place, and sees all before it."""
        rows = jnp.arange(len(q))
        put = lambda kept, new: kept.at[i, rows, where.positions[:, 0]].set(new[:, 0])
        cache = Cache(put(cache.keys, k), put(cache.values, v))
        fresh += [cache, None]
        places = jnp.broadcast_to(jnp.arange(self.room, dtype=jnp.int32), (len(q), self.room))
        return attention.attend(
            q, cache.keys[i], cache.values[i], where, key_positions=places, **how
        )

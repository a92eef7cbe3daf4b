"""Generation with a KV cache (or recurrent state): each decoding step reads one token per row.

Prompts of different lengths share a batch, and a repeated prompt is prefilled once. Programs are
compiled for a few sizes (powers of two) rather than for each length.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from checkpoints_io.errors import BadInput
from zoo import models
from zoo import sampling as drawing
from zoo.parts import causal_lm, keeping, mixing, rope, sharding, spans, token_rows
from zoo.parts.keeping import State
from zoo.sampling import GREEDY, Sampling

SMALLEST = 64  # a program has room for at least this many tokens
# Padding prompts to SMALLEST is not worth it from this many wasted tokens: compiling a program of
# a smaller size then costs less.
WORTH_ONE = 1024
ROOM = 4096  # the most tokens of an answer that the cache holds; past that the text is prefilled


def generate(
    model: causal_lm.CausalLM,
    prompts: token_rows.Tokens,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | np.ndarray | Array = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    lengths: token_rows.Lengths | None = None,
) -> list[list[int]]:
    """Continues each prompt, up to and including the first of `stop_ids`.

    Prompts are lists of ids of any lengths, or an array [B, T] padded after `lengths` tokens.
    As in transformers, a text that grows past the threshold of longrope is prefilled again there,
    and with dynamic rope scaling a key keeps the rotation that it had when it was first read. A
    text that outgrows the model's context length is warned about once.

    Example:
      generate.generate(model, [[1, 15, 7], [1]], max_new_tokens=20)

    Raises:
      ValueError: there is no prompt; one is empty, holds an id that has no embedding, or would grow
        beyond the positions that the model has weights for or is supported with; or a setting of
        `sampling` is out of range.
    """
    token_rows.refuse_others(prompts)
    texts: list[list[int]] = [[] for _ in prompts]
    for added in stream(
        model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling,
        seed=seed, at_once=max_new_tokens or 1, lengths=lengths,
    ):  # fmt: skip
        for text, new in zip(texts, added, strict=True):
            text += new
    return texts


def stream(
    model: causal_lm.CausalLM,
    prompts: token_rows.Tokens,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | np.ndarray | Array = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    at_once: int = 4,
    lengths: token_rows.Lengths | None = None,
) -> Iterator[list[list[int]]]:
    """Yields the tokens of `generate` as they come, `at_once` steps of every prompt at a time.

    Raises:
      ValueError: as in `generate`, once the first tokens are requested.
    """
    models.refuse_other(model, "generate(model, prompts)")
    drawing.check(sampling)
    models.refuse_seed(seed)
    token_rows.refuse_others(prompts)
    if not len(prompts):
        raise BadInput("there is no prompt to continue")
    stop_ids = _checked(max_new_tokens, at_once, stop_ids)
    token_rows.check_several(prompts, "prompts")
    ids = token_rows.cut(prompts, lengths)
    token_rows.check_ids(np.concatenate(ids), model.config.vocab_size)
    longest = max(map(len, ids))
    most = most_new_tokens(model, longest)
    if most is not None and max_new_tokens > most:
        raise BadInput(
            f"a prompt of {longest} tokens cannot grow by {max_new_tokens}: the model reads "
            f"{most} more"
        )
    made_for = models.longest_text(model) or math.inf
    texts, going = [prompt.tolist() for prompt in ids], list(range(len(ids)))
    left, key = max_new_tokens, jax.random.key(seed)
    while going and left:
        key, now = jax.random.split(key)
        some = [texts[row] for row in going]
        more = _until_read_again(model, map(len, some), left)
        for pieces in _continued(model, some, more, at_once, stop_ids, sampling, now):
            added: list[list[int]] = [[] for _ in prompts]
            for row, new in zip(going, pieces, strict=True):
                added[row] = new
                texts[row] += new
            if max(map(len, texts)) > made_for:
                warnings.warn(f"a text is longer than the {made_for} tokens that the model was "
                              "made for: what follows may make no sense", stacklevel=3)  # fmt: skip
                made_for = math.inf
            yield added
        going = [row for row in going if texts[row][-1] not in stop_ids]
        left -= more


def _checked(max_new_tokens: Any, at_once: Any, stop_ids: object) -> tuple[int, ...]:
    """The sorted stop ids, after checking them and the numbers of tokens."""
    whole = lambda x: isinstance(x, int | np.integer)
    for name, number, least in (("max_new_tokens", max_new_tokens, 0), ("at_once", at_once, 1)):
        if not whole(number) or number < least:
            raise BadInput(f"{name}={number!r} is no whole number of tokens of at least {least}")
    return tuple(sorted(token_rows.stop_ids(stop_ids)))


def most_new_tokens(model: causal_lm.CausalLM, longest: int) -> int | None:
    """How many tokens may follow a prompt of `longest` tokens; None: any number."""
    most = model.config.longest_text
    return max(0, most - longest) if most else None


def _until_read_again(model: causal_lm.CausalLM, lengths: Iterable[int], left: int) -> int:
    """How many tokens fit before the texts must be prefilled again, for longrope or for room.

    With dynamic rope scaling they never are: a second prefill would rotate the keys differently.
    """
    ropes = getattr(model.config, "rope_parameters", None)
    kind, last = getattr(ropes, "rope_type", None), rope.limit(ropes)
    if kind == "dynamic":
        return left
    turns = [last - length + 1 for length in lengths if length <= last] if last else []
    return min(left, ROOM, *turns)


def _continued(
    model: causal_lm.CausalLM,
    prompts: Sequence[Sequence[int]],
    more: int,
    at_once: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    key: Key[Array, ""],
) -> Iterator[list[list[int]]]:
    """Like `stream`, for a number of tokens that needs no second prefill."""
    graph, weights = nnx.split(model)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)
    lengths = np.array([len(prompt) for prompt in rows_of], np.int32)
    longest = int(lengths.max())
    ids = np.zeros((len(rows_of), room_for(longest, len(rows_of))), np.int32)
    for row, prompt in zip(ids, rows_of, strict=True):
        row[: len(prompt)] = prompt
    read, logits = _read(graph, room_for(longest), weights, ids, lengths)

    # `shared_by` answers share one cached prompt; a prompt with more of them is duplicated.
    shared_by = math.gcd(*map(len, rows_of.values()))
    again = [len(rows) // shared_by for rows in rows_of.values()]
    prompt_of = np.repeat(np.arange(len(rows_of)), again)
    if len(prompt_of) > len(rows_of):
        read = jax.tree.map(lambda x: jnp.take(x, prompt_of, axis=1), read)
    logits, lengths = logits[np.repeat(prompt_of, shared_by)], lengths[prompt_of]
    kept = keeping.begun(model, read, shared_by, room_for(more))

    order = [row for rows in rows_of.values() for row in rows]  # answers to a prompt together
    tokens = np.zeros((len(order), room_for(more)), np.int32)
    ends, last = np.zeros(len(order), np.int32), np.full(len(order), more, np.int32)
    how = sampling._replace(top_k=min(sampling.top_k, 2**31 - 1))  # more than there are
    how = jax.tree.map(np.asarray, how)
    while (ends < last).any():
        before = ends
        now = _continue(
            graph, stop_ids, drawing.way(sampling), weights, kept, read, lengths, logits,
            tokens, before, np.minimum(before + at_once, last), how, key,
        )  # fmt: skip
        logits, tokens, kept, key = now.logits, now.tokens, now.kept, now.key
        ends, seen = np.asarray(now.ends), np.asarray(tokens)
        pieces = [row[a:b].tolist() for row, a, b in zip(seen, before, ends, strict=True)]
        stopped = [bool(new) and new[-1] in stop_ids for new in pieces]
        last = np.where(stopped, ends, last)
        yield [piece for _, piece in sorted(zip(order, pieces, strict=True))]


def room_for(length: int, rows: int = 1) -> int:
    """The padded length, a power of two, for `rows` texts of at most `length` tokens."""
    fitting = 1 << (length - 1).bit_length()
    return max(fitting, SMALLEST) if rows * (SMALLEST - fitting) < WORTH_ONE else fitting


class Drawn(NamedTuple):
    """The answers so far, and the state that their next tokens need."""

    logits: Float[Array, "B V"]  # of the next token
    tokens: Int[Array, "B Z"]
    ends: Int[Array, " B"]
    done: Bool[Array, " B"]
    kept: State  # of the answers
    key: Key[Array, ""]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    graph: nnx.GraphDef,
    room: int,
    weights: nnx.State,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, " P"],
) -> tuple[State, Float[Array, "P V"]]:
    """Prefills the prompts: the layers' caches, and the logits after each prompt's last token."""
    model = nnx.merge(graph, weights)
    P, T = tokens.shape
    where = spans.causal(P, T, lengths)
    hidden, kept = keeping.forward(model, tokens, where, keeping.blank(model, P, room))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return kept, model.unembed(last)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _continue(
    graph: nnx.GraphDef,
    stops: tuple[int, ...],
    way: drawing.Way,
    weights: nnx.State,
    kept: State,
    read: State,
    lengths: Int[Array, " P"],
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B Z"],
    ends: Int[Array, " B"],
    limits: Int[Array, " B"],
    sampling: Sampling,
    key: Key[Array, ""],
) -> Drawn:
    """Decodes every answer up to its limit; the answers' cache is donated and updated in place."""
    model = nnx.merge(graph, weights)
    rows = jnp.arange(len(tokens))
    prompts = {kind: mixing.Prompts(some, lengths) for kind, some in read.items()}
    before = jnp.repeat(lengths, len(rows) // len(lengths))

    def step(now: Drawn) -> Drawn:
        key, own = jax.random.split(now.key)
        new = way(now.logits, sampling, own).astype(tokens.dtype)
        written = now.tokens.at[rows, now.ends].set(new)
        stopped = now.done | (now.ends + 1 >= limits) | jnp.isin(new, jnp.array(stops, jnp.int32))
        hidden, kept = keeping.forward(
            model, new[:, None], spans.last(before + now.ends), now.kept, prompts
        )
        return Drawn(
            logits=model.unembed(hidden)[:, 0],
            tokens=jnp.where(now.done[:, None], now.tokens, written),
            ends=jnp.where(now.done, now.ends, now.ends + 1),
            done=stopped, kept=kept, key=key,
        )  # fmt: skip

    start = Drawn(logits, tokens, ends, ends >= limits, kept, key)
    end = jax.lax.while_loop(lambda now: ~now.done.all(), step, start)
    return end._replace(tokens=sharding.whole(end.tokens), ends=sharding.whole(end.ends))

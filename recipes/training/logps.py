"""The log-probability of every answer in packed rows."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from recipes.data.ids.examples import Example
from recipes.data.packed import batches
from recipes.data.packed.batches import Place
from recipes.data.packed.packing import Packed
import zoo
from zoo import generate, models
from zoo.parts import adapted, blocks, quantised, sharding, spans, stack, token_logps

# A model's forward pass: micro-batch -> log-probabilities [P, A], in nats.
Forward = Callable[[Packed], Float[Array, "P A"]]
Compiled = Callable[[nnx.GraphDef, blocks.Weights, Packed], Float[Array, "P A"]]  # of any model


class Scores(NamedTuple):
    """Sums over the scored tokens of each answer; 0 where it is not in this micro-batch."""

    logps: Float[Array, "P A"]  # log p of each token given those before it, in nats
    log_p2: Float[Array, "P A"]  # log of the sum of p² over the vocabulary; no gradient
    is_best: Float[Array, "P A"]  # how many of them are the model's likeliest; no gradient


def answer_logps(model: zoo.Model, batch: Packed) -> Float[Array, "P A"]:
    """Log-probability of each answer given its prompt, summed over its scored tokens, in nats.

    Slots whose example is not in this micro-batch hold 0.
    """
    logps = token_logps.token_logps(*_at_scores(model, batch, None))
    return _summed(_weighted(logps, batch), batch)


def answer_scores(model: zoo.Model, batch: Packed, so_far: blocks.Weights | None = None) -> Scores:
    """Log-probabilities and other sums over each answer's logits; `so_far` as in `stack.run`."""
    logps, beside = token_logps.with_beside(*_at_scores(model, batch, so_far))
    more = (_summed(each, batch) for each in beside)
    return Scores(_summed(_weighted(logps, batch), batch), *more)


def _weighted(logps: Float[Array, "Z C"], batch: Packed) -> Float[Array, "Z C"]:
    return logps if batch.weights is None else logps * batch.weights


def _at_scores(model: zoo.Model, batch: Packed, so_far: blocks.Weights | None) -> tuple:
    """The inputs of the part that computes logits, as in `token_logps`."""
    where = spans.Spans(batch.positions, batch.first, batch.last, batch.lengths, batch.order)
    hidden = model.hidden(batch.tokens, where, functools.partial(stack.run, so_far=so_far))
    # Each device's tokens are one list, so that no hidden state moves between devices.
    lists = sharding.constrain(sharding.as_lists(hidden, len(batch.counts)), "Z T D")
    at_scores = jnp.take_along_axis(lists, batch.read_at[..., None], axis=1)
    return (
        sharding.constrain(at_scores, "Z C D"),
        model.unembedding()[...],
        batch.target,
        batch.counts,
        model.dtype,
        model.last_step(),
    )


def _summed(each: Float[Array, "Z C"], batch: Packed) -> Float[Array, "P A"]:
    """Sums each answer's tokens wherever they are, with masks, so that the order never varies."""
    mine = batch.owner[..., None] == jnp.arange(batch.scored.size)
    return jnp.where(mine, each[..., None], 0).sum((0, 1)).reshape(batch.scored.shape)


def of_params(graph: nnx.GraphDef, params: blocks.Weights, batch: Packed) -> Float[Array, "P A"]:
    """`answer_logps` of the model with these weights."""
    return answer_logps(nnx.merge(graph, nnx.State(params)), batch)


def cast_for_compute(params: blocks.Weights, model: zoo.Model) -> blocks.Weights:
    """All or some weights of a model in its compute dtype, except those that are never narrowed."""
    return cast(params, model.dtype, models.never_narrowed(model))


@functools.partial(jax.jit, static_argnums=(1, 2))
def cast(
    params: PyTree, dtype: jax.typing.DTypeLike, exact: frozenset[str] = frozenset()
) -> PyTree:
    """Weights cast in place to `dtype`; adapters and few-bit weights are cast when used."""
    is_kept = lambda x: isinstance(x, adapted.Adapter) or quantised.is_quantised(x)

    def narrow(path: tuple, x: PyTree) -> PyTree:
        return x if is_kept(x) or ".".join(key.key for key in path) in exact else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(narrow, params, is_leaf=is_kept)


def compiled(mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """`of_params` compiled, one program for policy and reference: equal weights give equal bits."""
    replicated = jax.NamedSharding(mesh, jax.P())
    return jax.jit(of_params, static_argnums=0, out_shardings=replicated)


def of_examples(
    forward: Forward, examples: Sequence[Example], place: Place
) -> Float[np.ndarray, "examples A"]:
    """Log-probabilities of the answers of every example, in order, in nats."""
    found = []
    for update in batches.in_order(examples, place):
        total = np.zeros((place.shape.examples, place.shape.answers), np.float32)
        for batch in update.micro_batches:
            total += np.asarray(forward(batches.put(batch, place)))
        found.append(total[: len(update.source_rows)])
    return np.concatenate(found)


def of_texts(
    model: zoo.Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Float[np.ndarray, " A"]]:
    """Log-probability of each token of an answer to each prompt, given those before it, in nats.

    Compiled for a few sizes, powers of two. Nothing of shape [B, T, V] exists.
    """
    longest = max(len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
    most = max(map(len, answers))
    T, A = (generate.room_for(length) for length in (longest, most))
    tokens, read_at, target = (np.zeros((len(prompts), n), np.int32) for n in (T, A, A))
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[i, : len(prompt) + len(answer)] = [*prompt, *answer]
        read_at[i, : len(answer)] = np.arange(len(answer)) + len(prompt) - 1
        target[i, : len(answer)] = answer
    lengths = np.array([len(a) + len(b) for a, b in zip(prompts, answers, strict=True)], np.int32)
    counts = np.array([*map(len, answers)], np.int32)
    graph, state = nnx.split(model)
    found = np.asarray(_of_texts(graph, state, tokens, lengths, read_at, target, counts))
    return [row[: len(answer)] for row, answer in zip(found, answers, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _of_texts(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    read_at: Int[Array, "B A"],
    target: Int[Array, "B A"],
    counts: Int[Array, " B"],
) -> Float[Array, "B A"]:
    model = nnx.merge(graph, state)
    B, T = tokens.shape
    hidden = model.hidden(tokens, spans.causal(B, T, lengths))
    at_scores = jnp.take_along_axis(hidden, read_at[..., None], axis=1)
    head, last = model.unembedding()[...], model.last_step()
    found = token_logps.token_logps(
        sharding.constrain(at_scores, "Z C D"), head, target, counts, model.dtype, last
    )
    return sharding.whole(found)

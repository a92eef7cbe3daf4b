"""Every architecture in packed rows: alone, prompt once and separate give the same numbers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data.ids.examples import PairIds
from recipes.data.packed import batches, shapes, streams
from recipes.data.packed.packing import Shape
from recipes.training import logps as training_logps
from tests import in_float64
from tests.long_forms import full_but
from tests.recipes.data.packed.test_packing import random_pairs
from tests.zoo import twins
import zoo
from zoo.parts import rope, spans
from zoo.parts.token_logps import token_logps

LONGEST = 40


@functools.cache
def pairs():
    made = random_pairs(1, 5)
    draw = np.random.default_rng(2)
    long = [draw.integers(0, 97, n).astype(np.int32) for n in (8, 20, 22)]
    made.append(PairIds(5, *long, np.ones(20, bool), np.ones(22, bool)))
    return made


@functools.partial(jax.jit, static_argnums=0)
def token_scores(graph, state, batch):
    from flax import nnx

    model = nnx.merge(graph, state)
    where = spans.Spans(batch.positions, batch.first, batch.last, batch.lengths)
    hidden = model.hidden(batch.tokens, where)
    at_scores = hidden.reshape(1, -1, hidden.shape[-1])[:, batch.read_at[0]]
    head, cap = model.unembedding()[...], model.last_step()
    return token_logps(at_scores, head, batch.target, batch.counts, jnp.float32, cap)[0]


def scores(model, shape):
    """The log-probability of every scored token: (pair, answer) -> numbers in order."""
    from flax import nnx

    found = {}
    graph, state = nnx.split(model)
    for batch in batches.pack(pairs(), shape, [0]).micro_batches:
        numbers = np.asarray(token_scores(graph, state, jax.tree.map(jnp.asarray, batch)))
        for slot in range(len(pairs())):
            for answer in (0, 1):
                mine = batch.owner[0] == 2 * slot + answer
                if mine.any():
                    found[slot, answer] = numbers[mine]
    return found


def scores_alone(model):
    """The same, each answer as a text of its own, by whole logits."""
    texts, lengths = np.zeros((2 * len(pairs()), LONGEST), np.int32), []
    for row, pair in enumerate(pairs()):
        for answer, ids in enumerate((pair.chosen, pair.rejected)):
            text = np.concatenate([pair.prompt, ids])
            texts[2 * row + answer, : len(text)] = text
            lengths.append(len(text))
    where = spans.causal(*texts.shape)
    where = where._replace(lengths=jnp.broadcast_to(jnp.array(lengths)[:, None], texts.shape))
    logps = jax.nn.log_softmax(model.unembed(model.hidden(jnp.asarray(texts), where)))
    found = {}
    for row, pair in enumerate(pairs()):
        sides = (pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)
        for answer, (ids, scored) in enumerate(sides):
            at = len(pair.prompt) - 1 + np.arange(len(ids))
            found[row, answer] = np.asarray(logps[2 * row + answer, at, ids])[scored]
    return found


SHAPES = Shape(1, 256, 8, 2, 1), Shape(4, LONGEST, 8, 2, 4)
# Where a layer norms what a recurrence reads, which may be small, float32 is coarser: see the next.
COARSER = dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), 5e-5)


def compare(model, once, apart, bound=1e-5):
    assert not any(streams.fits_once(p, apart) for p in pairs()[-1:])
    assert apart_by(model, once, apart) <= bound


def apart_by(model, *shapes):
    """The worst of all scored tokens, against each answer alone."""
    expected, errors = scores_alone(model), []
    for shape in shapes:
        found = scores(model, shape)
        assert found.keys() == expected.keys()
        errors += [np.abs(found[key] - expected[key]) for key in expected]
    return float(np.concatenate(errors).max())  # of numpy, which passes on what is not a number


# Of llama, whose parts test_packing.py tries one by one, with `-m full`.
@pytest.mark.parametrize("family", full_but(twins.TWINS, "gpt_oss", "lfm2"))
def test_packed_is_alone_and_prompt_once_is_separate(family):
    model = twins.untrained(family, twins.RICHEST[family])
    compare(model, *SHAPES, bound=COARSER.get(family, 1e-5))


@pytest.mark.full
def test_in_float64_packed_is_alone():
    """Where a fault cannot pass for rounding."""
    told = in_float64.ran("recipes.families_in_float64", *twins.TWINS)
    found = json.loads(told.splitlines()[-1])
    assert found.keys() == twins.TWINS.keys()
    assert np.max([*found.values()]) <= 1e-11, found


@pytest.mark.parametrize(("family", "shape"), [("phi3", "long factors"), ("llama", "dynamic")])
def test_texts_whose_length_decides_how_they_turn(family, shape):
    """Pairs with an answer beyond the threshold have their prompt twice, in one row or in two."""
    model = twins.untrained(family, shape)
    limit = rope.limit(model.config.rope_parameters)
    assert limit in (16, 24)
    once = Shape(1, 128, 8, 2, 1, alike=limit)
    kept = [streams.fits_once(pair, once) for pair in pairs()]
    assert any(kept)
    assert not all(kept)
    assert all(streams.fits_a_row(pair, once) for pair in pairs())
    compare(model, once, Shape(4, LONGEST, 8, 2, 4, alike=limit))
    chosen = shapes.choose(pairs(), per_update=6, shards=1, most=512, alike=limit)
    assert chosen.alike == limit
    assert shapes.fill(pairs(), chosen).share > 0.5
    # Without the threshold the prompt would turn by the length of the other answer.
    wrong = scores(model, once._replace(alike=None))
    expected = scores_alone(model)
    assert max(np.abs(wrong[key] - expected[key]).max() for key in expected) > 1e-3


def test_a_window_reaches_over_the_fork():
    """In stored order a chosen token's window is not one run of keys."""
    model = twins.untrained("mistral", "window")
    wider = dataclasses.replace(model.config, sliding_window=12)
    other = type(model)(wider, __import__("flax").nnx.Rngs(0))
    from flax import nnx

    nnx.update(other, nnx.state(model))
    narrow, wide = (scores(m, Shape(1, 256, 8, 2, 1)) for m in (model, other))
    assert max(np.abs(narrow[key] - wide[key]).max() for key in wide) > 1e-2


@pytest.mark.parametrize("family", full_but(twins.TWINS, "llama"))
def test_wide_masters_give_the_bits_of_narrow_weights(family):
    """In bfloat16 the policy keeps float32 weights, the reference does not: equal all the same."""
    from flax import nnx

    model = twins.untrained(family, twins.RICHEST[family])
    policy = type(model)(model.config, nnx.Rngs(0), jnp.bfloat16)
    nnx.update(policy, nnx.state(model))
    weights = training_logps.cast_for_compute(nnx.to_pure_dict(nnx.state(policy)), policy)
    narrow = nnx.merge(nnx.graphdef(policy), nnx.State(weights))
    tokens = jnp.asarray(twins.TOKENS[:1])
    run = jax.jit(lambda model, tokens: model.hidden(tokens, spans.causal(*tokens.shape)))
    wide, thin = run(policy, tokens), run(narrow, tokens)
    assert wide.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.astype(jnp.float32), thin.astype(jnp.float32))


@pytest.mark.parametrize("family", twins.TWINS)
def test_norms_biases_and_sinks_do_not_decay(family):
    from flax import nnx, traverse_util

    from recipes.training import optimizer

    vectors = (
        "norm", "bias", "sinks", "taps", "decay_log", "shared.share", "scale", "correction", "act.",
        "skip",
    )  # fmt: skip
    said = twins.config_of(family, twins.RICHEST[family]).to_json_string(use_diff=True)
    decays = optimizer.matrices(nnx.state(zoo.abstract(json.loads(said))))
    for path, does in traverse_util.flatten_dict(decays).items():
        name = ".".join(path)
        assert does is not any(word in name for word in vectors), name

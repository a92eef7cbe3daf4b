"""What every score sees, read back from packed rows; single answers; several to one prompt."""

import functools
from typing import NamedTuple

from flax import nnx
from hypothesis import given, settings, strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data import mixture
from recipes.data.ids.examples import Answer, AnswerIds, PairIds, as_bytes
from recipes.data.packed import batches, packing, shapes, streams
from recipes.data.packed.packing import Item, Packed, Shape
from recipes.training import logps
from tests.conftest import large_weights, small_config
from zoo import llama
from zoo.parts import sharding


def single(draw, row, longest):
    """A prompt and an answer of random lengths; the last token of the answer counts."""
    prompt, answer = (draw.integers(0, 97, draw.integers(1, n + 1)) for n in longest)
    scored = draw.random(len(answer)) < 0.7
    scored[-1] = True
    return AnswerIds(row, prompt.astype(np.int32), answer.astype(np.int32), scored)


def singles(seed, count, longest=(8, 8)):
    draw = np.random.default_rng(seed)
    return [single(draw, row, longest) for row in range(count)]


def pairs(seed, count, longest=(8, 8)):
    """The answers of twice as many."""
    draw, made = np.random.default_rng(seed), []
    for row in range(count):
        one, other = single(draw, row, longest), single(draw, row, longest)
        answers = one.answer, other.answer, one.scored, other.scored
        made.append(PairIds(row, one.prompt, *answers))
    return made


def expected_scores(prompt, answer):
    """Before a scored token stands all of the prompt, and of the answer what comes before it."""
    return [
        ([*prompt, *answer.ids[:i]], token)
        for i, token in enumerate(answer.ids)
        if answer.scored[i]
    ]


def found_scores(batch, shape):
    """Owner -> for each of its scores the tokens that it sees, in the order of their positions."""
    found = {}
    rows_each = len(batch.tokens) // len(batch.counts)
    for g, count in enumerate(batch.counts):
        for at, target, owner in zip(
            batch.read_at[g, :count], batch.target[g], batch.owner[g], strict=False
        ):
            row, t = divmod(int(at), shape.row_length)
            row += g * rows_each
            keys = slice(batch.first[row, t], batch.last[row, t])
            order = np.argsort(batch.positions[row, keys])
            assert [*batch.positions[row, keys][order]] == [*range(len(order))]
            text = [*batch.tokens[row, keys][order]]
            found.setdefault(int(owner), []).append((text, target))
        assert (batch.owner[g, count:] == -1).all()
    return found


def check(update, examples, shape):
    """Every score of every answer is there once, and reads its own text and nothing else."""
    found = {}
    for batch in update.micro_batches:
        here = found_scores(batch, shape)
        assert not found.keys() & here.keys()  # an example is in one micro-batch
        found |= here
        counted = np.array([len(here.get(owner, [])) for owner in range(batch.scored.size)])
        assert batch.scored.ravel().tolist() == counted.tolist()
    expected = {
        slot * shape.answers + number: expected_scores(example.prompt, answer)
        for slot, example in enumerate(examples)
        for number, answer in enumerate(example.answers)
    }
    by_target = lambda scores: sorted(map(repr, scores))
    assert {o: by_target(s) for o, s in found.items()} == {
        o: by_target(s) for o, s in expected.items()
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=strategies.integers(0, 2**16),
    count=strategies.integers(1, 9),
    row_length=strategies.sampled_from([15, 16, 24, 64]),
    rows=strategies.integers(1, 3),
    shards=strategies.integers(1, 2),
    alike=strategies.sampled_from([None, 9]),
    made=strategies.sampled_from([singles, pairs]),
)
def test_every_score_sees_its_own_text(seed, count, row_length, rows, shards, alike, made):
    """Prompt once or apart, in one row or two, on one device or several."""
    examples = made(seed, count)
    rows = shards * max(rows, 2)
    answers = len(examples[0].answers)
    shape = Shape(rows, row_length, count, answers, few=rows, shards=shards, alike=alike)
    update = batches.pack(examples, shape, range(shards))
    check(update, examples, shape)
    assert update.source_rows.tolist() == [*range(count)]
    lengths = lambda made: [max(len(s.tokens), len(s.target)) for s in made]
    for example in examples:
        made = streams.item(example, shape).streams
        assert streams.fits_once(example, shape) == (len(made) == 1)
        assert streams.fits_a_row(example, shape) == (sum(lengths(made)) <= row_length)
        least = streams.needed(example, alike)
        for length in (least - 1, least):
            made_of = streams.item(example, shape._replace(row_length=length)).streams
            assert (sum(lengths(made_of)) <= length) == (length == least)
        assert streams.longest(example) == max(lengths(streams.separate(example)))
        if len(made) == 1:  # after a prompt of one token there may be a place too many
            spare = streams.stored_length(example) - sum(lengths(made))
            assert 0 <= spare <= (len(example.prompt) == 1)


def test_a_pair_whose_answers_turn_its_prompt_otherwise_is_not_one_stream():
    """`alike` counts the tokens of a whole text, its last one with them."""
    (one,) = pairs(0, 1)
    text = len(one.prompt) + max(len(one.chosen), len(one.rejected))
    shape = Shape(2, 64, 1, 2, 2)
    once = [streams.fits_once(one, shape._replace(alike=n)) for n in (None, text, text - 1)]
    assert once == [True, True, False]
    (other,) = singles(0, 1)
    assert streams.fits_once(other, shape._replace(alike=1))  # nothing is shared


def test_ratings_are_kept_in_their_slots():
    one, other = pairs(0, 2)
    update = batches.pack([one, other._replace(ratings=(2.5, 1.0))], Shape(1, 64, 2, 2, 1), [0])
    np.testing.assert_array_equal(update.ratings, [[np.nan, np.nan], [2.5, 1.0]])


def test_a_single_answer_as_ordinary_text():
    ids = lambda text: np.array([*map(ord, text)], np.int32)
    one = AnswerIds(3, ids("ab"), ids("xyz"), np.array([False, True, True]))
    row, (stream,) = streams.item(one, Shape(1, 16, 1, 1, 1))
    letters = lambda array: "".join(map(chr, array))
    assert (row, letters(stream.tokens)) == (3, "abxy")
    assert [*stream.positions] == [0, 1, 2, 3]
    assert [*stream.first] == [0, 0, 0, 0]
    assert [*stream.last] == [1, 2, 3, 4]
    assert (letters(stream.tokens[stream.read_at]), letters(stream.target)) == ("xy", "yz")
    assert [*stream.answer] == [0, 0]
    assert (streams.longest(one), streams.stored_length(one), streams.real_tokens(one)) == (4, 4, 5)
    assert as_bytes(one) != as_bytes(one._replace(scored=np.array([True, True, True])))


def test_a_single_answer_longer_than_a_row_is_refused_by_its_row():
    one = singles(0, 8, (9, 9))[5]._replace(prompt=np.zeros(30, np.int32))
    shape = Shape(2, 16, 8, 1, 2)
    with pytest.raises(ValueError, match=r"row 5 of the data has an answer that takes \d\d pos"):
        batches.pack([one], shape, [0])
    # It is one stream: two rows would not help.
    assert shapes.choose([one], per_update=1, shards=1, most=64, rows=1).row_length == 128


def test_an_update_of_single_answers_has_exactly_as_many():
    examples = singles(1, 10)
    shape = shapes.choose(examples, per_update=4, shards=1, most=64)
    assert (shape.examples, shape.answers) == (4, 1)
    part = mixture.Part("all", 1.0, examples, 9)
    updates = batches.training(mixture.endless([part], seed=0), shape, shards=[0])
    rows = []
    for update in (updates[i] for i in range(5)):
        here = sum(batch.is_here.astype(int) for batch in update.micro_batches)
        assert here.tolist() == [1, 1, 1, 1]
        assert update.scored.shape == update.ratings.shape == (4, 1)
        assert update.real_tokens == sum(
            streams.real_tokens(examples[row]) for row in update.source_rows
        )
        rows += update.source_rows.tolist()
    assert sorted(rows[:10]) == sorted(rows[10:]) == [*range(10)]  # two epochs
    place = batches.Place(shape, jax.NamedSharding(sharding.mesh_of(1, 1, 1), jax.P()))
    last = [len(update.source_rows) for update in batches.in_order(examples, place)]
    assert last == [4, 4, 2]


class Listed(NamedTuple):
    """A prompt and several answers to it."""

    prompt: np.ndarray
    answers: list[Answer]


def lists(seed, count, answers):
    """Each with a first stream for a pair of its answers, and one for each of the others."""
    draw, examples, items = np.random.default_rng(seed), [], []
    for row in range(count):
        some = [single(draw, row, (8, 8)) for _ in range(answers)]
        one, other, *others = some
        pair = PairIds(row, one.prompt, one.answer, other.answer, one.scored, other.scored)
        alone = [streams.separate(o._replace(prompt=one.prompt))[0] for o in others]
        alone = [s._replace(answer=s.answer + number) for number, s in enumerate(alone, 2)]
        items.append(Item(row, (streams.prompt_once(pair), *alone)))
        examples.append(Listed(one.prompt, [Answer(o.answer, o.scored) for o in some]))
    return examples, items


@pytest.mark.parametrize("row_length", [96, 24])
def test_packing_knows_no_number_of_answers(row_length):
    """Four answers behind a prompt are three streams: in one row, or in three of a micro-batch."""
    examples, items = lists(2, 6, 4)
    shape = Shape(4, row_length, 6, 4, few=4)
    rows = packing.pack_rows(items, shape)
    update = batches.Update(*[None] * len(batches.Update._fields))
    update = update._replace(micro_batches=[packing.build(b, shape, [0]) for b in rows])
    check(update, examples, shape)
    in_rows = {}
    for number, row in enumerate(row for batch in rows for row in batch):
        for slot, _ in row:
            in_rows.setdefault(slot, set()).add(number)
    assert max(map(len, in_rows.values())) == (1 if row_length == 96 else 3)


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_scores_are_summed_by_their_owners(answers):
    owner = np.array([[3, 0, 3, -1], [5, 0, -1, -1]])
    scored = np.zeros((6 // answers, answers), np.int32)
    scores = np.array([[1.0, 2, 4, 100], [8, 16, 100, 100]], np.float32)
    batch = Packed(*[None] * len(Packed._fields))
    batch = batch._replace(owner=jnp.asarray(owner), scored=jnp.asarray(scored))
    found = logps._summed(jnp.asarray(scores), batch)
    assert found.shape == scored.shape
    assert found.ravel().tolist() == [18, 0, 0, 5, 0, 8]


def texts(examples, longest):
    """Rows padded behind, and labels that are -100 where nothing is scored."""
    tokens = np.zeros((len(examples), longest), np.int64)
    labels = np.full_like(tokens, -100)
    for i, one in enumerate(examples):
        n, m = len(one.prompt), len(one.answer)
        tokens[i, : n + m] = np.concatenate([one.prompt, one.answer])
        labels[i, n : n + m] = np.where(one.scored, one.answer, -100)
    return tokens, labels


@functools.cache
def asked():
    """A small model, single answers, and how they are packed: several rows and micro-batches."""
    graph, state = nnx.split(large_weights(llama.Model(small_config(), nnx.Rngs(0)), scale=0.5))
    mesh = sharding.mesh_of(1, 1, 1)
    shape = Shape(2, 24, 8, 1, few=2)
    place = batches.Place(shape, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    return graph, state, singles(3, 11), place


def test_single_answers_packed_are_alone():
    graph, state, examples, place = asked()
    with jax.set_mesh(place.row_sharding.mesh):
        forward = functools.partial(logps.compiled(place.row_sharding.mesh), graph)
        params = nnx.to_pure_dict(state)
        found = logps.of_examples(functools.partial(forward, params), examples, place)
    tokens, labels = texts(examples, 16)

    @jax.jit
    def alone(state, tokens):
        each = jax.nn.log_softmax(nnx.merge(graph, state)(tokens)[:, :-1])
        return jnp.take_along_axis(each, tokens[:, 1:, None], -1)[..., 0]

    each = np.asarray(alone(state, jnp.asarray(tokens, jnp.int32)))
    expected = np.where(labels[:, 1:] == -100, 0, each).sum(1, keepdims=True)
    assert found.shape == (11, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found).max() > 5


def test_mean_loss_per_token_is_that_of_transformers():
    """Its own loss, with labels, of a batch that is padded."""
    torch = pytest.importorskip("torch")
    from tests.zoo import twins
    import zoo

    original, folder = twins.twin("llama", "plain")
    mesh = sharding.mesh_of(1, 1, 1)
    *_, examples, place = asked()
    with jax.set_mesh(mesh):
        graph, state = nnx.split(zoo.load(folder, mesh=mesh))
        forward = functools.partial(logps.compiled(mesh), graph, nnx.to_pure_dict(state))
        total = logps.of_examples(forward, examples, place).sum()
    counted = sum(int(update.scored.sum()) for update in batches.in_order(examples, place))
    tokens, labels = map(torch.tensor, texts(examples, 16))
    with torch.no_grad():
        theirs = float(original(tokens, labels=labels, use_cache=False).loss)
    assert -total / counted == pytest.approx(theirs, rel=1e-5)

"""The layout by eye, and by equality: packed is alone, prompt once is separate."""

import functools
from unittest import mock

from flax import nnx
from hypothesis import given, settings, strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data import mixture
from recipes.data.ids.examples import PairIds
from recipes.data.packed import batches, packing, shapes, streams, stripes
from recipes.data.packed.packing import Shape
from recipes.training.logps import answer_logps
from tests.conftest import large_weights, small_config
from tests.long_forms import full_but
from zoo import llama
from zoo.parts.token_logps import token_logps


def ids(text):
    return np.array([ord(letter) for letter in text], np.int32)


def pair(prompt, chosen, rejected, row=0, chosen_scored=None):
    scored = np.ones(len(chosen), bool) if chosen_scored is None else np.array(chosen_scored, bool)
    return PairIds(
        row, ids(prompt), ids(chosen), ids(rejected), scored, np.ones(len(rejected), bool),
    )  # fmt: skip


def letters(array):
    return "".join(map(chr, array))


def test_prompt_once_as_it_stands_in_the_design():
    stream = streams.prompt_once(pair("ab", "xyz", "uv"))
    assert letters(stream.tokens) == "yxabu"
    assert [*stream.positions] == [3, 2, 0, 1, 2]
    seen = [
        letters(stream.tokens[first:last])
        for first, last in zip(stream.first, stream.last, strict=True)
    ]
    assert seen == ["yxab", "xab", "a", "ab", "abu"]
    scores = [
        letters([stream.tokens[source], target])
        for source, target in zip(stream.read_at, stream.target, strict=True)
    ]
    assert scores == ["bx", "xy", "yz", "bu", "uv"]
    assert [*stream.answer] == [0, 0, 0, 1, 1]


def test_only_scored_tokens_are_scored():
    stream = streams.prompt_once(pair("ab", "xyz", "u", chosen_scored=[0, 1, 1]))
    assert letters(stream.target) == "yzu"
    assert letters(stream.tokens[stream.read_at]) == "xyb"


def test_separate_as_ordinary_text():
    chosen, rejected = streams.separate(pair("ab", "xyz", "uv"))
    assert letters(chosen.tokens) == "abxy"
    assert letters(rejected.tokens) == "abu"
    assert [*chosen.positions] == [0, 1, 2, 3]
    assert letters(chosen.tokens[chosen.read_at]) == "bxy"
    assert [*rejected.answer] == [1, 1]


def placed(examples, shape):
    """Micro-batches of rows."""
    return packing.pack_rows([streams.item(example, shape) for example in examples], shape)


def test_a_row_of_two_pairs():
    shape = Shape(rows=2, row_length=12, examples=2, answers=2, few=2, shards=2)
    (rows,) = placed([pair("ab", "xyz", "uv"), pair("c", "p", "qr")], shape)
    batch = packing.build(rows, shape, range(2))
    assert letters(batch.tokens[0, :7]) == "yxabucq"
    assert [*batch.positions[0, :7]] == [3, 2, 0, 1, 2, 0, 1]
    assert [*batch.first[0]] == [0, 1, 2, 2, 2, 5, 5, 7, 8, 9, 10, 11]
    assert [*batch.last[0]] == [4, 4, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # padding sees itself
    assert [*batch.counts] == [8, 0]
    assert [*batch.owner[0]] == [0, 0, 0, 1, 1, 2, 3, 3, -1, -1, -1, -1]
    assert letters(batch.target[0, :8]) == "xyzuvpqr"
    assert [*batch.owner[1]] == [-1] * 12
    assert batch.scored.tolist() == [[3, 2], [1, 2]]
    assert batch.is_here.all()


def test_a_pair_too_long_for_a_row_is_stored_separately_within_one_micro_batch():
    shape = Shape(rows=3, row_length=8, examples=3, answers=2, few=1)
    long = pair("abcd", "wxyz", "stuv")
    first, second = placed([long, pair("a", "b", "c"), long], shape)
    rows = first + second
    where = {}
    for number, row in enumerate(rows):
        for slot, _ in row:
            where.setdefault(slot, []).append(number)
    assert where[0] == [0, 1]
    assert where[2] == [3, 4]  # row 2 is the last of its micro-batch
    assert not streams.fits_once(long, shape)
    with pytest.raises(ValueError, match="needs 2 rows in a micro-batch"):
        placed([long], shape._replace(rows=1))


def test_prompts_of_one_token_leave_room_for_their_scores():
    """Both first tokens are read off the prompt: one score more than there are tokens."""
    one = pair("a", "xy", "uvw")
    assert (len(streams.prompt_once(one).tokens), streams.stored_length(one)) == (4, 5)
    for rows, row_length in ((1, 5), (1, 9), (2, 9), (1, 10)):
        shape = Shape(rows, row_length, examples=4, answers=2, few=rows)
        update = batches.pack([one] * 4, shape, [0])
        assert sum(int(batch.counts.sum()) for batch in update.micro_batches) == 4 * 5
    assert [streams.fits_once(one, Shape(1, length, 1, 2, 1)) for length in (4, 5)] == [False, True]
    # Also in each part of a row that two devices share.
    shape = Shape(1, 512, examples=256, answers=2, few=1, context=2)
    (batch,) = batches.pack([pair("a", "x", "u")] * 256, shape, [0]).micro_batches
    assert batch.counts.tolist() == [256, 256]


def test_a_row_that_two_devices_share_is_read_where_its_tokens_are():
    shape = Shape(rows=1, row_length=8, examples=1, answers=2, few=1, context=2)
    (rows,) = placed([pair("ab", "xyz", "uv")], shape)
    batch = packing.build(rows, shape, [0])
    # yxab sees four keys; u sees those of both stripes, and is the first one's.
    assert batch.order.tolist() == [[1, 0]]
    assert letters(batch.tokens[0, [0, 4, 5, 6, 7]]) == "uyxab"
    assert [*batch.first[0]] == [2, 5, 6, 7, 0, 1, 2, 2]
    assert [*batch.last[0]] == [5, 6, 7, 8, 4, 4, 3, 4]
    assert [*batch.positions[0]] == [2, 0, 0, 0, 3, 2, 0, 1]
    assert batch.counts.tolist() == [1, 4]
    assert (batch.read_at[0, 0], letters(batch.target[0, :1])) == (0, "v")
    assert batch.read_at[1, :4].tolist() == [3, 1, 0, 3]
    assert letters(batch.target[1, :4]) == "xyzu"
    assert batch.owner[0, :2].tolist() == [1, -1]
    assert batch.owner[1, :4].tolist() == [0, 0, 0, 1]


def test_a_part_of_a_row_may_have_more_scores_than_tokens(monkeypatch):
    """A stripe with the only token of a prompt, and without the place that its pair leaves."""
    monkeypatch.setattr(stripes, "STRIPE", 4)
    shape = Shape(1, 64, examples=10, answers=2, few=1, context=8)
    (batch,) = batches.pack([pair("a", "xyz", "uvw")] * 10, shape, [0]).micro_batches
    assert batch.counts.sum() == 60
    assert batch.counts.max() > 8


@pytest.mark.parametrize("context", [2, 4, 8])
@pytest.mark.parametrize("longest", [3, 12])
@pytest.mark.parametrize("width", [4, 512])
def test_every_score_is_read_once_wherever_rows_are_cut(context, longest, width, monkeypatch):
    """Of prompts of one token too, which have more scores than tokens."""
    monkeypatch.setattr(stripes, "STRIPE", width)

    def scores(context):
        shape = Shape(4, 64, 24, 2, few=4, shards=2, context=context)
        for batch in batches.pack(random_pairs(3, 24, longest), shape, range(2)).micro_batches:
            parts = batch.tokens.reshape(2, 2, context, -1).swapaxes(1, 2).reshape(2 * context, -1)
            for part, read_at, target, owner, n in zip(
                parts, batch.read_at, batch.target, batch.owner, batch.counts, strict=True
            ):
                assert (owner[n:] == -1).all()
                yield from zip(part[read_at[:n]], target[:n], owner[:n], strict=True)

    found, expected = sorted(scores(context)), sorted(scores(1))
    assert len(expected) > 48
    assert found == expected


def random_pairs(seed, count, longest=12):
    draw = np.random.default_rng(seed)
    some = lambda: draw.integers(0, 97, draw.integers(1, longest)).astype(np.int32)
    made = []
    for row in range(count):
        prompt, chosen, rejected = some(), some(), some()
        masks = [draw.random(len(answer)) < 0.7 for answer in (chosen, rejected)]
        for mask in masks:
            mask[-1] = True
        made.append(PairIds(row, prompt, chosen, rejected, *masks))
    return made


LONGEST = 96


@jax.jit
def _of_text(model, ids, lengths):
    return jax.nn.log_softmax(model(ids, lengths))


def of_text(model, text):
    """The log-probabilities of the next token, [T, V]: one program for texts of any length."""
    ids = np.zeros((1, LONGEST), np.int32)
    ids[0, : len(text)] = text
    return np.asarray(_of_text(model, ids, np.array([len(text)])))[0, : len(text)]


def logps_alone(model, pair, ld_alpha=1.0):
    """Each answer as a text of its own, by whole logits."""
    found = []
    shared = min(int(answer.scored.sum()) for answer in pair.answers)
    for answer, scored in pair.answers:
        text = np.concatenate([pair.prompt, answer])
        logps = of_text(model, text[:-1])
        of_answer = logps[len(pair.prompt) - 1 + np.arange(len(answer)), answer]
        of_answer = of_answer[scored]
        found.append(float(of_answer[:shared].sum() + ld_alpha * of_answer[shared:].sum()))
    return found


def packed_logps(model, pairs, shape):
    total = np.zeros((shape.examples, shape.answers))
    for batch in batches.pack(pairs, shape, range(shape.shards)).micro_batches:
        total += np.asarray(answer_logps(model, jax.tree.map(jnp.asarray, batch)))
    return total[: len(pairs)]


def test_packed_is_alone(small_model):
    pairs = random_pairs(0, 7)
    expected = [logps_alone(small_model, pair) for pair in pairs]
    found = packed_logps(small_model, pairs, Shape(2, 48, 8, 2, 1))
    np.testing.assert_allclose(found, expected, atol=2e-5 * 12)
    assert np.abs(found).max() > 10


@pytest.mark.parametrize("shape", [Shape(2, 48, 8, 2, 1), Shape(4, 24, 8, 2, 2)])
def test_tokens_beyond_the_shorter_answer_count_less(small_model, shape):
    """LD-DPO, with the prompt once, and with each answer after its own."""
    pairs = random_pairs(0, 7)
    assert all(streams.fits_once(pair, shape) for pair in pairs) == (shape.row_length == 48)
    expected = [logps_alone(small_model, pair, 0.25) for pair in pairs]
    found = packed_logps(small_model, pairs, shape._replace(ld_alpha=0.25))
    np.testing.assert_allclose(found, expected, atol=2e-5 * 12)
    whole = packed_logps(small_model, pairs, shape)
    np.testing.assert_array_equal(
        packed_logps(small_model, pairs, shape._replace(ld_alpha=1.0)), whole
    )
    assert (found > whole).any(1).sum() > 3


def test_token_by_token_within_1e_5():
    """Prompt once, packed among others, against the plain text: each scored token.

    With weights half as large as elsewhere: at full size float32 itself moves a log-probability of
    -13 by 1.7e-5 between two shapes of the same text.
    """
    small_model = large_weights(llama.Model(small_config(), nnx.Rngs(0)), scale=0.5)
    pairs = random_pairs(1, 6)
    shape = Shape(1, 256, 8, 2, 1)
    (batch,) = batches.pack(pairs, shape, [0]).micro_batches
    from zoo.parts.spans import Spans

    where = Spans(*map(jnp.asarray, (batch.positions, batch.first, batch.last, batch.lengths)))
    hidden = small_model.hidden(jnp.asarray(batch.tokens), where)
    head = small_model.unembedding()[...]
    at_scores = hidden[:, batch.read_at[0]]
    found = token_logps(
        at_scores, head, jnp.asarray(batch.target), jnp.asarray(batch.counts), jnp.float32
    )[0]
    for slot, one in enumerate(pairs):
        sides = (one.chosen, one.chosen_scored), (one.rejected, one.rejected_scored)
        for side, (answer, scored) in enumerate(sides):
            text = np.concatenate([one.prompt, answer])
            logps = of_text(small_model, text[:-1])
            expected = logps[len(one.prompt) - 1 + np.arange(len(answer)), answer][scored]
            mine = batch.owner[0] == 2 * slot + side
            np.testing.assert_allclose(found[mine], expected, rtol=0, atol=1e-5)


def test_prompt_once_is_separate(small_model):
    pairs = random_pairs(2, 5)
    draw = np.random.default_rng(2)
    long = [draw.integers(0, 97, n).astype(np.int32) for n in (8, 20, 22)]
    pairs.append(PairIds(5, *long, np.ones(20, bool), np.ones(22, bool)))
    once = packed_logps(small_model, pairs, Shape(2, 64, 8, 2, 1))
    # Rows too short for any prompt-once stream of the longer pairs.
    apart = packed_logps(small_model, pairs, Shape(4, 40, 8, 2, 2))
    assert any(not streams.fits_once(p, Shape(4, 40, 8, 2, 2)) for p in pairs)
    np.testing.assert_allclose(once, apart, atol=1e-4)


def test_chunked_is_whole(small_model, monkeypatch):
    pairs = random_pairs(3, 6)
    shape = Shape(2, 64, 8, 2, 1)
    whole = packed_logps(small_model, pairs, shape)
    monkeypatch.setattr("zoo.parts.token_logps.FEWEST", 8)  # scores at a time
    monkeypatch.setattr("zoo.parts.token_logps.LOGITS_BYTES", {"cpu": 0})
    np.testing.assert_allclose(packed_logps(small_model, pairs, shape), whole, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=strategies.lists(
        strategies.tuples(*[strategies.integers(1, 30)] * 3), min_size=1, max_size=24
    ),
    rows=strategies.integers(2, 5),
)
def test_nothing_is_lost_and_nothing_overlaps(lengths, rows):
    pairs = [pair("p" * p, "c" * c, "r" * r, row=i) for i, (p, c, r) in enumerate(lengths)]
    shape = Shape(rows, 64, len(pairs), 2, few=max(1, rows // 2))
    update = batches.pack(pairs, shape, [0])
    for slot, one in enumerate(pairs):
        for side, answer in enumerate((one.chosen, one.rejected)):
            held = [int((batch.owner == 2 * slot + side).sum()) for batch in update.micro_batches]
            assert sorted(held)[-1] == len(answer) == sum(held)  # all in one micro-batch
    for batch in update.micro_batches:
        steps = np.arange(shape.row_length)
        assert (batch.first <= steps).all()
        assert (batch.last > batch.first).all()
        assert (batch.is_here == np.isin(np.arange(len(pairs)), batch.owner // 2)).all()


def bench_pairs():
    """Zipf's words in texts of log-normal lengths, half of an answer's stream prompt."""
    draw = np.random.default_rng(0)
    shares = 1.0 / np.arange(1, 32000 - 9)
    shares /= shares.sum()
    text = lambda n: (draw.choice(32000 - 10, n, p=shares) + 10).astype(np.int32)
    pairs = []
    for row in range(512):
        total = int(np.clip(draw.lognormal(np.log(180), 0.6), 24, 512))
        prompt = max(4, int(total * 0.4))
        other = int(np.clip(draw.lognormal(np.log(180), 0.6), 24, 512))
        rejected = max(4, min(other - int(other * 0.4), 512 - prompt))
        end = np.array([2], np.int32)
        texts = [text(prompt), text(total - prompt - 1), text(rejected - 1)]
        texts = [texts[0], *(np.concatenate([answer, end]) for answer in texts[1:])]
        masks = [np.ones(len(answer), bool) for answer in texts[1:]]
        pairs.append(PairIds(row, *texts, *masks))
    assert sum(map(streams.real_tokens, pairs)) == 209_072
    return pairs


def test_positions_per_real_token_on_the_bench_pairs():
    """128 pairs an update, the last micro-batch included."""
    pairs = bench_pairs()
    shape = shapes.choose(pairs, per_update=128, shards=1, most=4096)
    updates = [batches.pack(pairs[i : i + 128], shape, [0]) for i in range(0, 512, 128)]
    assert sum(update.positions for update in updates) / 209_072 <= 0.84


@pytest.mark.parametrize(("shards", "least"), full_but([(1, 0.95), (8, 0.88)], (8, 0.88)))
def test_rows_are_chosen_so_that_little_is_padding(shards, least):
    pairs = bench_pairs()
    shape = shapes.choose(pairs, per_update=128, shards=shards, most=4096)
    assert shapes.fill(pairs, shape).share >= least
    updates = [batches.pack(pairs[i : i + 128], shape, range(shards)) for i in range(0, 512, 128)]
    filled = sum(u.stored_tokens for u in updates) / sum(u.positions for u in updates)
    assert filled >= least
    kinds = {batch.tokens.shape for update in updates for batch in update.micro_batches}
    assert len(kinds) <= 2


def test_a_leak_between_streams_would_be_seen(small_model):
    """The equalities above would fall if a token saw one key too many."""
    pairs = random_pairs(4, 4)
    shape = Shape(1, 128, 4, 2, 1)
    (batch,) = batches.pack(pairs, shape, [0]).micro_batches
    right = answer_logps(small_model, jax.tree.map(jnp.asarray, batch))
    leaky = batch._replace(first=np.maximum(batch.first - 1, 0))
    wrong = answer_logps(small_model, jax.tree.map(jnp.asarray, leaky))
    assert jnp.abs(right - wrong).max() > 1e-2


def test_bfloat16_has_the_same_ones_as_float32():
    model = large_weights(llama.Model(small_config(), nnx.Rngs(0)))
    narrow = large_weights(llama.Model(small_config(), nnx.Rngs(0), jnp.bfloat16))
    pairs = random_pairs(5, 4)
    shape = Shape(1, 128, 4, 2, 1)
    wide = packed_logps(model, pairs, shape)
    np.testing.assert_allclose(packed_logps(narrow, pairs, shape), wide, rtol=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_a_function_of_the_seed(seed):
    pairs = random_pairs(6, 10)
    shape = Shape(2, 64, 4, 2, 1)
    endless = lambda seed: mixture.endless([mixture.Part("all", 1.0, pairs, 9)], seed)
    stream = lambda seed: batches.training(endless(seed), shape, shards=[0])
    rows = [stream(seed)[i].source_rows.tolist() for i in range(5)]  # 20 pairs: two epochs
    assert rows == [stream(seed)[i].source_rows.tolist() for i in range(5)]
    flat = [row for update in rows for row in update]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert rows != [stream(seed + 1)[i].source_rows.tolist() for i in range(5)]


def test_an_update_may_be_of_one_pair():
    """An endless stream has as many as an index can count; rounded up it would be one more."""
    part = mixture.Part("all", 1.0, random_pairs(6, 5), 9)
    updates = batches.training(mixture.endless([part], 0), Shape(1, 64, 1, 2, 1), shards=[0])
    of = lambda dataset: [next(dataset).source_rows.tolist() for _ in range(5)]
    assert sorted(of(iter(updates.to_iter_dataset()))) == [[0], [1], [2], [3], [4]]


def test_each_process_builds_the_shards_of_its_devices():
    """On a pod the shards of two processes alternate."""
    alternating = mock.Mock(spec=jax.NamedSharding)
    parts = {"a": (slice(0, 1),), "b": (slice(2, 3),), "c": (slice(2, 3),)}
    alternating.addressable_devices_indices_map.return_value = parts
    assert batches.shards_here(batches.Place(Shape(8, 32, 8, 2, 8, 4), alternating)) == [0, 2]
    pairs = random_pairs(7, 8)
    shape = Shape(8, 32, 8, 2, few=8, shards=4)
    whole = batches.pack(pairs, shape, range(4)).micro_batches[0]
    mine = batches.pack(pairs, shape, [0, 2]).micro_batches[0]
    by_rows = lambda batch: batch[: batch._fields.index("scored")]
    for ours, all_rows in zip(by_rows(mine), by_rows(whole), strict=True):
        by_shard = all_rows.reshape(4, -1, *all_rows.shape[1:])
        np.testing.assert_array_equal(ours.reshape(2, *by_shard.shape[1:]), by_shard[[0, 2]])
    np.testing.assert_array_equal(mine.is_here, whole.is_here)


def test_pairs_longer_than_the_rows_are_given_two_of_them():
    short = [pair("p" * 30, "c" * 2, "r" * 2, row=i) for i in range(40)]
    long = pair("p", "c" * 60, "r" * 60, row=40)
    choose = functools.partial(shapes.choose, [*short, long], per_update=41, shards=1, most=256)
    shape = choose(row_length=64)
    assert shape.rows >= 2
    update = batches.pack([*short, long], shape, [0])
    assert sum(int((batch.owner // 2 == 40).sum()) for batch in update.micro_batches) == 120
    with pytest.raises(ValueError, match=r"per_device_parallelism=2"):
        choose(row_length=64, rows=1)
    assert choose().row_length >= streams.stored_length(long)


def test_gradients_add_up_in_float32_under_bfloat16():
    """A token that occurs a thousand times, and a head read in many chunks."""
    config = small_config(vocab_size=11)
    tokens = np.tile(np.arange(1, 4, dtype=np.int32), 341)[:1000]
    one = PairIds(0, tokens[:1], tokens, tokens[::-1].copy(), *[np.ones(1000, bool)] * 2)
    shape = Shape(2, 1024, 1, 2, 2)
    (batch,) = batches.pack([one], shape, [0]).micro_batches
    batch = jax.tree.map(jnp.asarray, batch)
    gradients = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = large_weights(llama.Model(config, nnx.Rngs(0), dtype), scale=0.2)
        graph, state = nnx.split(model)
        summed = lambda state, graph=graph: answer_logps(nnx.merge(graph, state), batch).sum()
        gradient = nnx.to_pure_dict(jax.jit(jax.grad(summed))(state))
        assert gradient["embedding"].dtype == jnp.float32
        gradients.append(gradient)
    for name in ("embedding", "head"):
        wide, narrow = (np.asarray(gradient[name]) for gradient in gradients)
        apart = np.linalg.norm(wide - narrow) / np.linalg.norm(wide)
        assert apart < 0.02, (name, apart)

"""One update against plain arithmetic, and by hand: what is summed, averaged, in which order."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recipes import evaluation, logps, losses, optimizer, reference, reference_cache, step
from recipes.configs import tiny
from recipes.data import batches
from recipes.data.packing import Shape
from recipes.data.reading import HeldOut
from recipes.data.tokens import PairIds
from recipes.prepare import Run
from tests.conftest import large_weights, small_config
from tests.recipes.test_packing import random_pairs
from zoo import llama, sharding

PAIRS, BETA, RATE = 4, 0.5, 0.25
LOSS = functools.partial(losses.sigmoid, beta=BETA, label_smoothing=0.0)
# What the reference says of the pairs of the update.
THEIRS = np.array([[-20.0, -25], [-31, -30], [-12, -8], [-40, -44]], np.float32)


@pytest.fixture(scope="module")
def work():
    """A small policy, pairs, and the programs with plain gradient descent."""
    mesh = sharding.mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        config = small_config(num_hidden_layers=2, hidden_size=16, head_dim=4)
        graph, state = nnx.split(large_weights(llama.Model(config, nnx.Rngs(0)), scale=0.3))
        params = jax.device_put(nnx.to_pure_dict(state), jax.NamedSharding(mesh, jax.P()))
        descent = optax.sgd(RATE)
        programs = step.compiled(
            params, optimizer.init(descent, params, mesh), graph=graph, adamw=descent, loss=LOSS,
            beta=BETA, pairs=PAIRS,
        )  # fmt: skip
        yield graph, params, programs, random_pairs(0, PAIRS), mesh


def place_of(mesh, rows, row_length):
    rows_place = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    return batches.Place(Shape(rows, row_length, PAIRS, 2, rows), rows_place)


def summed(work, rows, row_length):
    """The sums of an update, and over how many micro-batches."""
    _, params, programs, pairs, mesh = work
    place = place_of(mesh, rows, row_length)
    update = batches.pack(pairs, place.shape, [0])
    sums = programs.zero()
    for packed in update.micro_batches:
        sums = programs.add(sums, params, jnp.asarray(THEIRS), batches.put(packed, place))
    return sums, len(update.micro_batches)


def plain_logps(graph, pairs, params):
    """Each answer as a text of its own, by whole logits; what stands behind a text is not seen."""
    texts = [
        (np.concatenate([pair.prompt, answer]), len(pair.prompt), scored)
        for pair in pairs
        for answer, scored in (
            (pair.chosen, pair.chosen_scored),
            (pair.rejected, pair.rejected_scored),
        )
    ]
    longest = max(len(text) for text, *_ in texts)
    tokens, masks = np.zeros((2, len(texts), longest), np.int32)
    for i, (text, start, scored) in enumerate(texts):
        tokens[i, : len(text)], masks[i, start : len(text)] = text, scored
    logits = nnx.merge(graph, nnx.State(params))(jnp.asarray(tokens))
    each = jax.nn.log_softmax(logits[:, :-1])
    at = jnp.take_along_axis(each, tokens[:, 1:, None], -1)[..., 0]
    return (at * masks[:, 1:]).sum(-1).reshape(-1, 2)


def apart(found, expected):
    """How far two gradients are apart, as a share of the second."""
    difference = jax.tree.map(lambda a, b: a - b, found, expected)
    return float(optax.tree.norm(difference) / optax.tree.norm(expected))


def test_an_update_is_that_of_the_mean_loss_over_its_pairs(work):
    """Not over those of a micro-batch; what the reference says is given for all of them at once."""
    graph, params, *_, pairs, _ = work

    def mean_loss(params):
        ours = plain_logps(graph, pairs, params)
        margins = (ours - THEIRS)[:, 0] - (ours - THEIRS)[:, 1]
        return jnp.mean(-jax.nn.log_sigmoid(BETA * margins)), ours

    expected, ours = jax.jit(jax.grad(mean_loss, has_aux=True))(params)
    sums, count = summed(work, 1, 40)
    assert 1 < count < PAIRS  # micro-batches, one of them with several pairs
    np.testing.assert_allclose(sums.policy_logps, ours, rtol=1e-4)
    np.testing.assert_array_equal(sums.reference_logps, THEIRS)
    assert apart(sums.gradient, expected) < 1e-4
    assert apart(sums.gradient["blocks"], expected["blocks"]) < 1e-4


def test_two_pairs_by_hand(work):
    """Against the gradient, and the figures of the pairs before it."""
    _, params, programs, *_ = work
    gradient = jax.tree.map(jnp.zeros_like, params)
    gradient["norm"]["scale"] = gradient["norm"]["scale"].at[0].set(3.0).at[1].set(-4.0)
    # Log-ratios: 0.5 and 0 (won), -1 and 1 (lost).
    ours = jnp.array([[-1.0, -2.0], [-3.0, -1.0]])
    theirs = jnp.array([[-1.5, -2.0], [-2.0, -2.0]])
    state = optimizer.init(optax.sgd(RATE), params, work[-1])
    before = np.asarray(params["norm"]["scale"])
    kept = jax.tree.map(lambda x: x + 0, params)  # which is given away
    moved, _, values = programs.apply(step.Sums(gradient, ours, theirs), kept, state)
    np.testing.assert_allclose(
        np.asarray(moved["norm"]["scale"]) - before, [-0.75, 1.0, *[0] * 14], atol=1e-6
    )
    softplus = lambda x: math.log1p(math.exp(x))
    expected = {
        "dpo_loss": (softplus(-0.5 * 0.5) + softplus(0.5 * 2)) / 2,
        "dpo_margin_policy": (1 - 2) / 2,
        "dpo_margin_ref": (0.5 + 0) / 2,
        "dpo_accuracy": 0.5,
        "dpo_chosen_reward": 0.5 * (0.5 - 1) / 2,
        "dpo_rejected_reward": 0.5 * (0 + 1) / 2,
        "logps_chosen": -2,
        "logps_rejected": -1.5,
        "drift_chosen": -0.25,
        "drift_rejected": 0.5,
        "gradient_norm": 5,
        "skipped": 0,
    }
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(value, rel=1e-6), name


# Seven pairs whose scored tokens tell them apart; four of them make an update.
ANSWERS = [(5, 1), (2, 7), (3, 3), (9, 4), (1, 8), (6, 2), (4, 9)]


def told_apart(rows):
    one = np.array([1], np.int32)
    text = lambda n: np.arange(n, dtype=np.int32)
    return [
        PairIds(row, one, text(c), text(r), np.ones(c, bool), np.ones(r, bool))
        for row, (c, r) in zip(rows, ANSWERS, strict=True)
    ]


def counting(batch):
    """In place of a model: minus the number of scored tokens of each answer."""
    owner, (P, A) = np.asarray(batch.owner).ravel(), batch.scored.shape
    counted = np.bincount(owner[owner >= 0], minlength=P * A).reshape(P, A)
    return jnp.asarray(-counted.astype(np.float32))


def test_every_pair_is_asked_once_and_answered_in_order(work):
    """Over micro-batches, updates, and the update at the end that is not full."""
    place = place_of(work[-1], 1, 16)
    assert len(next(batches.in_order(told_apart(range(7)), place)).micro_batches) > 1
    found = logps.of_examples(counting, told_apart(range(7)), place)
    np.testing.assert_array_equal(found, -np.array(ANSWERS))


def test_an_evaluation_by_hand(work):
    theirs = np.array([[-4, -2]] * 3 + [[-8, -8]] * 4, np.float32)
    held_out = HeldOut("mine", told_apart(range(7)))
    place = place_of(work[-1], 1, 16)
    found = evaluation.evaluate(held_out, counting, theirs, place, loss=LOSS, beta=BETA)
    ratios = -np.array(ANSWERS) - theirs
    margins = ratios[:, 0] - ratios[:, 1]
    expected = {
        "dpo_loss": np.log1p(np.exp(-BETA * margins)).mean(),
        "dpo_accuracy": (margins > 0).mean(),
        "dpo_margin_ref": -6 / 7,
        "length_chosen": 30 / 7,
        "length_rejected": 34 / 7,
    }
    for name, value in expected.items():
        assert found[f"eval/mine/{name}"] == pytest.approx(value, rel=1e-6), name


def test_kept_answers_of_a_reference_go_to_their_pairs(work, tmp_path, monkeypatch):
    """The rows of an update are those of the source, in any order, and with gaps."""
    graph, params, *_, mesh = work
    model = nnx.merge(graph, nnx.State(params))
    monkeypatch.setattr(reference, "load", lambda *_: model)
    rows = [40, 3, 17, 8, 0, 25, 11]
    place = place_of(mesh, 1, 16)
    pairs = told_apart(rows)
    run = Run(*[None] * len(Run._fields))._replace(
        mesh=mesh, pairs=pairs, held_out=[HeldOut("mine", pairs[2:5])], place=place,
        reference_cache=tmp_path,
    )  # fmt: skip
    config = tiny.get_config()
    config.reference_mode = "cached"
    asked = lambda graph, params, batch: counting(batch)
    frozen = reference.ready(config, model, run, asked, lambda: False)
    assert frozen.model is None
    np.testing.assert_array_equal(frozen.held_out[0], -np.array(ANSWERS)[2:5])
    for order in ([4, 0, 6, 2], [5, 3]):
        update = batches.pack([pairs[i] for i in order], place.shape, [0])
        found = np.asarray(frozen.of_batch(update.micro_batches[0], update.source_rows))
        np.testing.assert_array_equal(found[: len(order)], -np.array(ANSWERS)[order])
        assert not found[len(order) :].any()


def test_the_gate_looks_at_every_pair(work):
    place = place_of(work[-1], 2, 64)
    update = next(batches.in_order(told_apart(range(7)), place))
    off = lambda batch, _: counting(batch).at[3, 1].add(1e-3)
    frozen = reference.Reference("", off, [], object())
    with pytest.raises(RuntimeError, match=r"different log-probabilities \(by up to 0.001"):
        reference.check_logps(counting, frozen, update, place, jnp.float32)
    same = frozen._replace(of_batch=lambda batch, _: counting(batch))
    reference.check_logps(counting, same, update, place, jnp.float32)


def test_a_kept_answer_is_that_of_tokens_masks_and_layout():
    (pair, *_) = told_apart(range(7))
    shape = Shape(1, 16, PAIRS, 2, 1)
    others = [
        pair._replace(prompt=pair.prompt + 1),
        pair._replace(chosen=pair.chosen + 1),
        pair._replace(rejected=pair.rejected + 1),
        pair._replace(chosen_scored=~pair.chosen_scored),
        pair._replace(rejected_scored=~pair.rejected_scored),
        pair._replace(chosen=pair.rejected, rejected=pair.chosen),
    ]
    keys = {reference_cache.key(other, shape) for other in others}
    keys |= {reference_cache.key(pair, shape), reference_cache.key(pair, Shape(2, 4, PAIRS, 2, 2))}
    assert len(keys) == 8
    # Where it stands in its source makes no difference.
    assert reference_cache.key(pair._replace(row=99), shape) in keys


def test_the_compute_dtype_of_a_reference():
    cast = reference.cast({"w": jnp.array([1.001, 2.0])}, jnp.bfloat16)
    assert cast["w"].dtype == jnp.bfloat16
    exactly = reference.equal_weights
    known = reference.fingerprint(cast)
    assert exactly({"w": jnp.array([1.001, 2.0])}, known, jnp.bfloat16)
    assert not exactly({"w": jnp.array([1.1, 2.0])}, known, jnp.bfloat16)

"""One update against plain arithmetic, and by hand: what is summed, averaged, in which order."""

import math

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoints_io import places
from checkpoints_io.bits import fingerprint
from checkpoints_io.run_state import Keep, RunStore
from recipes.data.ids.examples import PairIds
from recipes.data.packed import batches
from recipes.data.packed.batches import DataFields
from recipes.data.packed.packing import Shape
from recipes.data.run_data import HeldOut
from recipes.preference import evaluation, gates, reference, reference_cache
from recipes.preference.reference import Reference
from recipes.training import logps, loop, optimizer, policy, update
from recipes.training.policy import Policy, State
from recipes.training.run import Beside, Computing, Watching
from recipes.training.update import Sums
from tests.conftest import large_weights, programs_of, run_with, sigmoid, small_config
from tests.long_forms import full_but
from tests.recipes.data.packed.test_packing import random_pairs
import zoo
from zoo import llama
from zoo.parts import adapted, sharding

PAIRS, BETA, RATE = 4, 0.5, 0.25
OBJECTIVE = sigmoid(BETA)
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
        state = optimizer.init(descent, params, mesh)
        shape = place_of(mesh, 1, 40).shape
        programs = programs_of(params, state, graph, descent, OBJECTIVE, shape)
        yield graph, params, programs, random_pairs(0, PAIRS), mesh


def place_of(mesh, rows, row_length):
    rows_place = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    return batches.Place(Shape(rows, row_length, PAIRS, 2, rows), rows_place)


def summed(work, rows, row_length):
    """The sums of an update, and over how many micro-batches."""
    _, params, programs, pairs, mesh = work
    place = place_of(mesh, rows, row_length)
    packed = batches.pack(pairs, place.shape, [0])
    fields, sums = batches.data_fields(packed, place), programs.zero()
    for micro_batch in packed.micro_batches:
        batch = batches.put(micro_batch, place)
        sums = programs.add(sums, params, {}, jnp.asarray(THEIRS), fields, batch)
    return sums, len(packed.micro_batches)


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
    np.testing.assert_allclose(sums.policy.logps, ours, rtol=1e-4)
    np.testing.assert_array_equal(sums.reference, THEIRS)
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
    fields = DataFields(jnp.ones((2, 2), jnp.int32), jnp.full((2, 2), jnp.nan))
    scores = logps.Scores(ours, ours * 0 - 1, jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    moved, _, values = programs.apply(Sums(gradient, scores, theirs), kept, state, fields)
    np.testing.assert_allclose(
        np.asarray(moved["norm"]["scale"]) - before, [-0.75, 1.0, *[0] * 14], atol=1e-6
    )
    softplus = lambda x: math.log1p(math.exp(x))
    expected = {
        "dpo_loss": (softplus(-0.5 * 0.5) + softplus(0.5 * 2)) / 2,
        "dpo_margin_policy": (1 - 2) / 2,
        "dpo_margin_ref": (0.5 + 0) / 2,
        "dpo_accuracy": 0.5,
        "token_accuracy": 0.5,
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
    found = evaluation.evaluate(held_out, counting, theirs, place, OBJECTIVE)
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
    run = run_with(
        examples=pairs, held_out=[HeldOut("mine", pairs[2:5])], place=place,
        computing=Computing(mesh, None, None, "full"), watching=Watching(None, None, 0, None),
    )  # fmt: skip
    beside = Beside("mine", is_hf=True, mode="cached", cache=str(tmp_path))
    asked = lambda graph, params, batch: counting(batch)
    frozen = reference.ready(beside, policy_of(model), run, asked, lambda: False)
    assert frozen.model is None
    np.testing.assert_array_equal(frozen.held_out[0], -np.array(ANSWERS)[2:5])
    for order in ([4, 0, 6, 2], [5, 3]):
        update = batches.pack([pairs[i] for i in order], place.shape, [0])
        found = np.asarray(frozen.of_batch(update.micro_batches[0], update.source_rows))
        np.testing.assert_array_equal(found[: len(order)], -np.array(ANSWERS)[order])
        assert not found[len(order) :].any()


def policy_of(blank):
    """A policy of all weights, of which no more is known."""
    graph = nnx.graphdef(blank) if isinstance(blank, nnx.Module) else None
    return Policy(blank, graph, frozen={}, begun=None)


def gate(place, of_batch, *, step=0, fingerprint_=None, dtype=np.float32):
    """Asks the gate before the first step about a policy that counts."""
    weights = {"w": jnp.array([1.001, 2.0])}
    known = fingerprint_ or fingerprint(logps.cast(weights, dtype))
    own = policy_of(zoo.abstract(small_config(), compute_dtype=dtype))
    return gates.check_logps(
        counting, own, State(step, weights, {}, None), Reference(known, of_batch, [], object()),
        run_with(examples=told_apart(range(7)), place=place),
    )  # fmt: skip


def test_the_gate_looks_at_every_pair(work):
    place = place_of(work[-1], 2, 64)
    for slot, answer in ((3, 1), (0, 0), (2, 1)):
        off = lambda batch, _: counting(batch).at[slot, answer].add(1e-3)  # noqa: B023
        with pytest.raises(RuntimeError, match=r"different log-probabilities \(by up to 0.001"):
            gate(place, off)
    assert gate(place, lambda batch, _: counting(batch))


def test_the_gate_is_for_equal_weights_before_the_first_step(work):
    place = place_of(work[-1], 2, 64)
    never = lambda *_: pytest.fail("asked")
    assert not gate(place, never, step=1)
    assert not gate(place, never, fingerprint_="another")
    nothing = lambda batch, _: jnp.full(batch.scored.shape, jnp.nan)
    with pytest.raises(RuntimeError, match="different log-probabilities"):
        gate(place, nothing)


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


def test_the_compute_dtype_of_a_reference(work):
    """Equal weights are those that are equal as they are computed with."""
    cast = logps.cast({"w": jnp.array([1.001, 2.0])}, jnp.bfloat16)
    assert cast["w"].dtype == jnp.bfloat16
    place = place_of(work[-1], 2, 64)
    same = lambda batch, _: counting(batch)
    near = fingerprint(logps.cast({"w": jnp.array([1.0, 2.0])}, jnp.bfloat16))
    assert gate(place, same, fingerprint_=fingerprint(cast), dtype=jnp.bfloat16)
    assert gate(place, same, fingerprint_=near, dtype=jnp.bfloat16)  # the same bits by then
    assert not gate(place, same, fingerprint_=near)
    other = fingerprint(logps.cast({"w": jnp.array([1.1, 2.0])}, jnp.bfloat16))
    assert not gate(place, same, fingerprint_=other, dtype=jnp.bfloat16)


# Some of the weights that are not trained, by how their paths begin.
FROZEN = {
    "embedding": [("embedding",)],
    "head": [("head",)],
    "all around the blocks": [("embedding",), ("head",), ("norm", "scale")],
    "the blocks": [("blocks",)],
    "some of the blocks": [("blocks", "mlp"), ("blocks", "attention", "q")],
}


def parted(params, frozen):
    """What is trained, and what begins with one of these paths."""
    flat = traverse_util.flatten_dict(params)
    kept = {path: flat.pop(path) for path in [*flat] if any(path[: len(f)] == f for f in frozen)}
    return traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(kept)


def paths(tree):
    return set(traverse_util.flatten_dict(tree))


def same_bits(some, others):
    assert jax.tree.structure(some) == jax.tree.structure(others)
    for one, other in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(one, other)


def test_parts_are_joined_at_any_depth(work):
    _, params, *_ = work
    for frozen in ([("blocks", "mlp")], [("blocks", "attention", "q"), ("norm",)], [], [()]):
        same_bits(adapted.joined(*parted(params, frozen)), params)


@pytest.mark.parametrize("names", full_but(FROZEN, "head", "some of the blocks"))
def test_what_is_frozen_takes_no_part(work, names, tmp_path):
    """Not in sums, optimizer or checkpoint; the others' gradient is that of the whole tree."""
    graph, params, *_, mesh = work
    trained, frozen = parted(params, FROZEN[names])
    assert frozen.keys() == {first for first, *_ in FROZEN[names]}
    same_bits(adapted.joined(trained, frozen), params)
    adamw = optax.adam(RATE)
    state = State(0, trained, frozen, optimizer.init(adamw, trained, mesh))
    place = place_of(mesh, 1, 40)
    programs = programs_of(trained, state.opt_state, graph, adamw, OBJECTIVE, place.shape)
    before = jax.tree.map(np.array, frozen)
    packed = batches.pack(work[3], place.shape, [0])

    fields, sums = batches.data_fields(packed, place), programs.zero()
    for micro_batch in packed.micro_batches:
        batch = batches.put(micro_batch, place)
        sums = programs.add(sums, trained, frozen, jnp.asarray(THEIRS), fields, batch)
    whole, _ = summed(work, 1, 40)
    assert paths(sums.gradient) == paths(trained)
    expected, _ = parted(whole.gradient, FROZEN[names])
    assert apart(sums.gradient, expected) < 1e-6
    np.testing.assert_array_equal(sums.policy.logps, whole.policy.logps)

    kept = jax.tree.map(lambda x: x + 0, state)  # which is given away
    taken = loop.applied(programs, sums, kept, fields).state
    assert taken.step == 1
    moments = taken.opt_state[0]
    assert paths(taken.trained) == paths(moments.mu) == paths(moments.nu) == paths(trained)
    same_bits(taken.frozen, before)
    for path, array in traverse_util.flatten_dict(taken.trained).items():
        assert not np.array_equal(array, traverse_util.flatten_dict(trained)[path]), path

    run = run_with(nonfinite="stop")
    with RunStore(places.Disk(tmp_path), keep=Keep(1)) as store:
        policy.save(taken, run, store, {})
        store.wait()
        saved = store.newest(
            lambda _: None, {"policy": taken.trained, "optimizer": taken.opt_state}
        )
    same_bits(saved.trees["policy"], taken.trained)
    assert paths(saved.trees["policy"]) == paths(trained)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_number_that_is_none_in_a_frozen_weight_is_seen(platform, work, monkeypatch):
    """By the gradient of the others: nothing is changed, as each platform's program leaves it."""
    monkeypatch.setattr(update.sharding, "platform", lambda: platform)
    graph, params, *_, mesh = work
    trained, frozen = parted(params, FROZEN["head"])
    frozen = {"head": frozen["head"].at[0, 0].set(jnp.nan)}
    place = place_of(mesh, 1, 40)
    adam = optax.adam(RATE)
    state = optimizer.init(adam, trained, mesh)
    programs = programs_of(trained, state, graph, adam, OBJECTIVE, place.shape)
    packed = batches.pack(work[3], place.shape, [0])
    fields, batch = batches.data_fields(packed, place), batches.put(packed.micro_batches[0], place)
    sums = programs.add(programs.zero(), trained, frozen, jnp.asarray(THEIRS), fields, batch)
    kept = jax.tree.map(lambda x: x + 0, (trained, state))
    moved, after, values = programs.apply(sums, *kept, fields)
    assert float(values["skipped"]) == 1
    same_bits(moved, trained)
    assert int(after[0].count) == 0
    same_bits(after[0].mu, state[0].mu)
    same_bits(after[0].nu, state[0].nu)


def test_a_loss_sees_what_the_data_says(work):
    """Scored tokens and ratings of each answer, in the order of the pairs of the update."""
    graph, params, *_, mesh = work
    place = place_of(mesh, 1, 40)
    rated = [
        pair._replace(ratings=(float(i), -1.0)) if i % 2 else pair for i, pair in enumerate(work[3])
    ]
    packed = batches.pack(rated, place.shape, [0])
    assert len(packed.micro_batches) > 1
    tokens = [[pair.chosen_scored.sum(), pair.rejected_scored.sum()] for pair in rated]
    descent = optax.sgd(RATE)
    state = optimizer.init(descent, params, mesh)

    def loss(answers):
        """Of each pair what is fields of it, and nothing of the policy."""
        known = jnp.where(jnp.isnan(answers.ratings), 0, answers.ratings)
        return (answers.tokens * jnp.array([1, 100])).sum(-1) + 1e4 * known.sum(-1)

    figures = lambda answers: {f"pair {i}": x for i, x in enumerate(loss(answers))}
    programs = update.compiled(
        params, state, graph=graph, optimizer=descent, loss=loss, figures=figures, shape=place.shape
    )
    fields, sums = batches.data_fields(packed, place), programs.zero()
    for micro_batch in packed.micro_batches:
        batch = batches.put(micro_batch, place)
        sums = programs.add(sums, params, {}, jnp.asarray(THEIRS), fields, batch)
    kept = jax.tree.map(lambda x: x + 0, (params, state))
    _, _, values = programs.apply(sums, *kept, fields)
    for i, (chosen, rejected) in enumerate(tokens):
        expected = chosen + 100 * rejected + (1e4 * (i - 1) if i % 2 else 0)
        assert float(values[f"pair {i}"]) == pytest.approx(expected), i
    assert float(values["gradient_norm"]) == 0

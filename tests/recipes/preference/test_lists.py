"""Lists of ranked answers in a loss: Plackett-Luce, and the pairs in them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.preference import gates, lists, losses, metrics, objectives
from recipes.training import written
from recipes.training.run import Computing
from recipes.training.update import Answers
from tests.conftest import run_with


def drawn(ranks, seed=0):
    """Random log-probabilities of lists with these ranks; an answer without one is not there."""
    draw = np.random.default_rng(seed)
    longest = max(map(len, ranks))
    here = np.array([[i < len(one) for i in range(longest)] for one in ranks])
    padded = np.array([[*one, *[0] * (longest - len(one))] for one in ranks])
    policy = np.where(here, -20 * draw.random(here.shape) - 5, 0)
    reference = np.where(here, policy + 2 * draw.standard_normal(here.shape), 0)
    tokens = np.where(here, draw.integers(3, 12, here.shape), 0)
    unrated = jnp.full(here.shape, jnp.nan)
    found = map(jnp.asarray, (np.float32(policy), np.float32(reference), tokens))
    return Answers(*found, unrated, jnp.asarray(padded))


RANKS = [(0, 1, 2, 3), (0, 1), (0, 1, 1, 2), (0, 0, 1), (0, 1, 1, 1)]
LISTS = {"data.answers": 4, "beta": 0.1}


def objective(**given):
    return objectives.objective(LISTS | given)


def two(answers, row, i, j):
    """A pair of a list, as a row of its own."""
    only = lambda x: None if x is None else jnp.stack([x[row, i], x[row, j]])[None]
    return Answers(*map(only, answers[:3]))


def pairs_by_hand(ranks, which):
    count = range(len(ranks))
    return [
        (i, j)
        for i in count
        for j in count
        if ranks[i] < ranks[j] and i < j and (which == "all" or ranks[i] == 0)
    ]


def test_plackett_luce_by_hand():
    """Each answer is chosen among itself and those that are ranked below it."""
    given = drawn(RANKS)
    found = losses.plackett_luce(given, beta=0.3)
    for row, ranks in enumerate(RANKS):
        s = 0.3 * np.float64(given.policy[row] - given.reference[row])
        expected = 0.0
        for k, rank in enumerate(ranks):
            below = [j for j, other in enumerate(ranks) if other > rank]
            if below:
                expected += math.log(sum(math.exp(s[j] - s[k]) for j in (k, *below)))
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)


def test_plackett_luce_of_equal_answers_is_the_number_of_orders():
    equal = drawn(RANKS)
    equal = equal._replace(policy=equal.reference)
    found = losses.plackett_luce(equal, beta=0.3)
    expected = [math.log(math.factorial(4)), math.log(2), math.log(4 * 2 * 2), 2 * math.log(2)]
    np.testing.assert_allclose(found, [*expected, math.log(4)], rtol=1e-6)


def test_plackett_luce_of_two_is_sigmoid():
    given = drawn([(0, 1)] * 5)
    of = lambda loss: lambda policy: loss(given._replace(policy=policy), beta=0.3).sum()
    np.testing.assert_allclose(
        losses.plackett_luce(given, beta=0.3), losses.sigmoid(given, beta=0.3), rtol=1e-5
    )
    one, other = (
        jax.grad(of(loss))(given.policy) for loss in (losses.plackett_luce, losses.sigmoid)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


OF_PAIRS = [
    ("sigmoid", {}), ("sigmoid_norm", {"beta": 2.0}), ("ipo", {}), ("hinge", {}), ("bco_pair", {}),
    ("dpop", {"dpop_lambda": 5.0}), ("r_dpo", {"length_alpha": 0.02}), ("simpo", {"beta": 2.0}),
    ("orpo", {}), ("exo_pair", {"label_smoothing": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize("which", ["all", "best"])
@pytest.mark.parametrize(("name", "options"), OF_PAIRS)
def test_the_loss_of_a_list_is_the_mean_of_its_pairs(name, options, which):
    """And so is its gradient, finite where an answer is not there."""
    given, found = drawn(RANKS), objective(loss=name, list_pairs=which, **options)
    alone = objectives.objective({"loss": name, "beta": 0.1} | options)
    gradient = jax.grad(lambda policy: found.loss(given._replace(policy=policy)).sum())
    gradient, each = gradient(given.policy), found.loss(given)
    for row, ranks in enumerate(RANKS):
        pairs = pairs_by_hand(ranks, which)
        values, expected = [], np.zeros(4)
        for i, j in pairs:
            pair = two(given, row, i, j)
            of = lambda policy, pair=pair: alone.loss(pair._replace(policy=policy)).sum()
            value, pull = jax.value_and_grad(of)(pair.policy)
            values.append(float(value))
            expected[[i, j]] += np.asarray(pull[0]) / len(pairs)
        assert float(each[row]) == pytest.approx(np.mean(values), rel=1e-5)
        np.testing.assert_allclose(gradient[row], expected, rtol=1e-4, atol=1e-6)


def test_terms_of_the_best_answer_look_at_it_alone():
    given = drawn(RANKS)
    best = Answers(*(x[:, :2] for x in given[:3]))
    found = objective(loss="plackett_luce,sft=0.2,sft_seq=0.3")
    expected = losses.plackett_luce(given, beta=0.1)
    expected += 0.2 * losses.sft(best) + 0.3 * losses.sft_seq(best)
    np.testing.assert_allclose(found.loss(given), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "simpo"])
def test_two_answers_are_a_pair_bit_for_bit(name):
    pair = drawn([(0, 1)] * 5)
    of = {"loss": name, "beta": 0.7}
    plain, listed = objectives.objective(of), objectives.objective(of | {"data.answers": 4})
    for program in (lambda o: o.loss, lambda o: lambda a: metrics.preference(a, o)):
        one, other = (jax.jit(program(o)).lower(pair).as_text() for o in (plain, listed))
        assert one == other
    assert lists.compared(pair, "all").answers is pair


@pytest.mark.parametrize("which", ["all", "best"])
def test_metrics_are_of_the_pairs_that_are_compared(which):
    """A list weighs as much as any other."""
    given, found = drawn(RANKS), objective(loss="sigmoid", list_pairs=which)
    figures = metrics.preference(given, found)
    rows = []
    for row, ranks in enumerate(RANKS):
        each = [two(given, row, i, j) for i, j in pairs_by_hand(ranks, which)]
        one = [metrics.preference(pair, found) for pair in each]
        rows.append({name: np.mean([float(x[name]) for x in one]) for name in one[0]})
    for name, value in figures.items():
        if name != "length_correlation":  # of all pairs together
            mean = np.mean([row[name] for row in rows])
            assert float(value) == pytest.approx(mean, rel=1e-4, abs=1e-5), name
    some = metrics.preference(given, found, jnp.asarray([True, False, True, False, False]))
    mean = np.mean([rows[i]["dpo_reward_margin"] for i in (0, 2)])
    assert float(some["dpo_reward_margin"]) == pytest.approx(mean, rel=1e-4)
    assert all(np.isfinite(float(x)) for x in figures.values())


@pytest.mark.parametrize("name", ["plackett_luce", "sigmoid", "sigmoid,sft"])
def test_a_list_adds_the_same_gradient_in_any_part_of_an_update(name):
    """Of the others a micro-batch holds zeros, and what is known of all."""
    given, found = drawn(RANKS), objective(loss=name)
    whole = jax.grad(lambda p: found.loss(given._replace(policy=p)).mean())(given.policy)
    here = jnp.array([1, 0, 1, 1, 0], bool)

    def mean(policy):
        seen = lambda x: jnp.where(here[:, None], x, 0)
        some = given._replace(policy=seen(policy), reference=seen(given.reference))
        return jnp.mean(jnp.where(here, found.loss(some), 0))

    np.testing.assert_allclose(
        jax.grad(mean)(given.policy)[here], whole[here], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            dict(loss="aot"),
            "`aot` only supports pairs, but --config.data.answers=4 produces ranked lists",
        ),
        (dict(loss="cpo"), "choose another loss .e.g. reference_free,sft.*or .*answers=2"),
        (dict(ld_alpha=0.5), "ld_alpha=0.5 only supports pairs"),
        (dict(loss="plackett_luce", list_pairs="best"), "does not compare pairs: leave it out"),
        ({"data.answers": 2, "list_pairs": "all"}, "no effect with --config.data.answers=2"),
        (dict(loss="pl"), "it is called plackett_luce here"),
    ],
)
def test_what_fits_no_list_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        objectives.objective(LISTS | {"loss": "sigmoid"} | given)


def test_the_first_loss_of_lists_is_what_theirs_promises():
    """By their own numbers of answers, in the figures of an update."""
    precision = written.Precision(np.dtype(np.float32), np.dtype(np.float32))
    run = run_with(computing=Computing(None, precision, None, "full"))
    found, given = objective(loss="plackett_luce"), drawn(RANKS)
    equal = losses.plackett_luce(given._replace(policy=given.reference), beta=0.1).mean()
    check = lambda loss: gates.check_first_loss({"dpo_loss": loss}, found, run, given)
    check(equal)
    with pytest.raises(RuntimeError, match=r"first loss \(plackett_luce\) is"):
        check(equal + 0.001)

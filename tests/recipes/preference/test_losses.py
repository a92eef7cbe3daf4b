"""Losses: by hand, by what each promises, and against the agreed table."""

import functools
import inspect
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recipes.data.ids.examples import AnswerIds, PairIds
from recipes.data.packed import streams
from recipes.data.rows.source import UNPAIRED
from recipes.preference import losses, metrics, objectives
from recipes.preference.divergences import DIVERGENCES
from recipes.training import settings
from recipes.training.update import Answers
from tests import losses_on_devices
from tests.conftest import ROOT
from tests.long_forms import full_but
from zoo.parts import sharding
from zoo.parts.token_logps import token_logps, with_beside

OPTIONS = {"beta": 0.3, "label_smoothing": 0.1, "dpop_lambda": 5.0, "length_alpha": 0.02,
           "gamma_beta_ratio": 0.3, "cpo_alpha": 0.5, "discopop_tau": 0.05}  # fmt: skip
SUMMED = [name for name in losses.LOSSES if name not in losses.COUPLED]


def keywords(name):
    """The options of a loss."""
    parameters = inspect.signature(losses.LOSSES[name]).parameters.values()
    return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}


def options_of(name):
    """Its options that have numbers, with values that are seen in the result."""
    return {option: value for option, value in OPTIONS.items() if option in keywords(name)}


def answers(chosen, rejected, reference=0.0):
    """With these log-ratios."""
    ratios = jnp.stack([chosen, rejected], axis=-1)
    tokens = jnp.ones(ratios.shape, jnp.int32)
    zeros = jnp.zeros(ratios.shape)
    return Answers(ratios + reference, zeros + reference, tokens, labels(len(ratios)))


def random_answers(seed=0, pairs=5, width=jnp.float32):
    draw = np.random.default_rng(seed)
    policy = -20 * draw.random((pairs, 2)) - 5
    reference = policy + 2 * draw.standard_normal((pairs, 2))
    return Answers(
        jnp.asarray(policy, width), jnp.asarray(reference, width),
        jnp.asarray(draw.integers(3, 12, (pairs, 2))), labels(pairs),
    )  # fmt: skip


def labels(count):
    """The first, third, … answer is wanted."""
    return jnp.array([[1.0 - i % 2, math.nan] for i in range(count)])


def s(x):
    return 1 / (1 + math.exp(-x))


def by_hand(name, pc, pr, rc, rr, lc, lr, m=0.0):
    """One pair's loss with a margin m, written out with the options above and beta 0.3."""
    c, r, b, e = pc - rc, pr - rr, 0.3, 0.1
    dpo = lambda x: -(1 - e) * math.log(s(x - m)) - e * math.log(s(m - x))
    x = b * (c - r)
    odds = lambda mean: math.exp(mean) / (1 - math.exp(mean))
    forms = {
        "sigmoid": lambda: dpo(x),
        "sigmoid_norm": lambda: dpo(b * (c / lc - r / lr)),
        "hinge": lambda: max(0.0, 1 - (x - m)),
        "ipo": lambda: (c / lc - r / lr - 1 / 0.6) ** 2,
        "ipo_sum": lambda: (c - r - 1 / 0.6) ** 2,
        "robust": lambda: (-0.9 * math.log(s(x - m)) + 0.1 * math.log(s(m - x))) / 0.8,
        "exo_pair": lambda: s(x) * math.log(s(x) / 0.9) + s(-x) * math.log(s(-x) / 0.1),
        "discopop": lambda: (1 - s(x / 0.05)) * -math.log(s(x)) + s(x / 0.05) * math.exp(-x),
        "dpop": lambda: dpo(b * (c - 5.0 * max(0.0, -c) - r)),
        "r_dpo": lambda: dpo(x + 0.02 * (lc - lr)),
        "nca_pair": lambda: (
            -math.log(s(b * c)) - 0.5 * math.log(s(-b * c)) - 0.5 * math.log(s(-b * r))
        ),
        "bco_pair": lambda: -math.log(s(b * c)) - math.log(s(-b * r)),
        "sppo_hard": lambda: (c - 1 / 0.6) ** 2 + (r + 1 / 0.6) ** 2,
        "apo_zero": lambda: 1 - s(b * c) + s(b * r),
        "apo_down": lambda: s(b * c) + 1 - s(x),
        "plackett_luce": lambda: -math.log(s(x)),
        "reference_free": lambda: dpo(b * (pc - pr)),
        "simpo": lambda: dpo(b * (pc / lc - pr / lr - 0.3)),
        "orpo": lambda: -math.log(s(math.log(odds(pc / lc) / odds(pr / lr)))),
        "sft_seq": lambda: -pc / lc,
    }
    assert name in forms, f"{name} has no line in `by_hand`: write out its loss of one pair there"
    return forms[name]()


@pytest.mark.parametrize("name", [n for n in SUMMED if n not in ("sft", "cpo")])
def test_every_loss_by_hand(name):
    given = random_answers()
    found = losses.LOSSES[name](given, **options_of(name))
    rows = np.concatenate([np.asarray(x, np.float64) for x in given[:3]], axis=1)
    expected = [by_hand(name, *row) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_losses_of_an_update_by_hand():
    """What they are depends on all of its pairs."""
    given = random_answers()
    (pc, pr), (rc, rr), (lc, _) = (np.asarray(x, np.float64).T for x in given[:3])
    nll = -pc.sum() / lc.sum()
    np.testing.assert_allclose(losses.sft(given), np.full(5, nll), rtol=1e-6)
    prefer = [by_hand("reference_free", *row, 0, 0, 1, 1) for row in zip(pc, pr, strict=True)]
    found = losses.cpo(given, beta=0.3, label_smoothing=0.1, cpo_alpha=0.5)
    np.testing.assert_allclose(found, np.array(prefer) + 0.5 * nll, rtol=1e-5)
    margins = 0.3 * (np.sort(pc - pr) - np.sort(rc - rr))
    np.testing.assert_allclose(losses.aot(given, beta=0.3), np.log1p(np.exp(-margins)), rtol=1e-5)
    margins = 0.3 * (np.sort(pc - rc) - np.sort(pr - rr))
    found = losses.aot_unpaired(given, beta=0.3)
    np.testing.assert_allclose(found, np.log1p(np.exp(-margins)), rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_margins_that_the_data_asks_for_by_hand(name):
    """As if the chosen answer's reward were that much smaller; of losses that are named alone."""
    given = random_answers()
    margins = jnp.array([0.0, 0.5, -0.2, 1.0, 0.0])
    of = functools.partial(losses.LOSSES[name], **options_of(name))
    plain, shifted = (np.asarray(of(given._replace(margins=by))) for by in (None, margins))
    if name not in losses.OF_MARGINS:
        np.testing.assert_array_equal(plain, shifted)
        return
    rows = np.concatenate([np.asarray(x, np.float64) for x in given[:3]], axis=1)
    form = "reference_free" if name == "cpo" else name  # which adds a loss without a margin
    moved = [
        by_hand(form, *row, m) - by_hand(form, *row) for row, m in zip(rows, margins, strict=True)
    ]
    np.testing.assert_allclose(shifted - plain, moved, rtol=1e-4, atol=1e-5)


def test_weights_of_the_data_by_hand():
    given = random_answers()
    weights = jnp.array([1.0, 2.0, 0.0, 0.5, 1.0])
    both = objectives.objective({"loss": "sigmoid,sft_seq=0.5", "beta": 0.3})
    expected = weights * (losses.sigmoid(given, beta=0.3) + 0.5 * losses.sft_seq(given))
    weighted = given._replace(weights=weights)
    np.testing.assert_allclose(both.loss(weighted), expected, rtol=1e-6)
    expected = weights * losses.sft_seq(given)
    np.testing.assert_allclose(both.of_terms(weighted)["sft_seq"], expected, rtol=1e-6)


def test_what_a_pair_counts_by_the_policy_has_no_gradient():
    """WPO by hand: exp of the sum of both answers' means of log p - log sum p²."""
    given = random_answers()
    given = given._replace(log_p2=given.policy * 0.9)
    of = objectives.objective({"loss": "sigmoid", "beta": 0.3, "use_weighting": True}).loss
    weights = np.exp((0.1 * given.policy / given.tokens).sum(-1))
    np.testing.assert_allclose(of(given), weights * losses.sigmoid(given, beta=0.3), rtol=1e-5)
    gradient = lambda loss: jax.grad(lambda policy: loss(given._replace(policy=policy)).sum())(
        given.policy
    )
    plain = gradient(functools.partial(losses.sigmoid, beta=0.3))
    np.testing.assert_allclose(gradient(of), weights[:, None] * plain, rtol=1e-5)


def test_answers_without_a_partner_by_hand():
    """Two wanted ones and an unwanted one; those to other prompts gained 0.4 nats on average."""
    ratios = jnp.array([[2.0, 1.5], [-1.0, -0.5], [0.4, 0.2]])
    given = Answers(ratios - 9, jnp.full((3, 2), -9.0), jnp.ones((3, 2), int), labels(3))
    of = functools.partial(losses.kto, beta=0.5, desirable_weight=1.5, undesirable_weight=0.8)
    expected = [1.5 * s(-0.5 * 1.6), 0.8 * s(0.5 * -1.4), 1.5 * s(-0.5 * 0.0)]
    np.testing.assert_allclose(of(given), expected, rtol=1e-5)
    no_more = given._replace(policy=given.policy.at[0, 1].set(-11.0))  # -0.77: 0 is taken
    expected = [1.5 * s(-0.5 * 2), 0.8 * s(0.5 * -1), 1.5 * s(-0.5 * 0.4)]
    np.testing.assert_allclose(of(no_more), expected, rtol=1e-5)
    pull = jax.grad(lambda policy: of(given._replace(policy=policy)).sum())(given.policy)
    assert (pull[:, 1] == 0).all()
    assert (pull[:, 0] * jnp.array([-1, 1, -1]) > 0).all()


def test_figures_of_answers_without_a_partner_by_hand():
    ratios = jnp.array([[2.0, 1.5], [-1.0, -0.5], [0.4, 0.2], [0.0, 0.4]])
    given = Answers(ratios - 9, jnp.full((4, 2), -9.0), jnp.full((4, 2), 3), labels(4))
    objective = objectives.objective({"loss": "kto", "beta": 0.5})
    found = {name: float(x) for name, x in metrics.preference(given, objective).items()}
    assert found["dpo_loss"] == pytest.approx(
        (s(-0.5 * 1.6) + s(0.5 * -1.4) + s(0.0) + s(-0.5 * 0.4)) / 4, rel=1e-5
    )
    expected = {
        "kl_mismatched": 0.4, "dpo_chosen_reward": 0.6, "dpo_rejected_reward": -0.25,
        "dpo_reward_margin": 0.85, "drift_chosen": 1.2, "drift_rejected": -0.5,
        "logps_chosen": -7.8, "dpo_margin_policy": 1.7, "dpo_margin_ref": 0.0,
        "dpo_accuracy": 3 / 4,  # the third is at the point, which is no win
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    only = metrics.preference(given, objective, jnp.array([True, False, True, False]))
    assert float(only["dpo_chosen_reward"]) == pytest.approx(0.6)
    assert float(only["dpo_rejected_reward"]) == 0


@pytest.mark.parametrize("name", losses.FIRST)
def test_every_loss_is_first_what_it_says(name):
    """Where policy and reference are equal, whatever beta is."""
    equal = answers(jnp.zeros(3), jnp.zeros(3), reference=-50.0)
    assert name in losses.LOSSES, f"{name} has a first value, but is not in LOSSES"
    named, promised = options_of(name), losses.FIRST[name]
    if promised is None:
        assert name in ("r_dpo", "kto")
        return
    for beta in (0.01, 0.1, 2.0):
        named["beta"] = beta
        found = losses.LOSSES[name](equal, **named)
        np.testing.assert_allclose(found, promised(**named), rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_beta_multiplies_log_probabilities_or_sets_a_goal(name):
    """At half of beta twice the log-probabilities give the same where it multiplies them."""
    named = options_of(name) | {
        o: 0.0 for o in ("cpo_alpha", "gamma_beta_ratio") if o in keywords(name)
    }
    if "beta" not in named:
        assert name in losses.FREE_OF_BETA
        return
    given = random_answers()
    if name in UNPAIRED:
        given = given._replace(ratings=jnp.array([[1.0, -1.0]] * len(given.policy)))
    twice = given._replace(policy=2 * given.policy, reference=2 * given.reference)
    of = functools.partial(losses.LOSSES[name], **named)
    same = np.allclose(of(given), of(twice, beta=named["beta"] / 2), rtol=1e-4, atol=1e-5)
    assert same == (name not in losses.FREE_OF_BETA), "FREE_OF_BETA of losses.py"


@pytest.mark.parametrize("name", losses.LOSSES)
def test_only_losses_of_the_policy_alone_see_no_reference(name):
    given = random_answers()
    if name in UNPAIRED:
        given = given._replace(ratings=jnp.array([[1.0, -1.0]] * len(given.policy)))
    other = given._replace(reference=given.reference * jnp.array([2.0, 3.0]) + 1)
    of = functools.partial(losses.LOSSES[name], **options_of(name))
    same = np.array_equal(of(given), of(other))
    assert same == (name in losses.WITHOUT_REFERENCE)


@pytest.mark.parametrize("first", [None, lambda **_: math.nan])
def test_a_loss_whose_first_value_depends_on_the_pairs_keeps_its_reference(monkeypatch, first):
    monkeypatch.setitem(losses.LOSSES, "mine", losses.hinge)
    monkeypatch.setitem(losses.FIRST, "mine", first)
    objective = objectives.objective({"loss": "mine", "beta": 0.1})
    assert objective.has_reference
    assert math.isnan(objective.terms[0].first)
    monkeypatch.setattr(losses, "WITHOUT_REFERENCE", ("mine",))
    assert not objective.has_reference


@pytest.mark.parametrize("name", SUMMED)
def test_a_pair_adds_the_same_gradient_in_any_part_of_an_update(name):
    """Of the others a micro-batch holds zeros, and all scored tokens."""
    given = random_answers()
    of = functools.partial(losses.LOSSES[name], **options_of(name))
    whole = jax.grad(lambda policy: of(given._replace(policy=policy)).mean())(given.policy)
    for here in (jnp.array([1, 0, 1, 1, 0], bool), jnp.array([0, 1, 0, 0, 1], bool)):

        def mean(policy, here=here):
            seen = lambda x: jnp.where(here[:, None], x, 0)
            some = given._replace(policy=seen(policy), reference=seen(given.reference))
            return jnp.mean(jnp.where(here, of(some), 0))

        np.testing.assert_allclose(
            jax.grad(mean)(given.policy)[here], whole[here], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("name", losses.LOSSES)
def test_far_log_ratios_stay_finite(name):
    """But for exponentials, whose values are as large as they say."""
    far = jnp.array([3e3, -3e3, 0.0])
    given = answers(far - 4e3, -far - 4e3, reference=-4e3)
    given = given._replace(policy=jnp.minimum(given.policy, 0))
    of = functools.partial(losses.LOSSES[name], **options_of(name))
    assert np.isfinite(of(given)).all() or name == "discopop"
    gradient = jax.grad(lambda policy: of(given._replace(policy=policy)).sum())(given.policy)
    assert np.isfinite(gradient).all() or name == "discopop"


def test_divergences_by_hand():
    both = answers(jnp.array([0.7]), jnp.array([-0.4]))
    found = lambda **how: float(losses.hinge(both, beta=0.5, **how)[0])
    assert found() == pytest.approx(1 - 0.5 * 1.1, rel=1e-6)
    forward = -math.exp(-0.7) + math.exp(0.4)
    assert found(f_divergence_type="forward_kl") == pytest.approx(1 - 0.5 * forward, rel=1e-6)
    js = math.log(s(0.7)) - math.log(s(-0.4))
    assert found(f_divergence_type="js_divergence") == pytest.approx(1 - 0.5 * js, rel=1e-6)
    alpha = (math.exp(-0.5 * 0.7) - math.exp(0.5 * 0.4)) / -0.5
    of = functools.partial(found, f_divergence_type="alpha_divergence")
    assert of(f_alpha_divergence_coef=0.5) == pytest.approx(1 - 0.5 * alpha, rel=1e-6)
    assert of(f_alpha_divergence_coef=1.0) == found()
    with pytest.raises(ValueError, match="'kl' is not one of reverse_kl, forward_kl"):
        found(f_divergence_type="kl")


@pytest.mark.parametrize("name", full_but(["aot", "kto"], "kto"))
def test_a_coupled_loss_is_exact_in_several_micro_batches(name):
    """tests/test_devices.py has the others, and meshes."""
    one = sharding.mesh_of(1, 1, 1)
    count, whole, logps = losses_on_devices.update(name, one, 16)
    assert count == 1
    count, gradient, again = losses_on_devices.update(name, one, 1)
    assert count == 7
    assert losses_on_devices.apart(gradient, whole) <= 2e-6
    np.testing.assert_allclose(again, logps, rtol=1e-5)


# A sum of losses, from the settings


def test_a_loss_takes_the_settings_that_its_parameters_name():
    given = random_answers()
    named = {"beta": 0.5, "label_smoothing": 0.25, "dpop_lambda": 4.0}
    found = objectives.objective({"loss": "dpop"} | named)
    assert found.beta == 0.5
    np.testing.assert_array_equal(found.loss(given), losses.dpop(given, **named))


def test_a_sum_of_losses_by_hand():
    given = random_answers()
    found = objectives.objective({"loss": "sigmoid=0.8,bco_pair=0.2,sft", "beta": 0.1})
    of = lambda name: getattr(losses, name)(given, beta=0.1)
    expected = 0.8 * of("sigmoid") + 0.2 * of("bco_pair") + losses.sft(given)
    np.testing.assert_allclose(found.loss(given), expected, rtol=1e-6)
    assert found.has_reference
    assert not found.is_coupled
    assert set(found.of_terms(given)) == {"sigmoid", "bco_pair", "sft"}
    assert not objectives.objective({"loss": "simpo,sft=0.1", "beta": 2.0}).has_reference
    assert objectives.objective({"loss": "sigmoid,aot", "beta": 0.1}).is_coupled


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(loss="dpo"), r"no loss 'dpo' \(it is called sigmoid here"),
        (dict(loss="dpo_norm"), "it is called sigmoid_norm here"),
        (dict(loss="cdpo"), "it is called sigmoid with --config.label_smoothing here"),
        (dict(loss="simp"), r"no loss 'simp' \(did you mean simpo\?\)"),
        (dict(loss="sigmoid,sft=much"), "'sft=much' is not of the form sft=0.2"),
        (dict(loss="sigmoid,sft=-1"), "'sft=-1' is not of the form"),
        (dict(loss="sigmoid,sigmoid=0.5"), "name each loss once"),
        (dict(loss="sigmoid,"), "no loss ''"),
        (dict(loss="sft"), r"supervised fine-tuning use recipes/sft\.py"),
        (dict(gamma_beta_ratio=0.5), "gamma_beta_ratio has no effect .* only applies to simpo"),
        (dict(loss="simpo", beta=2.0, discopop_tau=0.1), "discopop_tau has no effect"),
        (dict(loss="hinge", label_smoothing=0.1), "label_smoothing has no effect"),
        (dict(loss="dpop"), "set --config.dpop_lambda, which --config.loss=dpop requires"),
        (
            dict(f_divergence_type="alpha_divergence"),
            "set --config.f_alpha_divergence_coef if and only if",
        ),
        (dict(f_alpha_divergence_coef=0.5), "set --config.f_alpha_divergence_coef if and only if"),
        (dict(loss="exo_pair"), "set --config.label_smoothing, which --config.loss=exo_pair"),
        (dict(beta=5.0), "beta=5 suits losses on means per token .*usual beta of 0.01 to 0.5"),
        (dict(loss="sigmoid_norm"), "takes means per token, with a usual beta of 2 to 10"),
        (dict(loss="sigmoid,sft", use_weighting=True), "cannot be combined with --config.loss=sft"),
        (dict(use_weighting=True, ld_alpha=0.5), "cannot be combined with --config.ld_alpha"),
        (
            dict(loss="kto,sft"),
            "kto takes single answers with a label, but the others take pairs",
        ),
        (dict(loss="kto", ld_alpha=0.5), "ld_alpha=0.5 only supports pairs"),
        (dict(desirable_weight=2.0), "desirable_weight has no effect .* only applies to kto"),
    ],
)
def test_what_fits_no_loss_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        objectives.objective({"loss": "sigmoid", "beta": 0.1} | given)


def test_every_option_is_a_setting():
    """And every setting of a loss an option."""
    options = {"loss", "ld_alpha", "list_pairs", "use_weighting"}.union(
        *map(keywords, losses.LOSSES)
    )
    new = options ^ settings.PREFERENCE.keys()
    assert not new, f"{new}: describe it in recipes/training/settings.py, or give a loss the option"
    assert set(settings.PREFERENCE["f_divergence_type"].choices) == DIVERGENCES.keys()


def test_every_loss_has_its_row_and_its_first_value():
    told = (ROOT / "docs" / "losses.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)
    without = sorted(losses.LOSSES.keys() - {*rows})
    assert not without, f"write a row for {', '.join(without)} in docs/losses.md"
    alone = {*losses.WITHOUT_REFERENCE}
    assert losses.FIRST.keys() | alone == losses.LOSSES.keys(), "a first value, or None, in FIRST"
    assert not losses.FIRST.keys() & alone, "without a reference there is no first value"
    (sentence,) = re.findall(r"A margin from a column is taken off x in\s(.*?):", told, re.DOTALL)
    assert {*re.findall(r"`(\w+)`", sentence)} == {*losses.OF_MARGINS}, "of docs/losses.md"


NUMBERS = {"desirable_weight": 1.5, "undesirable_weight": 0.7, "f_alpha_divergence_coef": 0.4}
OPTIONAL = [(loss, option) for loss in losses.LOSSES for option in sorted(keywords(loss))
            if settings.PREFERENCE[option].kind is float]  # fmt: skip


@pytest.mark.parametrize(("loss", "option"), OPTIONAL)
def test_every_number_that_a_loss_takes_changes_it(loss, option):
    values = OPTIONS | NUMBERS
    assert option in values, f"give {option} a value in OPTIONS"
    how = options_of(loss)
    if option == "f_alpha_divergence_coef":
        how["f_divergence_type"] = "alpha_divergence"
    of = functools.partial(losses.LOSSES[loss], random_answers())
    few, more = (of(**how | {option: scale * values[option]}) for scale in (1.0, 0.8))
    assert not np.allclose(few, more, rtol=1e-4)


# The agreed table


def cases_of(table):
    """Each with its loss and options by our names."""
    for case in table["cases"]:
        given = dict(case["params"])
        if given.pop("use_weighting", False) or "ld_alpha" in given:
            continue
        name = {"cdpo": "sigmoid", "mix": ",".join(given.pop("loss_type", []))}.get(
            case["loss"], case["loss"]
        )
        weights = given.pop("loss_weights", [1.0] * len(name.split(",")))
        yield case, list(zip(name.split(","), weights, strict=True)), given


SETS = ["rand0", *(pytest.param(one, marks=pytest.mark.full)
                   for one in ("rand2", "rand5", "init_equal", "hand"))]  # fmt: skip
KINKS = {'hand/hinge/{"beta": 0.1}'}  # a margin of exactly 1 / beta


@pytest.mark.parametrize("which", SETS)
def test_agrees_with_the_table(shared, which):
    """Values and gradients in float64, and what float32 makes of inputs that it can hold.

    The gradients of the table are differences, good to 1e-9.
    """
    table = json.loads((shared / "golden" / "preference_losses.json").read_text())
    one = table["sets"][which]
    pick = lambda *names: np.array([one[name] for name in names]).T
    policy = pick("policy_chosen_logps", "policy_rejected_logps")
    theirs = pick("ref_chosen_logps", "ref_rejected_logps")
    tokens = jnp.asarray(pick("chosen_lengths", "rejected_lengths"))
    cases = [case for case in cases_of(table) if case[0]["set"] == which]
    assert len(cases) >= 60
    for case, terms, given in cases:

        def both(policy, theirs, terms=terms, given=given):
            def each(policy):
                total = 0.0
                for name, weight in terms:
                    own = {k: v for k, v in given.items() if k in keywords(name)}
                    answers = Answers(policy, jnp.asarray(theirs), tokens)
                    total += weight * losses.LOSSES[name](answers, **own)
                return total.mean(), total

            (_, found), gradient = jax.value_and_grad(each, has_aux=True)(jnp.asarray(policy))
            return np.asarray(found), np.asarray(gradient)

        far = lambda found, wanted: abs(found - wanted).max() / max(1.0, abs(wanted).max())
        narrow = policy.astype(np.float32), theirs.astype(np.float32)
        with jax.enable_x64(True):
            found, gradient = both(policy, theirs)
            wide = both(*(x.astype(np.float64) for x in narrow))
        assert far(found, np.array(case["losses"])) <= 1e-12, case["id"]
        sides = [f"grad_mean_loss_wrt_policy_{x}_logps" for x in ("chosen", "rejected")]
        if sides[0] in case and case["id"] not in KINKS:
            expected = np.array([case[side] for side in sides]).T
            assert far(gradient, expected) <= 2e-9, case["id"]
        for x, y in zip(both(*narrow), wide, strict=True):
            assert far(x, y) <= 1e-6 or case["id"] in KINKS, case["id"]


@pytest.mark.parametrize("which", full_but(["rand0", "rand2", "rand5"], "rand0"))
def test_agrees_with_the_table_token_by_token(shared, which):
    """What counts tokens, or pairs by their tokens: ld_alpha and use_weighting."""
    table = json.loads((shared / "golden" / "preference_losses.json").read_text())
    tokens = table["sets"][which]["tokens"]
    sides = ("chosen", "rejected")
    each = {name: [tokens[f"{name}_{side}"] for side in sides] for name in ("policy", "ref")}
    log_p2 = [tokens[f"policy_{side}_log_sum_p2"] for side in sides]
    counts = np.array([[len(x) for x in side] for side in each["policy"]]).T
    cases = [
        case for case in table["cases"]
        if case["set"] == which and {"ld_alpha", "use_weighting"} & case["params"].keys()
    ]  # fmt: skip
    assert len(cases) == 10
    for case in cases:
        given = dict(case["params"])
        alpha, weighs = given.pop("ld_alpha", None), given.pop("use_weighting", False)

        def summed(values, alpha=alpha):
            ones = [[np.ones(n) for n in column] for column in counts.T]
            if alpha is not None:
                ones = [list(column) for column in zip(*map(discounts(alpha), counts), strict=True)]
            of = lambda some, weights: [np.dot(x, w) for x, w in zip(some, weights, strict=True)]
            return np.array([of(*both) for both in zip(values, ones, strict=True)]).T

        with jax.enable_x64(True):
            known = Answers(
                jnp.asarray(summed(each["policy"])), jnp.asarray(summed(each["ref"])),
                jnp.asarray(counts), log_p2=jnp.asarray(summed(log_p2)),
            )  # fmt: skip
            objective = objectives.objective({"loss": case["loss"]} | given)
            found = objective._replace(use_weighting=weighs).loss(known)
        expected = np.array(case["losses"])
        assert abs(found - expected).max() <= 1e-12 * max(1, abs(expected).max()), case["id"]


def discounts(alpha):
    """What each token of a pair's two answers counts, of so many."""

    def of_pair(counts):
        answers = [ids for n in counts for ids in (np.ones(n, np.int32), np.ones(n, bool))]
        made = streams.separate(PairIds(0, np.ones(1, np.int32), *answers[::2], *answers[1::2]))
        return [stream.weights for stream in streams.discounted(made, alpha)]

    return of_pair


@pytest.mark.parametrize("which", full_but(["rand0", "rand2", "rand5"], "rand0", "rand5"))
def test_from_logits_to_losses(shared, which):
    """The table's sets from their logits on: a head of ones gives them back."""
    table = json.loads((shared / "golden" / "preference_losses.json").read_text())
    one = table["end_to_end"][which]
    ids, scored, real = (
        np.array(one[x]) for x in ("input_ids", "completion_mask", "attention_mask")
    )
    pairs, eye = len(ids) // 2, jnp.eye(one["vocab_size"])

    def logps_of(logits):
        found = []
        for row, mask, there, out in zip(ids, scored, real, np.array(logits), strict=True):
            begin, end = int(np.argmax(mask)), int(there.sum())
            answer = AnswerIds(0, row[:begin], row[begin:end], mask[begin:end].astype(bool))
            (stream,) = streams.separate(answer)
            hidden = jnp.asarray(out[None, stream.read_at], jnp.float32)
            counts = jnp.array([len(stream.target)])
            target = jnp.asarray(stream.target[None])
            each, beside = with_beside(hidden, eye, target, counts, jnp.float32)
            np.testing.assert_array_equal(
                each, token_logps(hidden, eye, target, counts, jnp.float32)
            )
            sums = (float(x.sum()) for x in (each, *beside))
            found.append((*sums, len(stream.target)))
        return np.array(found).reshape(2, pairs, 4).transpose(2, 1, 0)

    policy, log_p2, is_best, tokens = logps_of(one["policy_logits"])
    theirs, *_ = logps_of(one["ref_logits"])
    for found, name in ((policy, "policy"), (theirs, "ref")):
        expected = np.array(one[f"expected_{name}_logps"]).reshape(2, pairs).T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    known = Answers(*(jnp.asarray(x, jnp.float32) for x in (policy, theirs, tokens)))
    known = known._replace(log_p2=jnp.asarray(log_p2), is_best=jnp.asarray(is_best))
    found = metrics.token_accuracy(known, jnp.ones(pairs, bool))["token_accuracy"]
    expected = one["expected_metrics"]["mean_token_accuracy"]
    assert float(found) == pytest.approx(expected, rel=1e-6)
    weighted = [one for one in table["cases"] if one["params"].get("use_weighting")]
    for case in (case for case in weighted if case["set"] == which):
        given = {"loss": case["loss"]} | case["params"]
        found, expected = objectives.objective(given).loss(known), np.array(case["losses"])
        assert abs(found - expected).max() <= 1e-4 * max(1.0, abs(expected).max()), case["id"]
    cases = [case for case in cases_of(table) if case[0]["set"] == which]
    for case, terms, given in cases:
        own = lambda name, given=given: {k: v for k, v in given.items() if k in keywords(name)}
        found = sum(weight * losses.LOSSES[name](known, **own(name)) for name, weight in terms)
        expected = np.array(case["losses"])
        assert abs(found - expected).max() <= 1e-4 * max(1.0, abs(expected).max()), case["id"]

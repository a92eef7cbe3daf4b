"""Preference losses: what is known about every pair in, one loss per pair out.

A log-ratio is log policy(answer) - log reference(answer), in nats, summed over the answer's scored
tokens; c is that of the chosen answer, r of the rejected one. To add a loss: a function here, its
name in `LOSSES`, and in `FIRST` what it is where policy and reference are equal, or its name in
`WITHOUT_REFERENCE`. Every keyword-only parameter is an option, and a setting of that name; what
else a loss may look at is in `Answers`.
Lists of more answers are given to a loss as pairs (lists.py), unless its name is in `OF_LISTS`;
those in `UNPAIRED` (data/rows/source.py) are given an answer and, in place of the rejected one, an
answer to another prompt.
"""

from collections.abc import Callable
import math

import jax
from jax.nn import log_sigmoid, softplus
from jax.nn import sigmoid as logistic
import jax.numpy as jnp
from jaxtyping import Array, Float

from recipes.preference import lists
from recipes.preference.divergences import of_scores
from recipes.training.update import Answers

Each = Float[Array, " P"]


def log_ratios(answers: Answers) -> tuple[Each, Each]:
    """The log-ratios of the chosen and of the rejected answers."""
    chosen, rejected = (answers.policy - answers.reference).T
    return chosen, rejected


def ratios_per_token(answers: Answers) -> tuple[Each, Each]:
    """The log-ratios divided by the number of scored tokens: means, in nats per token."""
    chosen, rejected = ((answers.policy - answers.reference) / answers.tokens).T
    return chosen, rejected


def required_margin(answers: Answers) -> Each | float:
    """The margin by which the chosen rewards must lead, as given by the data: DPO with an offset.

    Source: https://arxiv.org/abs/2402.10571.
    """
    return 0.0 if answers.margins is None else answers.margins


@of_scores
def sigmoid(answers: Answers, *, beta: float, label_smoothing: float = 0.0) -> Each:
    """Direct preference optimization: -log S(beta (c - r)).

    `label_smoothing` is the share of pairs assumed to be mislabelled: conservative DPO.

    Source: Eq. 7 of https://arxiv.org/abs/2305.18290; Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    chosen, rejected = log_ratios(answers)
    return _smoothed(beta * (chosen - rejected) - required_margin(answers), label_smoothing)


def sigmoid_norm(answers: Answers, *, beta: float, label_smoothing: float = 0.0) -> Each:
    """DPO on means over tokens, -log S(beta (c / Lc - r / Lr)): long answers weigh no more.

    Source: https://arxiv.org/abs/2411.15124 (Tulu 3); open-instruct's dpo_norm, TRL's sigmoid_norm.
    """
    chosen, rejected = ratios_per_token(answers)
    return _smoothed(beta * (chosen - rejected) - required_margin(answers), label_smoothing)


@of_scores
def hinge(answers: Answers, *, beta: float) -> Each:
    """max(0, 1 - beta (c - r)): zero once a pair has a margin of 1 / beta.

    Source: SLiC, https://arxiv.org/abs/2305.10425, on log-ratios as in RSO,
    https://arxiv.org/abs/2309.06657.
    """
    chosen, rejected = log_ratios(answers)
    return jax.nn.relu(1 + required_margin(answers) - beta * (chosen - rejected))


def ipo(answers: Answers, *, beta: float) -> Each:
    """IPO on means over tokens: (c / Lc - r / Lr - 1 / (2 beta))², as in TRL.

    Source: Eq. 17 of https://arxiv.org/abs/2310.12036.
    """
    chosen, rejected = ratios_per_token(answers)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@of_scores
def ipo_sum(answers: Answers, *, beta: float) -> Each:
    """Identity preference optimization: (c - r - 1 / (2 beta))², as in the paper.

    Source: Eq. 17 of https://arxiv.org/abs/2310.12036.
    """
    chosen, rejected = log_ratios(answers)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@of_scores
def robust(answers: Answers, *, beta: float, label_smoothing: float = 0.0) -> Each:
    """DPO without the bias of labels that are wrong at a known rate, `label_smoothing`.

    ((1 - e) (-log S(x)) + e log S(-x)) / (1 - 2 e), where x = beta (c - r).

    Source: https://arxiv.org/abs/2403.00409; TRL's robust.
    """
    chosen, rejected = log_ratios(answers)
    margin, wrong = beta * (chosen - rejected) - required_margin(answers), label_smoothing
    return ((1 - wrong) * softplus(-margin) - wrong * softplus(margin)) / (1 - 2 * wrong)


@of_scores
def exo_pair(answers: Answers, *, beta: float, label_smoothing: float) -> Each:
    """The reverse KL divergence from smoothed labels to S(beta (c - r)).

    S(x) (log S(x) - log(1 - e)) + S(-x) (log S(-x) - log e); e must be above 0.

    Source: Eq. 16 of https://arxiv.org/abs/2402.00856.
    """
    chosen, rejected = log_ratios(answers)
    margin, wrong = beta * (chosen - rejected), label_smoothing
    right = logistic(margin) * (log_sigmoid(margin) - math.log1p(-wrong))
    return right + logistic(-margin) * (log_sigmoid(-margin) - math.log(wrong))


@of_scores
def discopop(answers: Answers, *, beta: float, discopop_tau: float = 0.05) -> Each:
    """The log-ratio modulated loss that a search over programs found.

    (1 - m) (-log S(x)) + m exp(-x), where x = beta (c - r) and m = S(x / tau).

    Source: Eq. 5 of https://arxiv.org/abs/2406.08414.
    """
    chosen, rejected = log_ratios(answers)
    margin = beta * (chosen - rejected)
    share = logistic(margin / discopop_tau)
    return (1 - share) * softplus(-margin) + share * jnp.exp(-margin)


def dpop(
    answers: Answers, *, beta: float, label_smoothing: float = 0.0, dpop_lambda: float
) -> Each:
    """DPO-Positive: a chosen answer less likely than under the reference costs `dpop_lambda` times.

    The margin c - r loses lambda max(0, -c).

    Source: Eq. 3 of https://arxiv.org/abs/2402.13228.
    """
    chosen, rejected = log_ratios(answers)
    held = chosen - dpop_lambda * jax.nn.relu(-chosen)
    return _smoothed(beta * (held - rejected) - required_margin(answers), label_smoothing)


def r_dpo(
    answers: Answers, *, beta: float, label_smoothing: float = 0.0, length_alpha: float
) -> Each:
    """DPO of a reward less `length_alpha` per token: -log S(beta (c - r) + alpha (Lc - Lr)).

    What a longer chosen answer wins by its length alone is not learnt.

    Source: https://arxiv.org/abs/2403.19159; R-DPO in Table 3 of https://arxiv.org/abs/2405.14734.
    """
    chosen, rejected = log_ratios(answers)
    longer = answers.tokens[:, 0] - answers.tokens[:, 1]
    margin = beta * (chosen - rejected) + length_alpha * longer
    return _smoothed(margin - required_margin(answers), label_smoothing)


def nca_pair(answers: Answers, *, beta: float) -> Each:
    """Noise contrastive alignment: -log S(beta c) - (log S(-beta c) + log S(-beta r)) / 2.

    Source: https://arxiv.org/abs/2402.05369; TRL's nca_pair.
    """
    chosen, rejected = (beta * x for x in log_ratios(answers))
    return softplus(-chosen) + (softplus(chosen) + softplus(rejected)) / 2


def bco_pair(answers: Answers, *, beta: float) -> Each:
    """Binary classifier optimization, without its running shift: -log S(beta c) - log S(-beta r).

    Source: https://arxiv.org/abs/2404.04656; TRL's bco_pair.
    """
    chosen, rejected = (beta * x for x in log_ratios(answers))
    return softplus(-chosen) + softplus(rejected)


def sppo_hard(answers: Answers, *, beta: float) -> Each:
    """Self-play preference optimization on hard labels: (c - 1/(2 beta))² + (r + 1/(2 beta))².

    Source: Eq. 4.7 of https://arxiv.org/abs/2405.00675, where eta is 1 / beta.
    """
    chosen, rejected = log_ratios(answers)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(answers: Answers, *, beta: float) -> Each:
    """Anchored: chosen answers more likely, rejected ones less: 1 - S(beta c) + S(beta r).

    For chosen answers that are better than the policy's own.

    Source: Eq. 7 of https://arxiv.org/abs/2408.06266.
    """
    chosen, rejected = (beta * x for x in log_ratios(answers))
    return logistic(-chosen) + logistic(rejected)


def apo_down(answers: Answers, *, beta: float) -> Each:
    """Anchored: both answers less likely, rejected ones more so: S(beta c) + 1 - S(beta (c - r)).

    For chosen answers that are worse than the policy's own.

    Source: Eq. 8 of https://arxiv.org/abs/2408.06266.
    """
    chosen, rejected = (beta * x for x in log_ratios(answers))
    return logistic(chosen) + logistic(rejected - chosen)


def aot(answers: Answers, *, beta: float, label_smoothing: float = 0.0) -> Each:
    """The policy's margins should lie above the reference's as distributions, not pair by pair.

    -log S(beta (sort(pc - pr) - sort(rc - rr))), in sorted order.

    Source: https://arxiv.org/abs/2406.05882; TRL's aot.
    """
    of_policy, of_reference = (x[:, 0] - x[:, 1] for x in (answers.policy, answers.reference))
    return _smoothed(beta * (jnp.sort(of_policy) - jnp.sort(of_reference)), label_smoothing)


def aot_unpaired(answers: Answers, *, beta: float, label_smoothing: float = 0.0) -> Each:
    """The log-ratios of chosen answers should lie above those of rejected ones as distributions.

    -log S(beta (sort(c) - sort(r))), in sorted order.

    Source: https://arxiv.org/abs/2406.05882; TRL's aot_unpaired.
    """
    chosen, rejected = log_ratios(answers)
    return _smoothed(beta * (jnp.sort(chosen) - jnp.sort(rejected)), label_smoothing)


def kto(
    answers: Answers,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Each:
    """Kahneman-Tversky optimization, of answers that are wanted or not: w (1 - S(beta (x - z))).

    x is an answer's log-ratio, and of an unwanted one z - x stands for x - z. z is the KL
    divergence from policy to reference, of which the update's answers to other prompts give an
    estimate: the mean of their log-ratios, at least 0. No gradient comes from it.

    Source: Section 4.1 of https://arxiv.org/abs/2402.01306; TRL's KTO.
    """
    assert answers.ratings is not None
    own, other = log_ratios(answers)
    above = own - jax.lax.stop_gradient(jax.nn.relu(other.mean()))
    of_wanted = desirable_weight * logistic(-beta * above)
    return jnp.where(
        answers.ratings[:, 0] > 0, of_wanted, undesirable_weight * logistic(beta * above)
    )


def plackett_luce(answers: Answers, *, beta: float) -> Each:
    """For a list: -log of the probability of its order, sum of log sum_j exp(b x_j) - b x_k over k.

    j is k and every answer ranked below it, x a log-ratio. Answers that are ranked alike are not
    compared, and the lowest add nothing: of a pair it is sigmoid, of one answer chosen among others
    a softmax over them all.

    Source: Eq. 20 in Appendix A.3 of https://arxiv.org/abs/2305.18290.
    """
    rewards = beta * (answers.policy - answers.reference)
    ranks, here = lists.ranks_of(answers), answers.tokens > 0
    below = here[:, None] & (ranks[:, None] > ranks[..., None])  # [P, k, j]
    seen = below | jnp.eye(rewards.shape[1], dtype=bool)
    of_all = jax.nn.logsumexp(jnp.where(seen, rewards[:, None], -jnp.inf), axis=-1)
    return jnp.where(here & below.any(-1), of_all - rewards, 0).sum(-1)


def reference_free(answers: Answers, *, beta: float, label_smoothing: float = 0.0) -> Each:
    """DPO against a reference that finds all answers equally likely: -log S(beta (pc - pr)).

    Source: reference_free in the code of https://arxiv.org/abs/2305.18290's authors.
    """
    chosen, rejected = answers.policy.T
    return _smoothed(beta * (chosen - rejected) - required_margin(answers), label_smoothing)


def simpo(
    answers: Answers, *, beta: float, gamma_beta_ratio: float = 0.5, label_smoothing: float = 0.0
) -> Each:
    """SimPO: -log S(beta (pc / Lc - pr / Lr - gamma / beta)), by `gamma_beta_ratio`.

    Source: Eq. 6 of https://arxiv.org/abs/2405.14734.
    """
    chosen, rejected = (answers.policy / answers.tokens).T
    margin = beta * (chosen - rejected - gamma_beta_ratio)
    return _smoothed(margin - required_margin(answers), label_smoothing)


def cpo(
    answers: Answers, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 1.0
) -> Each:
    """Contrastive preference optimization: reference_free + `cpo_alpha` sft.

    Source: https://arxiv.org/abs/2401.08417; TRL's CPO, with sft by tokens.
    """
    preferred = reference_free(answers, beta=beta, label_smoothing=label_smoothing)
    return preferred + cpo_alpha * sft(answers)


def orpo(answers: Answers) -> Each:
    """The log odds ratio of ORPO, -log S(log odds(chosen) - log odds(rejected)), by means.

    The odds of p are p / (1 - p), where log p is an answer's mean per token. The paper's loss is
    sft plus 0.1 to 1 times this: `loss=sft,orpo=0.1`.

    Source: Eq. 7 of https://arxiv.org/abs/2403.07691.
    """
    mean = answers.policy / answers.tokens
    least = float(jnp.finfo(mean.dtype).eps)  # of a certain answer the odds are infinite
    chosen, rejected = (mean - _log1m_exp(jnp.minimum(mean, -least))).T
    return softplus(rejected - chosen)


def sft(answers: Answers) -> Each:
    """Nats per scored token of all chosen answers of the update; one value, for every pair.

    Source: the second term of Llama 3's DPO, https://arxiv.org/abs/2407.21783, by tokens as in TRL.
    """
    chosen, tokens = answers.policy[:, 0], answers.tokens[:, 0]
    own = -chosen * len(chosen) / tokens.sum()
    # The value is the mean of all, and the gradient that of one's own share: so it adds up where
    # a micro-batch holds some of the pairs.
    return own + jax.lax.stop_gradient(own.mean() - own)


def sft_seq(answers: Answers) -> Each:
    """Nats per scored token of each chosen answer, which all weigh the same.

    Source: the second term of https://arxiv.org/abs/2404.19733 (RPO).
    """
    return -answers.policy[:, 0] / answers.tokens[:, 0]


def on_policy(answers: Answers) -> Each:
    """The weight of a pair in WPO: the product of how likely its answers are under the policy.

    Of each answer exp of the mean over its tokens of log p - log sum p², where the sum is over the
    vocabulary: about 1 for answers like those that are drawn from the policy, and more for the
    likeliest. It has no gradient and no bound.

    Source: https://arxiv.org/abs/2406.11827, sampled alignment; TRL 1.16's use_weighting.
    """
    assert answers.log_p2 is not None
    each = (answers.policy - answers.log_p2) / answers.tokens
    return jax.lax.stop_gradient(jnp.exp(each.sum(-1)))


def _smoothed(margin: Each, label_smoothing: float) -> Each:
    right, wrong = softplus(-margin), softplus(margin)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _log1m_exp(x: Array) -> Array:
    """log(1 - exp(x)) for x below 0, without the loss of digits at either end."""
    near = x > -math.log(2)
    of_near, of_far = jnp.where(near, x, -1.0), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(of_near)), jnp.log1p(-jnp.exp(of_far)))


LOSSES: dict[str, Callable[..., Each]] = {
    loss.__name__: loss
    for loss in (
        sigmoid, sigmoid_norm, hinge, ipo, ipo_sum, robust, exo_pair, discopop, dpop, r_dpo,
        nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, aot, aot_unpaired, kto, plackett_luce,
        reference_free, simpo, cpo, orpo, sft, sft_seq,
    )
}  # fmt: skip

# Losses of the policy alone: a run with no others has no reference.
WITHOUT_REFERENCE = ("reference_free", "simpo", "cpo", "orpo", "sft", "sft_seq")

LN2 = math.log(2)
# The first value of every other loss, by its options: what it is where policy and reference are
# equal. None, or not a number: that depends on the pairs, and is computed from them.
FIRST: dict[str, Callable[..., float] | None] = {
    "sigmoid": lambda **_: LN2,
    "sigmoid_norm": lambda **_: LN2,
    "hinge": lambda **_: 1.0,
    "ipo": lambda beta, **_: 1 / (4 * beta**2),
    "ipo_sum": lambda beta, **_: 1 / (4 * beta**2),
    "robust": lambda **_: LN2,
    "exo_pair": lambda label_smoothing, **_: (
        -LN2 - math.log1p(-label_smoothing) / 2 - math.log(label_smoothing) / 2
    ),
    "discopop": lambda **_: (LN2 + 1) / 2,
    "dpop": lambda **_: LN2,
    "r_dpo": None,
    "nca_pair": lambda **_: 2 * LN2,
    "bco_pair": lambda **_: 2 * LN2,
    "sppo_hard": lambda beta, **_: 1 / (2 * beta**2),
    "apo_zero": lambda **_: 1.0,
    "apo_down": lambda **_: 1.0,
    "aot": lambda **_: LN2,
    "aot_unpaired": lambda **_: LN2,
    "kto": None,
    "plackett_luce": lambda **_: LN2,
}
# These look at all pairs of an update at once.
COUPLED = ("aot", "aot_unpaired", "kto")
OF_AN_UPDATE = (*COUPLED, "sft", "cpo")  # and these are what they are for all of them together
# In these the data may ask for a margin.
OF_MARGINS = (
    "sigmoid", "sigmoid_norm", "hinge", "robust", "dpop", "r_dpo", "reference_free", "simpo", "cpo",
)  # fmt: skip
# These look at a list as it is, or at its best answer alone.
OF_LISTS = ("plackett_luce", "sft", "sft_seq")
# Beta multiplies means per token in the first, no log-probability in the second, and else sums.
PER_TOKEN = ("sigmoid_norm", "simpo")
FREE_OF_BETA = ("orpo", "sft", "sft_seq", "ipo", "ipo_sum", "sppo_hard")
# Without a reference the reward of an answer is then a mean, too.
ALONE_PER_TOKEN = ("simpo", "orpo")

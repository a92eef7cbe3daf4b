"""f-divergences, which a loss may see in place of log-ratios; an estimate of the KL divergence."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from recipes.training.update import Answers

MOST = 80.0  # exp of more is infinite in float32, and a margin of two infinities no number

# Up to constants, which cancel in a margin.
DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda u, _: u,
    "forward_kl": lambda u, _: -_expm1(-u),
    "js_divergence": lambda u, _: jax.nn.log_sigmoid(u),
    "alpha_divergence": lambda u, a: u if a == 1 else _expm1((a - 1) * u) / (a - 1),
}


def kl_estimate(log_ratio: Array) -> Array:
    """An estimate of the KL divergence from samples of the first distribution: never below 0.

    Source: k3 of http://joschu.net/blog/kl-approx.html.
    """
    return jnp.expm1(log_ratio) - log_ratio


def _expm1(x: Array) -> Array:
    return jnp.expm1(jnp.minimum(x, MOST))


def of_scores(loss: Callable[..., Float[Array, " P"]]) -> Callable[..., Float[Array, " P"]]:
    """A loss of margins with the scores of an f-divergence in place of its log-ratios.

    It gets two options more. `f_divergence_type` is the divergence that keeps the policy near the
    reference: reverse_kl (the log-ratios themselves), forward_kl, js_divergence or
    alpha_divergence, whose alpha is `f_alpha_divergence_coef` as in TRL.

    Source: Table 1 of https://arxiv.org/abs/2309.16240; TRL's names.
    """

    def scored(
        answers: Answers,
        *,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 1.0,
        **options: float,
    ) -> Float[Array, " P"]:
        if f_divergence_type not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise BadInput(
                f"--config.f_divergence_type={f_divergence_type!r} is not one of {known}"
            )
        of = DIVERGENCES[f_divergence_type]
        scores = of(answers.policy - answers.reference, f_alpha_divergence_coef)
        return loss(answers._replace(policy=scores, reference=jnp.zeros_like(scores)), **options)

    given = inspect.signature(scored).parameters.values()
    more = [one for one in given if one.kind is one.KEYWORD_ONLY]
    own = inspect.signature(loss)
    of_both: Any = functools.update_wrapper(scored, loss)
    of_both.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])
    return scored

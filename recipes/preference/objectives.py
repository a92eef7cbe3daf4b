"""The objective of a run: a weighted sum of losses, from the settings."""

from collections.abc import Callable
import functools
import inspect
import math
from typing import NamedTuple

from jaxtyping import Array, Float

from checkpoints_io.errors import BadInput
from recipes.data.rows.source import UNPAIRED
from recipes.preference import lists, losses, refusals
from recipes.preference.losses import FIRST, LOSSES
from recipes.training import written
from recipes.training.by_name import Values
from recipes.training.nearest import did_you_mean
from recipes.training.settings import PREFERENCE
from recipes.training.update import Answers

# What others call our losses, and what to set.
CALLED = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "cdpo": "sigmoid with --config.label_smoothing",
    "rpo": "sigmoid,sft=0.2",
    "mpo": "sigmoid=0.8,bco_pair=0.2,sft",
    "slic": "hinge",
    "rso": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "sppo_hard_nll": "sppo_hard",
    "apo": "apo_zero or apo_down",
    "aot_pair": "aot",
    "nll": "sft",
    "rdpo": "r_dpo",
    "r-dpo": "r_dpo",
    "cposimpo": "simpo,sft",
    "pl": "plackett_luce",
    "listmle": "plackett_luce",
    "s-dpo": "plackett_luce",
    "kto_pair": "bco_pair",
}


class Term(NamedTuple):
    """One loss of the sum."""

    name: str
    weight: float
    of: Callable[[Answers], Float[Array, " P"]]
    first: float  # its value where policy and reference are equal; NaN: it depends on the pairs

    @property
    def has_reference(self) -> bool:
        """Whether it looks at the reference's log-probabilities."""
        return self.name not in losses.WITHOUT_REFERENCE


class Objective(NamedTuple):
    """The losses of a run, with their options."""

    terms: tuple[Term, ...]
    beta: float
    list_pairs: str = "all"  # which pairs of a list are compared: all, or the best answer's
    use_weighting: bool = False  # pairs count by how likely the policy would say them: WPO

    def loss(self, answers: Answers) -> Float[Array, " P"]:
        """The weighted sum, of each pair or list."""
        return functools.reduce(
            lambda so_far, term: so_far + term.weight * self.value(term, answers),
            self.terms[1:],
            self.terms[0].weight * self.value(self.terms[0], answers),
        )

    def value(self, term: Term, answers: Answers) -> Float[Array, " P"]:
        """One of the losses for each pair or list, times the weight of that pair."""
        return self.counted(term.of(answers), answers)

    def counted(self, each: Float[Array, " P"], answers: Answers) -> Float[Array, " P"]:
        """Values of pairs or lists, times their weights by the data and the policy."""
        if answers.weights is not None:
            each = answers.weights * each
        if self.use_weighting and answers.log_p2 is not None:  # it is known in training alone
            each = losses.on_policy(answers) * each
        return each

    def rewards(self, answers: Answers) -> Float[Array, "P A"]:
        """The implicit reward of each answer: beta times its log-ratio.

        Without a reference it is of the log-probability: by tokens where the loss is.
        """
        rewards = self.beta * (answers.policy - answers.reference)
        if (
            any(term.name in losses.ALONE_PER_TOKEN for term in self.terms)
            and not self.has_reference
        ):
            return rewards / answers.tokens
        return rewards

    @property
    def has_reference(self) -> bool:
        """Whether any term looks at one."""
        return any(term.has_reference for term in self.terms)

    @property
    def is_coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its update."""
        return any(term.name in losses.COUPLED for term in self.terms)

    @property
    def is_unpaired(self) -> bool:
        """Whether the losses take single wanted or unwanted answers instead of pairs."""
        return any(term.name in UNPAIRED for term in self.terms)

    def of_an_update(self) -> list[str]:
        """The names of figures that depend on all pairs of an update together."""
        names = [term.name for term in self.terms if term.name in losses.OF_AN_UPDATE]
        return ["dpo_loss", *(f"loss_{name}" for name in names)] if names else []

    def of_terms(self, answers: Answers) -> dict[str, Float[Array, " P"]]:
        """Each unweighted term by name, if there are several."""
        several = len(self.terms) > 1
        return {term.name: self.value(term, answers) for term in self.terms} if several else {}


def objective(given: Values) -> Objective:
    """The sum that `loss` names: "sigmoid", or terms with weights, "sigmoid,sft=0.2".

    A setting that is not given is as the table has it.

    Raises:
      ValueError: there is no such loss; or an option is missing, is of no term, or does not fit.
    """
    unset: Values = {name: setting.default for name, setting in PREFERENCE.items()}
    given = unset | given
    weights = _weights(given["loss"])
    options = {name: _options(name) for name in weights}
    refusals.check(given, weights)
    taken = {"loss", "beta", "ld_alpha", "list_pairs", "use_weighting"}.union(*options.values())
    for name, setting in PREFERENCE.items():
        if name not in taken and given[name] != setting.default:
            others = [loss for loss in LOSSES if name in _options(loss)]
            raise BadInput(
                f"--config.{name} has no effect with --config.loss={given['loss']}: it only "
                f"applies to {', '.join(others)}"
            )
    if set(weights) <= {"sft", "sft_seq"}:
        raise BadInput(
            f"--config.loss={given['loss']} only trains on the chosen answers: for supervised "
            "fine-tuning use recipes/sft.py"
        )
    terms = tuple(_term(name, weight, options[name], given) for name, weight in weights.items())
    return Objective(
        terms, given["beta"], given["list_pairs"] or "all", bool(given["use_weighting"])
    )


def _weights(text: str) -> dict[str, float]:
    """The weights in "sigmoid=0.8,sft" by name, 1 where none is given."""
    found: dict[str, float] = {}
    for name, number in written.loss_terms(text):
        if name not in LOSSES:
            ours = CALLED.get(name.lower())
            near = f" (it is called {ours} here)" if ours else did_you_mean(name, LOSSES)
            raise BadInput(
                f"--config.loss={text}: there is no loss {name!r}{near}; choose from "
                f"{', '.join(LOSSES)} (see docs/losses.md)"
            )
        try:
            weight = 1.0 if number is None else float(number)
        except ValueError:
            weight = math.nan
        if name in found or not 0 < weight < math.inf:
            term = name if number is None else f"{name}={number}"
            raise BadInput(
                f"--config.loss={text}: {term!r} is not of the form sft=0.2: name each loss once, "
                "with a weight above 0"
            )
        found[name] = weight
    return found


def _options(loss: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(LOSSES[loss]).parameters.values()
    return {one.name: one for one in parameters if one.kind is one.KEYWORD_ONLY}


def _term(name: str, weight: float, options: dict[str, inspect.Parameter], given: Values) -> Term:
    named = {}
    for option, parameter in options.items():
        value = given[option]
        if parameter.default is parameter.empty and value in (None, PREFERENCE[option].default):
            raise BadInput(f"set --config.{option}, which --config.loss={name} requires")
        if value is not None:
            named[option] = value
    promised = FIRST.get(name)
    first = math.nan if promised is None else promised(**named)
    of = functools.partial(LOSSES[name], **named)
    if name not in losses.OF_LISTS:
        of = lists.of_pairs(of, given["list_pairs"] or "all")
    elif given.get("data.answers", 2) > 2:
        first = math.nan  # it depends on how many answers a list has
    return Term(name, weight, of, first)

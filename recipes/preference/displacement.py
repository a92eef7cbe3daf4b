"""What the metrics look good beside: chosen answers become less likely, or a policy falls apart."""

import collections
from collections.abc import Mapping

from recipes.preference import losses
from recipes.preference.objectives import Objective

APART = 5.0  # nats per token: of 1,000 words that are all alike likely, each has 6.9


class Trend:
    """Warns once when both rewards fall while accuracy rises, and once of a policy in ruins."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._readings: collections.deque[Mapping] = collections.deque(maxlen=3)
        self._said = self._ruined = False

    def read(self, figures: Mapping[str, int | float]) -> str | None:
        """A sentence, where there is something to say that has not been said."""
        self._readings.append(figures)
        return self._of_ruins(figures) or self._of_falling()

    def _of_ruins(self, figures: Mapping[str, int | float]) -> str | None:
        """Where a token of the chosen answers is a hundred times less likely than it was."""
        tokens = figures.get("train/length_chosen")
        lost = -figures.get("train/drift_chosen", 0.0) / tokens if tokens else 0.0
        if self._ruined or not lost > APART or not self._objective.has_reference:
            return None
        self._ruined = True
        return (
            f"each token of the chosen answers is {lost:.3g} nats less likely under the policy "
            "than under the reference: whatever accuracy and margin say, the model's text is "
            "probably broken; start again with a lower --config.learning_rate, or a higher "
            "--config.beta"
        )

    def _of_falling(self) -> str | None:
        """Where over three readings both rewards fall while accuracy rises."""
        # Without a reference a reward is a log-probability, and always below 0.
        if self._said or len(self._readings) < 3 or not self._objective.has_reference:
            return None
        chosen, rejected, accuracy = (
            [reading[f"train/{name}"] for reading in self._readings]
            for name in ("dpo_chosen_reward", "dpo_rejected_reward", "dpo_accuracy")
        )
        falls = lambda values: 0 > values[0] > values[1] > values[2]
        rises = accuracy[2] > max(0.5, accuracy[0])
        if not (rises and falls(chosen) and falls(rejected)):
            return None
        self._said = True
        names = [term.name for term in self._objective.terms]
        higher = "a higher --config.beta, which keeps the policy closer to the reference"
        remedy = f"start a new run with {higher}"
        of_pairs = not self._objective.is_unpaired
        if of_pairs and not {"dpop", *losses.PER_TOKEN} & set(names):
            remedy = (
                "start a new run with either --config.loss=dpop --config.dpop_lambda=5, which "
                f"keeps chosen answers likely, or {higher}"
            )
        return (
            "the rewards of both answers fall while accuracy rises: the policy makes the chosen "
            "answers less likely too, and other answers more likely (arXiv 2410.08847). A little "
            f"of this is common. If answers get worse, {remedy}"
        )

"""How well a model predicts plain texts: nats per token, and bits per byte of text."""

from collections.abc import Iterator, Mapping
import math

import numpy as np

from recipes.data.texts import Texts
from recipes.training import logps
from recipes.training.run import Run


def evaluate(run: Run, ask: logps.Forward) -> Iterator[dict[str, float]]:
    """The figures of each set of texts; bits per byte can be compared across tokenizers."""
    for texts in run.texts:
        nats = -_logp(texts, ask, run)
        yield {
            f"eval/{texts.name}/loss": nats / texts.tokens,
            f"eval/{texts.name}/bits_per_byte": nats / math.log(2) / texts.bytes,
        }


def lines(run: Run, figures: Mapping[str, float]) -> list[str]:
    """The lines about plain texts at the end of a run."""
    return [
        f"{texts.name} texts: {figures[name]:.4f} bits per byte ({texts.how_many()})"
        for texts in run.texts
        if (name := f"eval/{texts.name}/bits_per_byte") in figures
    ]


def _logp(texts: Texts, ask: logps.Forward, run: Run) -> float:
    assert run.place_of_texts is not None
    return float(logps.of_examples(ask, texts.windows, run.place_of_texts).sum(dtype=np.float64))

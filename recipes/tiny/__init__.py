"""The model and the pairs of the README's first line, which are installed with the recipes."""

import os


def path(name: str) -> str:
    """Where `model`, `train.jsonl` or `heldout.jsonl` is: short, where a clone is worked in."""
    here = f"recipes/tiny/{name}"
    return here if os.path.exists(here) else os.path.join(os.path.dirname(__file__), name)

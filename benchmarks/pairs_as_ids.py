"""The rows of the work as the packer takes them."""

import numpy as np

from recipes.data.ids.examples import PairIds


def as_ids(row: int, pair: dict[str, list[int]]) -> PairIds:
    """A row of `work.read_pairs`; every token of its answers is scored."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    prompt, chosen, rejected = (np.array(pair[name], np.int32) for name in names)
    masks = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PairIds(row, prompt, chosen, rejected, *masks)

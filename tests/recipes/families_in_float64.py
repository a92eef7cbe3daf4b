"""How far packed rows are from each answer alone, by family, in float64.

Started by test_families.py; prints one JSON record.
"""

import json
import sys

import jax.numpy as jnp

from tests.recipes import test_families
from tests.zoo import twins


def main(*families: str) -> None:
    apart = {}
    for family in families:
        model = twins.untrained(family, twins.RICHEST[family])
        assert model.embedding[...].dtype == jnp.float64
        apart[family] = test_families.apart_by(model, *test_families.SHAPES)
    print(json.dumps(apart))


if __name__ == "__main__":
    main(*sys.argv[1:])

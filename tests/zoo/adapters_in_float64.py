"""The gradient of adapters in float64, by the chain rule; started by test_adapters.py.

Writes every factor's under its name, and fails where the recipe's own gradient is another.
"""

import sys

import jax
import numpy as np

from tests.zoo import test_adapters
from zoo.parts import sharding


def main(path: str, family: str, dora: str) -> None:
    mesh = sharding.mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        work = test_adapters.work_on(mesh)
        sums, given = test_adapters.sums_of(work, family, dora == "True")
        exact = test_adapters.by_name(test_adapters.by_the_chain_rule(work, *given))
    for name, ours in test_adapters.by_name(sums.gradient).items():
        assert ours.dtype == exact[name].dtype == np.float64
        apart = np.linalg.norm(ours - exact[name])
        assert apart <= 1e-12 * np.linalg.norm(exact[name]), (name, apart)
    np.savez(path, **exact)


if __name__ == "__main__":
    main(*sys.argv[1:])

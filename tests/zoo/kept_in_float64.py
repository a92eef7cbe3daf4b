"""How far gradients are from those of recomputed layers, by what layers keep; as JSON.

Started by test_attention.py, in float64: how a compiler rounds float32 is not of interest.
"""

import json

import numpy as np

from tests.zoo import test_attention


def main() -> None:
    full = test_attention.gradient_keeping("full")
    found = {}
    for policy in ("attention", "products", "none"):
        ours = test_attention.gradient_keeping(policy)
        assert {x.dtype for x in ours} == {np.dtype(np.float64)}
        pairs = zip(ours, full, strict=True)
        found[policy] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

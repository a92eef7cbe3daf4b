"""The matrices that nf4 is tested on; `kept` holds what bitsandbytes makes of them."""

import numpy as np

# Shapes, with whole blocks and without, and whether scales are quantised again.
CASES = {"even": ((160, 128), True), "odd": ((7, 44), True), "once": ((33, 64), False)}


def numbers(name: str) -> np.ndarray:
    """The matrix of a case."""
    shape, _ = CASES[name]
    draw = np.random.default_rng(len(name))
    return (draw.standard_normal(shape) * draw.random((shape[0], 1))).astype(np.float32)

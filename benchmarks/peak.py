"""What the machine's matrix product gives: FLOP per CPU second, the median, in float32."""

import json
import time

import jax
import numpy as np

SHAPES = [(4096, 512, 1376), (8192, 512, 512), (2048, 2048, 2048)]
best = 0.0
for m, k, n in SHAPES:
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
    product = jax.jit(jax.numpy.matmul)
    a, b = jax.device_put(a), jax.device_put(b)
    jax.block_until_ready(product(a, b))
    found = []
    for _ in range(15):
        since = time.process_time()
        for _ in range(4):
            jax.block_until_ready(product(a, b))
        found.append(8 * m * k * n / (time.process_time() - since))
    best = max(best, float(np.median(found)))
print(json.dumps({"flop_per_cpu_s": best}))

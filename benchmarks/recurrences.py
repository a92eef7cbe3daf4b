"""What the gated delta net costs, in CPU seconds; prints JSON lines.

python benchmarks/recurrences.py            cost of a token by length, and torch's own chunks
python benchmarks/recurrences.py --depths   time to compile a step, by depth of the model
"""

import json
import time

from absl import flags
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from recipes.training import command
from zoo import qwen3_5
from zoo.parts import delta_rule, spans

DEPTHS = flags.DEFINE_bool("depths", False, "Time to compile, and not cost of a token.")
HEADS, WIDTH = 4, 128
LENGTHS = (512, 1024, 2048, 4096, 8192)
TIMES = 3


def given(T: int) -> list[np.ndarray]:
    """Queries, keys, values, logarithms of decays, betas; keys of unit length."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, T, HEADS, WIDTH)).astype(np.float32) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    decay = -draw.uniform(0, 0.2, (1, T, HEADS)).astype(np.float32)
    return [q, k, v, decay, draw.uniform(0, 1, (1, T, HEADS)).astype(np.float32)]


def cpu_seconds(run) -> float:
    """The least of several, after one that does not count."""
    run()
    taken = []
    for _ in range(TIMES):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return min(taken)


def ours(T: int, *, pairs: bool) -> float:
    """Forward and backward; of one text, or of a row whose prompts have two answers each."""
    arrays = [jnp.asarray(x) for x in given(T)]
    where = forked(T) if pairs else spans.causal(1, T, jnp.array([T]))
    loss = lambda arrays: delta_rule.whole(where, *arrays)[0].sum()
    program = jax.jit(jax.grad(loss))
    return cpu_seconds(lambda: jax.block_until_ready(program(arrays)))


def forked(T: int) -> spans.Spans:
    """Pairs of 200 tokens, as rows store them: 50 of an answer, a prompt of 100, 50 of the other.

    What is left over is one text.
    """
    t, end = np.arange(T), T - T % 200
    at, begin = t % 200, t - t % 200
    first = np.where(at < 50, t, begin + 50)
    last = np.where(at < 50, begin + 150, t + 1)
    positions = np.where(at < 50, 149 - at, at - 50)
    rest = t >= end
    fields = (
        np.where(rest, t - end, positions), np.where(rest, end, first),
        np.where(rest, t + 1, last), np.where(rest, T - end, 150),
    )  # fmt: skip
    return spans.Spans(*(jnp.asarray(x[None], jnp.int32) for x in fields))


def theirs(T: int) -> float:
    """Transformers' chunks in torch, forward and backward, on the same arrays."""
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5

    q, k, v, decay, beta = (torch.tensor(x, requires_grad=True) for x in given(T))

    def run() -> None:
        out, _ = modeling_qwen3_5.torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta)
        out.sum().backward()

    return cpu_seconds(run)


def compiled(depth: int) -> dict[str, float]:
    """CPU seconds to compile the gradient of a small model of so many layers."""
    config = qwen3_5.Config.from_hf(dict(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=depth, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ))  # fmt: skip
    graph, state = nnx.split(qwen3_5.Model(config, nnx.Rngs(0)))
    tokens = jnp.zeros((1, 256), jnp.int32)
    loss = lambda state: nnx.merge(graph, state)(tokens).sum()
    begin = time.process_time()
    jax.jit(jax.grad(loss)).lower(state).compile()
    return {"layers": depth, "cpu_s": round(time.process_time() - begin, 1)}


def main() -> None:
    """Prints a line for each length, or each depth."""
    if DEPTHS.value:
        for depth in (16, 48, 64):
            print(json.dumps(compiled(depth)), flush=True)
        return
    for T in LENGTHS:
        by = {"ours": ours(T, pairs=False), "ours_forked": ours(T, pairs=True), "torch": theirs(T)}
        each = {name: round(1e6 * seconds / T, 1) for name, seconds in by.items()}
        print(json.dumps({"length": T, "cpu_us_per_token": each}), flush=True)


if __name__ == "__main__":
    command.main_without_config(main)

"""Prompt once against each answer behind its own copy: the same pairs, the same update, in turn.

  python benchmarks/layouts.py --size=B
  python benchmarks/layouts.py --family=qwen3_5_text   whose layers are recurrences, too

Pairs with long prompts (60% of an answer's text, as in hh-rlhf), 128 an update. The bound is that
of the matrix products: what the stored positions and the scores cost in either layout, for a Llama.
"""

import pathlib
import statistics
import sys
import tempfile

from absl import flags
import compare
import work

from recipes.training import command
import zoo

SHARE = flags.DEFINE_float("prompt_share", 0.6, "Of the tokens of an answer's text.")
# Models of size A whose layers keep states: their configs beside what all have.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3_5_text": dict(
        head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=32,
        linear_value_head_dim=32, linear_conv_kernel_dim=4,
    ),
    "granitemoehybrid": dict(
        layer_types=["mamba", "mamba", "attention"] * 2, mamba_n_heads=16, mamba_d_head=32,
        mamba_d_state=32, mamba_expand=2, mamba_d_conv=4, mamba_n_groups=1,
        shared_intermediate_size=688, num_local_experts=0, num_experts_per_tok=0,
    ),
    "lfm2": dict(
        layer_types=["conv", "conv", "full_attention"] * 2, conv_L_cache=3,
        block_auto_adjust_ff_dim=False, norm_eps=1e-5, rms_norm_eps=None,
    ),
}  # fmt: skip
FAMILY = flags.DEFINE_enum("family", "llama", list(FAMILIES), "Whose layers are measured.")
LAYOUT_PAIRS = flags.DEFINE_integer("update", 128, "Pairs of an update.", lower_bound=1)


def main() -> None:
    """Prints the ratio of real tokens per CPU second, and its bound."""
    size, steps, pairs = compare.SIZE.value, 1, LAYOUT_PAIRS.value
    found: dict[str, list[dict]] = {"once": [], "separate": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        _write_model(folder / size, size)
        work.write_pairs(folder / "pairs.jsonl", steps * pairs, SHARE.value)
        args = [f"--folder={folder}", f"--size={size}", f"--steps={steps}", f"--pairs={pairs}"]
        for _ in range(compare.ROUNDS.value):
            for name, more in (("once", []), ("separate", ["--separate"])):
                found[name].append(compare.ran(sys.executable, "ours.py", *args, *more))
        layers, head = work.matrices(folder / size)
    cost = {
        name: runs[0]["positions"] * layers + runs[0]["scores"] * head
        for name, runs in found.items()
    }
    cpu = {
        name: statistics.median(x for run in runs for x in run["cpu_s_per_ktok"])
        for name, runs in found.items()
    }
    ratio = cpu["separate"] / cpu["once"]
    print(f"{FAMILY.value}, size {size}: {ratio:.2f} times as many tokens per CPU second")
    if FAMILY.value == "llama":
        print(f"bound by products: {cost['separate'] / cost['once']:.2f}")
    print(f"CPU seconds per 1,000 tokens: {cpu['once']:.3f} and {cpu['separate']:.3f}")
    print(f"positions: {found['once'][0]['positions']} and {found['separate'][0]['positions']}")


def _write_model(folder: pathlib.Path, size: str) -> None:
    if FAMILY.value == "llama":
        work.write_model(folder, size)
        return
    width, mlp, layers = work.SIZES[size]
    own = dict(
        model_type=FAMILY.value, vocab_size=work.VOCABULARY, hidden_size=width,
        intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=work.HEADS,
        num_key_value_heads=work.KEY_HEADS, rms_norm_eps=1e-5, tie_word_embeddings=False,
        max_position_embeddings=4096,
    )  # fmt: skip
    zoo.save(zoo.fresh(own | FAMILIES[FAMILY.value]), folder)


if __name__ == "__main__":
    command.main_without_config(main)

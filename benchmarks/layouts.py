"""Prompt once against each answer behind its own copy: the same pairs, the same update, in turn.

  python benchmarks/layouts.py --size=B

Pairs with long prompts (60% of an answer's text, as in hh-rlhf), 128 an update. The bound is that
of the matrix products: what the stored positions and the scores cost in either layout.
"""

import pathlib
import statistics
import sys
import tempfile

from absl import flags
import compare
import work

from recipes.training import command

SHARE = flags.DEFINE_float("prompt_share", 0.6, "Of the tokens of an answer's text.")
LAYOUT_PAIRS = flags.DEFINE_integer("update", 128, "Pairs of an update.", lower_bound=1)


def main() -> None:
    """Prints the ratio of real tokens per CPU second, and its bound."""
    size, steps, pairs = compare.SIZE.value, 1, LAYOUT_PAIRS.value
    found: dict[str, list[dict]] = {"once": [], "separate": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        work.write_model(folder / size, size)
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
    print(f"size {size}: {cpu['separate'] / cpu['once']:.2f} times as many tokens per CPU second")
    print(f"bound by products: {cost['separate'] / cost['once']:.2f}")
    print(f"CPU seconds per 1,000 tokens: {cpu['once']:.3f} and {cpu['separate']:.3f}")
    print(f"positions: {found['once'][0]['positions']} and {found['separate'][0]['positions']}")


if __name__ == "__main__":
    command.main_without_config(main)

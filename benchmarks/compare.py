"""This project and its peers on the same work, in turn; one table.

  python benchmarks/compare.py --size=A --peer=trl=trl/bin/python --peer=tunix=tunix/bin/python

A peer is a program benchmarks/peer_<name>.py and the Python of an environment that has it. Every
program runs `rounds` times, one after the other and around again, with a measurement of the
machine's matrix product in between: these are ratios of one hour on one machine, not records.

Real tokens count the prompt with each answer. Model FLOPs are 6 N for the policy and 2 N for a
reference that is asked in the step, N all parameters that are multiplied with tokens, the head at
every token, attention apart; hardware FLOPs are those really done, remat and padding included.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

from absl import flags
import work

from checkpoints_io.errors import BadInput, RunFailed
from recipes.training import command

SIZE = flags.DEFINE_enum("size", "A", list(work.SIZES), "A model of benchmarks/work.py.")
MODEL = flags.DEFINE_string("model", None, "The folder of a model, in place of --size.")
STEPS = flags.DEFINE_integer(
    "steps", 5, "Updates of each run; the first is not counted.", lower_bound=1
)
MEDIAN = flags.DEFINE_integer("median", work.MEDIAN, "Tokens of a text.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 2, "How often everything runs.", lower_bound=1)
PEERS = flags.DEFINE_multi_string("peer", [], "name=python")
WITH_ADAPTERS = {"trl"}  # the peers whose programs take --rank
HERE = pathlib.Path(__file__).parent
# For all alike: large pages, or a third of the time goes into small ones.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu"}


def ran(python: str, program: str, *args: str) -> dict:
    """The JSON line that a program prints last."""
    words = [python, str(HERE / program), *args]
    told = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | ENVIRONMENT, cwd=HERE
    )
    if told.returncode:
        print(told.stderr, file=sys.stderr)
        raise RunFailed(f"{' '.join(words)} ended with status {told.returncode}: see above")
    return json.loads([line for line in told.stdout.splitlines() if line.startswith("{")][-1])


def main() -> None:
    """Prints the table as Markdown.

    Raises:
      ValueError: a peer is no program here, or is given without its Python.
      RuntimeError: one of the programs failed.
    """
    peers = [peer.partition("=") for peer in PEERS.value]
    for name, _, python in peers:
        if not (HERE / f"peer_{name}.py").is_file() or not shutil.which(python):
            raise BadInput(
                f"--peer={name}={python} is not a benchmarks/peer_NAME.py and a Python, like "
                "trl=trl/bin/python"
            )
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        model = folder / SIZE.value
        if MODEL.value:
            model.symlink_to(pathlib.Path(MODEL.value).absolute())
        else:
            work.write_model(model, SIZE.value)
        work.write_pairs(
            folder / "pairs.jsonl", max(512, STEPS.value * work.PAIRS),
            vocabulary=json.loads((model / "config.json").read_text())["vocab_size"],
            median=MEDIAN.value,
        )  # fmt: skip
        args = [f"--folder={folder}", f"--size={SIZE.value}", f"--steps={STEPS.value}"]
        programs = {
            "this project": (sys.executable, "ours.py", *args),
            "this project, cached": (sys.executable, "ours.py", *args, "--cached"),
            "this project, adapters": (sys.executable, "ours.py", *args, "--rank=16"),
        }
        for name, _, python in peers:
            for n in (1, 4):
                label = name if n == 1 else f"{name}, accumulated"
                words = (python, f"peer_{name}.py", *args, f"--micro_batches={n}")
                programs[label] = words
                if name in WITH_ADAPTERS:
                    programs[f"{label}, adapters"] = (*words, "--rank=16")
        found: dict[str, list[dict]] = {name: [] for name in programs}
        peaks = []
        for _ in range(ROUNDS.value):
            for name, words in programs.items():
                peaks.append(ran(sys.executable, "peak.py")["flop_per_cpu_s"])
                found[name].append(ran(*words))
                print(f"  {name}: {found[name][-1]['cpu_s_per_ktok']}", file=sys.stderr)
        print(table(found, statistics.median(peaks), work.matrices(model)))


def table(found: dict[str, list[dict]], peak: float, matrices: tuple[int, int]) -> str:
    """Medians over the steps of all rounds."""
    layers, head = matrices
    ours = found["this project"][0]["losses"]
    lines = [
        f"{MODEL.value or f'Size {SIZE.value}'}; {peak / 1e9:.0f} GFLOP of products a CPU second.",
        "",
        "| program | CPU s / 1,000 tokens | wall s | model FLOPs | hardware FLOPs | peak MiB "
        "| compile s | losses apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        cpu = statistics.median(x for run in runs for x in run["cpu_s_per_ktok"])
        wall = statistics.median(x for run in runs for x in run["wall_s_per_ktok"])
        # Of frozen weights no gradient is made.
        less = 2 if "cached" in name or "adapters" in name else 0
        per_token = (8 - less) * (layers + head)
        hardware = ""
        if "scores" in (run := runs[0]):
            factor = 10 - less
            done = factor * (run["positions"] * layers + run["scores"] * head)
            tokens = run["tokens"]
            hardware = f"{done / tokens * 1e3 / cpu / peak:.0%}"
        apart = max(abs(a - b) for a, b in zip(ours, run["losses"], strict=True))
        compiling = f"{run['compile_s']:.0f}" if "compile_s" in run else ""
        lines.append(
            f"| {name} | {cpu:.3f} | {wall:.3f} | {per_token * 1e3 / cpu / peak:.0%} | {hardware} "
            f"| {max(run['peak_mib'] for run in runs):.0f} | {compiling} | {apart:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.main_without_config(main)

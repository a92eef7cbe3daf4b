"""All of RESULTS.md that one machine can say, by one command: a file of each, and one of all.

  python benchmarks/everything.py --folder=/tmp/measured
  python benchmarks/everything.py --folder=/tmp/measured --only=start,growth

What needs a model, a tokenizer, rows or a peer is skipped where that is not given, and says so. It
takes hours; leave the machine alone meanwhile. What has its file is not measured again.
"""

import datetime
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax

from checkpoints_io.errors import BadInput, RunFailed
from recipes.training import command

FOLDER = flags.DEFINE_string("folder", None, "Where the files are written.", required=True)
ONLY = flags.DEFINE_list("only", None, "Names of a few.")
GIVEN = {
    "model": flags.DEFINE_string("model", None, "A small trained model, as a folder."),
    "tokenizer": flags.DEFINE_string("tokenizer", None, "A tokenizer and template, as a folder."),
    "rows": flags.DEFINE_string("rows", None, "JSON files with pairs, with commas between."),
    "peer": flags.DEFINE_multi_string("peer", None, "As compare.py takes it: trl=PYTHON."),
}
HERE = pathlib.Path(__file__).parent


class Run(NamedTuple):
    """One program, and what it says."""

    says: str
    command: str  # `{model}` and the like are what was given
    of: str | None = None  # what it cannot do without


RUNS = {
    "machine": Run("FLOP per CPU second of the matrix product", "peak.py"),
    "size_A": Run("beside peers", "compare.py --size=A --steps=3 --rounds=2 {peer}"),
    "size_B": Run("the same, larger", "compare.py --size=B --steps=4 --rounds=2"),
    "prompt_once_A": Run("prompt once against separate", "layouts.py --size=A"),
    "prompt_once_B": Run("the same, larger", "layouts.py --size=B"),
    "prompt_once_qwen3_5": Run(
        "the same, with delta nets", "layouts.py --size=A --family=qwen3_5_text"
    ),
    "memory": Run("memory and work by layers, vocabulary, length and more", "sweep.py"),
    "length": Run("cost of a token of the delta net by length", "recurrences.py"),
    "depth": Run("time to compile by layers", "recurrences.py --depths"),
    "experts": Run("a layer of experts by tiles, kernels and ragged_dot", "experts.py"),
    "attention": Run("attention over packed pairs, by backend", "attention.py"),
    "rows": Run("rows by their number and kind of file", "growth.py"),
    "start": Run("from a command to the first update", "start.py"),
    "zoo": Run("compiling, loading, importing, writing text", "models.py"),
    "tokenising": Run(
        "pairs tokenised, beside transformers and datasets",
        "tokenisation.py --tokenizer={tokenizer} --rows={rows} --rounds=3",
        of="rows",
    ),
    "sampling": Run("tokens drawn, beside transformers", "sampling.py --model={model}", of="model"),
    "tasks": Run("tasks, beside the harness's own model", "harness.py --model={model}", of="model"),
}


def main() -> None:
    """Measures what has no file yet, and puts all files together."""
    folder = pathlib.Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: flag.value for name, flag in GIVEN.items()}
    if known["rows"] and not known["tokenizer"]:
        raise BadInput("--rows needs a --tokenizer to read them with")
    names = ONLY.value or [*RUNS]
    if unknown := [name for name in names if name not in RUNS]:
        raise BadInput(f"--only={unknown[0]} is none of {', '.join(RUNS)}")
    failed = []
    for name in names:
        run, file = RUNS[name], folder / f"{name}.txt"
        if run.of and not known[run.of]:
            print(f"{name}: skipped, for there is no --{run.of}")
        elif not file.exists():
            print(f"{name}: {run.says}", flush=True)
            failed += [] if measure(words_of(run, known), file) else [name]
    parts = [
        f"## {name}: {run.says}\n\n    {(folder / f'{name}.txt').read_text().strip()}"
        for name, run in RUNS.items()
        if (folder / f"{name}.txt").exists()
    ]
    head = f"{platform.machine()}, {platform.platform()}, Python {platform.python_version()}, jax "
    text = "\n\n".join([f"# Measured\n\n{head}{jax.__version__}.", *parts])
    (folder / "all.md").write_text(text + "\n")
    print(f"all of it: {folder / 'all.md'}")
    if failed:
        raise RunFailed(f"not measured, for these ended with an error: {', '.join(failed)}")


def words_of(run: Run, known: dict[str, Any]) -> list[str]:
    """The command, with what was given."""
    peers = [f"--peer={peer}" for peer in known["peer"] or ()]
    words = [[word] if word != "{peer}" else peers for word in run.command.split()]
    return [word.format(**known) for some in words for word in some]


def measure(words: list[str], file: pathlib.Path) -> bool:
    """Did it end well? Then what it printed is in the file."""
    begun = time.monotonic()
    ran = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stderr[-2000:])
        return False
    took = datetime.timedelta(seconds=round(time.monotonic() - begun))
    told = ran.stdout.strip().replace("\n", "\n    ")
    day = datetime.date.today().isoformat()
    file.write_text(f"python benchmarks/{shlex.join(words)}  # {day}, {took}\n\n    {told}\n")
    return True


if __name__ == "__main__":
    command.main_without_config(main)

"""CPU seconds from a command to the end of its first update, cold and warm.

  python benchmarks/start.py

Every start is a process of its own: the README's first run, ended after its first update. Warm
ones find the programs that the cold one has compiled. `imports` is what a process takes that only
imports what the recipe does.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from absl import flags

from recipes.training import command

ROUNDS = flags.DEFINE_integer("rounds", 3, "Of how many the median is taken.", lower_bound=1)
ROOT = pathlib.Path(__file__).parent.parent
IMPORTS = "import recipes.dpo"
FIRST_UPDATE = """
import runpy, sys
from recipes.training import loop
applied = loop.applied
def once(*given):
    taken = applied(*given)
    float(next(iter(taken.values.values())))
    raise SystemExit
loop.applied = once
sys.argv[0] = "recipes/dpo.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    """Prints a line."""
    with tempfile.TemporaryDirectory() as scratch:
        known = "--config=recipes/configs/tiny.py", f"--config.compile_cache={scratch}/compiled"
        start = lambda name: used(FIRST_UPDATE, *known, f"--config.directory={scratch}/{name}")
        cold = start("cold")
        rounds = range(ROUNDS.value)
        warm = statistics.median(start(str(number)) for number in rounds)
        imports = statistics.median(used(IMPORTS) for _ in rounds)
    print(f"CPU seconds: imports {imports:.1f}, cold {cold:.1f}, warm {warm:.1f}")


def used(code: str, *arguments: str) -> float:
    """CPU seconds of a process, and of those that it starts."""
    before = os.times()
    told = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True)
    if told.returncode:
        raise SystemExit(told.stderr.decode())
    after = os.times()
    return after.children_user + after.children_system - sum(before[2:4])


if __name__ == "__main__":
    command.main_without_config(main)

"""Several programs, one after the other, each of which works on what earlier ones have made.

  python recipes/pipeline.py --config=recipes/pipelines/tiny.py --directory=runs/pipeline

The file has a function `get_steps`, which gives the line of each step by its name: a program of
recipes/ and its flags, in which `{name}` is what an earlier step has made (a run: the export it
ended with; sample_pairs: its pairs), and `{name.run}` its directory. A step keeps its files in
NAME-HASH in the directory; the hash is of what its result depends on: the program, its settings,
the data that they name, and the steps before it. A step that is done is skipped, one that was
interrupted is resumed.

Each step is the program that one would run by hand, and its line is shown. Asked to stop, the step
under way is asked to, and the status is 75: the same command goes on.
"""

from collections.abc import Iterator, Mapping
import contextlib
import shlex
import signal
import subprocess
import sys
from typing import NamedTuple

from absl import flags

from checkpoints_io.errors import RunFailed
from recipes.pipelines import steps
from recipes.pipelines.steps import Step
from recipes.training import command
from recipes.training.run import say

DONE = "done.txt"
TAGGED = ("recipes.sft", "recipes.dpo")


class Signals(NamedTuple):
    """What the pipeline was asked, by its signals, and the program that they are passed on to."""

    numbers: list[int]
    under_way: list[subprocess.Popen]


def run(known: Mapping[str, Step], tags: list[str]) -> bool:
    """Runs what is not done yet; False: it was asked to stop before its end.

    Raises:
      RuntimeError: a step has failed.
    """
    with _heard() as signals:
        for step in known.values():
            if step.directory.exists(DONE):
                say(f"{step.name}: already done, skipped: {step.directory}")
                continue
            words = steps.words_of(step, known)
            if tags and step.program in TAGGED:
                words.append(f"--config.tags={','.join([*tags, step.name])}")
            line = f"python -m {step.program} {shlex.join(words)}"
            say(f"{step.name}: {line}")
            step.directory.make()
            status = _status_of(step.program, words, signals)
            # A program that knows no stops ends by the signal itself.
            if status == command.MORE_TO_DO or (status and signals.numbers):
                return False
            if status:
                told = f"the step {step.name} ended with status {status}: its output above says why"
                raise RunFailed(told)
            step.directory.write_whole(DONE, f"{line}\n".encode())
            if signals.numbers:
                return False
    return True


@contextlib.contextmanager
def _heard() -> Iterator[Signals]:
    """A request to stop ends no step by itself: it is passed on to the program under way."""
    signals = Signals([], [])

    def stop(number: int, _: object) -> None:
        signals.numbers.append(number)
        for process in signals.under_way:
            process.send_signal(number)

    # A Ctrl-C reaches all programs of a terminal by itself.
    handlers = {
        signal.SIGTERM: stop,
        signal.SIGINT: lambda number, _: signals.numbers.append(number),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status_of(program: str, words: list[str], signals: Signals) -> int:
    """With which status the program ends."""
    process = subprocess.Popen([sys.executable, "-m", program, *words])
    signals.under_way[:] = [process]
    if signal.SIGTERM in signals.numbers:  # while it was started
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait()
    finally:
        signals.under_way.clear()


def main() -> None:
    """Runs the pipeline that the flags name."""
    given = flags.FLAGS
    if not run(steps.read(given.config, given.directory), given.tags):
        sys.exit(command.MORE_TO_DO)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "A file with get_steps().", required=True)
    flags.DEFINE_string("directory", None, "Where the steps keep their files.", required=True)
    flags.DEFINE_list("tags", [], "Tags for the runs in Weights & Biases.")
    command.main_without_config(main)

"""A checkpoint of a run as a Hugging Face folder, which the run itself did not write.

  python -m recipes.export runs/tiny --step=40

writes runs/tiny/hf/step-40: the model, or the adapters, with the run's own settings, from its
settings.json. The run may be going on. Its data is not needed, and the devices may be others; it is
started where the run was, so that the paths in its settings mean the same.
"""

from absl import flags
import jax

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from recipes.training import command, exporting, policy
from recipes.training.run import say


def main(runs: list[str]) -> None:
    """The one run that the command line names.

    Raises:
      ValueError, OSError: as `export`, or it names none or several.
    """
    if len(runs) != 1:
        raise BadInput(f"give the directory of one run, not {' '.join(runs) or 'none'}")
    export(runs[0], flags.FLAGS.step)


def export(directory: str, step: int | None = None) -> None:
    """Writes the folder of a checkpoint of the run in this directory; None: of the newest.

    Raises:
      ValueError, OSError: a sentence about the directory, the model it began from, or the disk.
    """
    run = exporting.of_directory(places.at(directory))
    with jax.set_mesh(run.computing.mesh):
        own = policy.of(run)
        state = exporting.state(own, run, step)
        # What was trained, beside what was frozen; or the average of it.
        policy.export(policy.export_model(own, state), state.step, run)
    say(f"{policy.export_folder(state.step, run)} has step {state.step} of {run.directory}")


if __name__ == "__main__":
    flags.DEFINE_integer("step", None, "The step to export; unset: the newest checkpoint.")
    command.main_with_words(main)

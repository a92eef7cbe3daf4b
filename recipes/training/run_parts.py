"""The parts of a run that its settings say, whatever its models are."""

import math

import jax

from checkpoints_io.errors import BadInput
from checkpoints_io.run_state import Keep
from checkpoints_io.sealed import Facts
from recipes.data.run_data import Data
from recipes.training import by_name, tasks, written
from recipes.training.by_name import Values
from recipes.training.run import Computing, Hub, Patience, Records, Saving, Tasks, Watching
from zoo.parts import sharding
from zoo.text.tokenizer import Tokenizer


def computing(given: Values) -> Computing:
    """How models are computed, on the devices here.

    Raises:
      ValueError: there is no accelerator where one is required, or devices do not divide.
    """
    if given["require_accelerator"] and jax.default_backend() == "cpu":
        raise BadInput(
            "--config.require_accelerator is set, but jax only finds CPUs here: install its "
            "build for the accelerator (pip install -e '.[cuda]', or '.[tpu]'), check the driver "
            "(nvidia-smi) and that JAX_PLATFORMS is unset, or leave the setting out"
        )
    mesh = sharding.mesh_of(*by_name.mesh_sizes(given))
    precision = written.precision(given["mp"])
    # `remat` is of no effect without a gradient.
    return Computing(mesh, precision, given["attention"], given.get("remat"))


def updates(given: Values, examples: int) -> int:
    """The number of updates: as set, or the nearest to the number of epochs."""
    epochs = given["num_epochs"] or 0
    nearest = round(min(epochs * examples / given["train_batch_size"], 2**31))
    return given["num_train_steps"] or max(1, nearest)


def total_steps(given: Values, examples: int) -> int:
    """The number of updates of the run, with this many examples.

    Raises:
      ValueError: another setting names a step beyond the last.
    """
    steps = updates(given, examples)
    if (late := max(written.steps_at(given["eval_at"]), default=0)) > steps:
        raise BadInput(
            f"--config.eval_at={given['eval_at']} names step {late}, but the run has only {steps}"
        )
    if (last := max(written.profiled(given["profile"]), default=0)) > steps:
        raise BadInput(
            f"--config.profile={given['profile']} traces step {last}, but the run has only {steps}"
        )
    return steps


def saving(given: Values, tokenizer: Tokenizer) -> Saving:
    """Which checkpoints are kept, and how the policy is exported."""
    hub = None
    if given["push_to_hub"] is not None:
        hub = Hub(given["push_to_hub"], given["hub_strategy"] == "every", given["hub_private"])
    return Saving(
        keep=keep(given),
        retries=given["save_retries"],
        export_dtype=written.DTYPES[given["hf_save_dtype"]],
        text_only=given["hf_text_only"],
        chat_template=tokenizer.chat_template if given["chat_template"] else None,
        hub=hub,
    )


def keep(given: Values) -> Keep:
    """Which checkpoints are kept; the best has the highest score by its held-out figures."""
    best = given["keep_best"]

    def score(facts: Facts) -> float | None:
        value = (facts.get("held_out") or {}).get(f"eval/{best}")
        if value is None or not math.isfinite(value):
            return None
        return value if written.BEST_BY[best.rpartition("/")[2]] else -value

    newest, every = given["keep_checkpoints"], given["keep_every"]
    return Keep(newest, every=every, highest=score if best is not None else None)


def records(given: Values) -> Records:
    """Where metrics are logged."""
    return Records(
        tensorboard=given["tensorboard"],
        wandb_project=given["wandb_project"],
        trackio_project=given["trackio_project"],
        name=given["name"] or given["directory"].rstrip("/").rpartition("/")[2],
        tags=tuple(given["tags"]),
        settings=by_name.nested(given),
        samples=given["steps_per_sample"] is not None,
    )


def watching(given: Values, data: Data) -> Watching:
    """The samples that are drawn during training."""
    every = given["steps_per_sample"] if given["sample_tokens"] else None
    return Watching(every, data.prompts, given["sample_count"], given["sample_temperature"])


def patience(given: Values) -> Patience | None:
    """When the run ends early."""
    if (figure := given["stop_when"]) is None:
        return None
    higher = written.BEST_BY[figure.rpartition("/")[2]]
    return Patience(figure, given["stop_patience"], higher)


def asked_tasks(given: Values) -> Tasks | None:
    """The tasks of lm-evaluation-harness; they are found here, before anything is read.

    Raises:
      ValueError: there is no such task, or several processes would ask.
    """
    if not given["tasks"]:
        return None
    if jax.process_count() > 1:
        raise BadInput(
            f"--config.tasks={','.join(given['tasks'])}: lm-evaluation-harness only supports one "
            f"process, but this run has {jax.process_count()}; measure its exports with "
            "recipes/measure.py"
        )
    most = given["max_eval_pairs"]
    return tasks.found(given["tasks"], given["tasks_folder"], most, "--config.")

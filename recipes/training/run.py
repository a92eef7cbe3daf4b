"""A run that is ready to read its weights and start: what its parts need to know."""

import pathlib
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
import optax

from checkpoints_io import places, processes
from checkpoints_io.hf_folder import Folder
from checkpoints_io.run_state import Keep
from checkpoints_io.sealed import Facts
from recipes import terminal
from recipes.data.ids.examples import Example
from recipes.data.mixture import Part
from recipes.data.packed import batches
from recipes.data.prompts import Prompt
from recipes.data.run_data import Data, HeldOut
from recipes.data.texts import Texts
from recipes.training.adapting import Adapting
from recipes.training.optimizer import OptimizerSettings
from recipes.training.trained import Chosen, Trained
from recipes.training.written import Precision
import zoo
from zoo.text.tokenizer import Tokenizer


class Computing(NamedTuple):
    """How the policy is computed. A reference is computed the same way."""

    mesh: Mesh
    precision: Precision
    attention: str | None  # a backend; None: the platform's
    remat: str | None  # None: what fits


class Every(NamedTuple):
    """After how many steps (or minutes) something is due; None: after the last alone, -1: never."""

    steps_per_log: int
    steps_per_eval: int | None
    steps_per_checkpoint: int | None
    minutes_per_checkpoint: float | None  # None: by steps alone
    steps_per_hf_export: int | None


class Watching(NamedTuple):
    """Which prompts are answered while the policy learns, and how."""

    every: int | None  # steps; none: no prompts are
    prompts: list[Prompt] | None  # one's own; none: held-out ones
    count: int
    temperature: float | None  # of a second answer; none: greedy ones alone


class Tasks(NamedTuple):
    """Tasks of lm-evaluation-harness."""

    names: tuple[str, ...]
    manager: object  # the harness's, which knows their files
    most: int | None  # questions of each; none: all


class Patience(NamedTuple):
    """How long a run waits for a held-out figure to improve."""

    figure: str  # heldout/dpo_loss
    evaluations: int
    higher: bool  # is better


class Hub(NamedTuple):
    """Where exports are sent."""

    repo: str  # owner/name
    every: bool  # each of them, or the last alone
    private: bool


class Saving(NamedTuple):
    """Which checkpoints are kept, and how the policy is exported."""

    keep: Keep
    retries: int  # of a save that fails
    export_dtype: jax.typing.DTypeLike
    text_only: bool  # what an export holds
    chat_template: str | None  # in place of the tokenizer's own
    hub: Hub | None = None


class Records(NamedTuple):
    """Where the figures of a run are logged, and the settings logged with them."""

    tensorboard: bool
    wandb_project: str | None
    name: str
    tags: tuple[str, ...]
    settings: dict[str, object]  # as a config file groups them
    trackio_project: str | None = None
    samples: bool = False  # whether there will be any


class Beside(NamedTuple):
    """A frozen model beside the policy: the reference."""

    path: str  # a model's folder or hub id, or the directory of a run
    is_hf: bool  # or the newest checkpoint of a run
    mode: str  # as the setting has it
    cache: str | None  # None: beside the run's directory
    of_policy: bool = False  # it shares what is frozen of the policy
    # It moves this share of the way to the policy after so many updates: (every, share).
    follows: tuple[int, float] | None = None

    @property
    def resident(self) -> bool:
        """Whether the reference is computed at every step."""
        return self.mode != "cached"

    @property
    def stays(self) -> bool:
        """Whether its own weights stay in memory: if it follows, they are the optimizer's."""
        return self.resident and self.follows is None


class Run(NamedTuple):
    """A run whose settings, data and model files have been checked."""

    directory: places.Place
    base: str  # what initialize_from_hf names
    folder: Folder  # the policy's
    blank: zoo.Model  # the policy, with shapes and shardings in place of weights
    adapting: Adapting | None  # none: weights are trained
    chosen: Chosen | None  # these; none: all of them, or adapters
    trained: Trained
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    opt_state: PyTree  # shapes and shardings of the optimizer's
    reference: Folder | None  # the reference's: the same, unless another is named
    tokenizer: Tokenizer
    tokenizer_folder: pathlib.Path
    stop_ids: tuple[int, ...]
    parts: list[Part]  # of the training data: one, or the sources of a mixture
    examples: list[Example]  # of all of them
    held_out: list[HeldOut]
    texts: list[Texts]  # that are evaluated too
    tasks: Tasks | None  # likewise
    place: batches.Place
    place_of_texts: batches.Place | None
    seed: int
    total_steps: int
    computing: Computing
    optimizer_settings: OptimizerSettings
    every: Every
    saving: Saving
    records: Records
    hang_minutes: float | None  # None: it may hang for ever
    run_initial_eval: bool
    nonfinite: str  # stop or skip
    profile: range  # these steps are traced
    sample_tokens: int
    watching: Watching
    eval_at: frozenset[int]  # steps after which it is evaluated too
    patience: Patience | None  # when it ends before its last step
    facts: Facts  # what a checkpoint of this run must agree with
    counts: dict[str, int]  # rows lost on the way, by metric name


class Exporting(NamedTuple):
    """What an export needs to know of a run, without its data."""

    directory: places.Place
    base: str  # what initialize_from_hf names
    folder: Folder  # the policy's
    blank: zoo.Model  # the policy, with shapes and shardings in place of weights
    adapting: Adapting | None
    chosen: Chosen | None
    trained: Trained
    opt_state: PyTree | None  # its shapes and shardings, where an average of the weights is in it
    tokenizer_folder: pathlib.Path
    stop_ids: tuple[int, ...]
    seed: int
    computing: Computing
    saving: Saving
    records: Records
    facts: Facts  # what the checkpoint must agree with


class Scoring(NamedTuple):
    """Pairs and models, all of which have been checked, of which only scores are wanted."""

    folder: Folder  # the policy's
    blank: zoo.Model  # the policy, with shapes and shardings in place of weights
    adapting: Adapting | None  # its adapters, which are read
    reference: Folder | None
    data: Data
    place: batches.Place
    computing: Computing
    memory: int  # bytes per device that the weights take


def adapters_alone(run: Run | Exporting) -> bool:
    """Whether an export of the run holds its adapters, and not a model."""
    return run.adapting is not None and run.adapting.export == "adapter"


def say(text: str) -> None:
    """Prints to the terminal, once however many processes there are."""
    if processes.is_first():
        terminal.write(text)

"""Checks everything that can fail before any long work, settings to disk, and prints the plan."""

from collections.abc import Iterable, Iterator
import contextlib
import json

from flax import nnx

from checkpoints_io import hf_hub, places, processes
from checkpoints_io.errors import BadInput, StorageError
from checkpoints_io.run_state import RunStore
from checkpoints_io.sealed import Facts
from recipes.data import source_pairs
from recipes.data.ids.examples import described
from recipes.data.run_data import Data
from recipes.training import (
    activations,
    adapting,
    by_name,
    checks,
    inputs,
    learning,
    plan,
    records,
    resume,
    run_parts,
    trained,
    written,
)
from recipes.training.by_name import Values
from recipes.training.run import (
    Beside,
    Every,
    Run,
    Scoring,
    say,
)
import zoo
from zoo.parts import sharding


@contextlib.contextmanager
def prepared(given: Values, *, beside: Beside | None = None) -> Iterator[Run]:
    """Reads and checks all that a run needs except the weights, and prints the plan.

    `beside` is the reference, if the recipe has one.

    Inside the block no other process can use the run's directory.

    Raises:
      ValueError, OSError: something is wrong; the message says how to fix it.
    """
    directory = made(given["directory"], rooms=("checkpoints", "hf"))
    directory.within("checkpoints").for_orbax()  # refuses early if several processes cannot write
    with _alone(directory):
        yield _prepare(given, beside, directory)


def _prepare(given: Values, beside: Beside | None, directory: places.Place) -> Run:
    shaping = resume.of_settings(given)
    saved = _saved_facts(directory)
    _refuse_another_run(saved, shaping, directory)
    resume.refuse_other_evaluations(saved or {}, given, directory)
    computing = run_parts.computing(given)
    asked = run_parts.asked_tasks(given)
    models = inputs.looked_at(given, beside, computing)
    adapted = adapting.of_settings(given, models.blank)
    data = inputs.read(given, models)
    train = [example for part in data.train for example in part.examples]
    chosen = trained.chosen(given, models.blank)
    steps = run_parts.total_steps(given, len(train))
    _refuse_another_run(saved, shaping, directory, len(train))  # the run's length in epochs
    if beside and beside.follows and beside.follows[0] >= steps:
        raise BadInput(
            f"--config.reference_sync_steps={beside.follows[0]}: the reference would never "
            f"move in a run of {steps} steps; set fewer, or leave it out"
        )
    learnt = learning.learning(
        given, models.blank, computing.mesh, steps, adapted=adapted, chosen=chosen, beside=beside
    )
    like = learnt.trained.like
    together, held = given["train_batch_size"], sum(learnt.memory.values())
    limit, platform = activations.device_here()
    most = activations.most_positions(models.blank, like, held, limit, platform)
    place = inputs.packed(given, models, inputs.every(data), computing.mesh, together, most)
    kept = activations.keeping(models.blank, computing.remat, like, place.shape, held, limit)
    run = Run(
        directory=directory,
        base=given["initialize_from_hf"],
        folder=models.folders["policy"],
        blank=models.blank,
        adapting=adapted,
        chosen=chosen,
        trained=learnt.trained,
        schedule=learnt.schedule,
        optimizer=learnt.optimizer,
        opt_state=learnt.opt_state,
        reference=models.folders.get("reference"),
        tokenizer=data.tokenizer,
        tokenizer_folder=models.tokenizer,
        stop_ids=tuple(i for i in data.stop_ids if i < models.blank.config.vocab_size),
        parts=data.train,
        examples=train,
        held_out=data.held_out,
        texts=data.texts,
        tasks=asked,
        place=place,
        place_of_texts=inputs.packed_texts(given, models, data, computing.mesh, most),
        seed=given["seed"],
        total_steps=steps,
        computing=computing,
        optimizer_settings=learnt.optimizer_settings,
        every=by_name.part(Every, given),
        saving=run_parts.saving(given, data.tokenizer),
        records=run_parts.records(given),
        hang_minutes=given["hang_minutes"],
        run_initial_eval=given["run_initial_eval"],
        nonfinite=given["nonfinite"],
        profile=written.profiled(given["profile"]),
        sample_tokens=given["sample_tokens"],
        watching=run_parts.watching(given, data),
        eval_at=written.steps_at(given["eval_at"]),
        patience=run_parts.patience(given),
        facts={
            "settings": shaping,
            "evaluations": resume.of_evaluations(given),
            "data": source_pairs.fingerprint(train),
            "models": {name: resume.of_model(one.config) for name, one in models.folders.items()},
        },
        counts=_lost(data),
    )
    say(plan.describe(run, by_name.part(plan.Options, given), learnt.memory, kept))
    if processes.is_first():
        if run.saving.hub:
            hf_hub.ready(run.saving.hub.repo, private=run.saving.hub.private)
        directory.write_whole(records.DATA, _counted(data).encode())
    return run


def scoring(given: Values, beside: Beside) -> Scoring:
    """Reads and checks all that scoring pairs needs except the weights.

    Raises:
      ValueError, OSError: something is wrong; the message says how to fix it.
    """
    computing = run_parts.computing(given)
    compute = computing.precision.compute  # never updated, so kept in compute dtype
    computing = computing._replace(precision=written.Precision(compute, compute))
    models = inputs.looked_at(given, beside, computing)
    adapted = adapting.of_settings(given, models.blank)
    policy, reference = models.folders["policy"], models.folders["reference"]
    if adapted is None and beside.is_hf and policy.path == reference.path:
        raise BadInput(checks.same_weights(given["initialize_from_hf"]))
    data, mesh = inputs.read(given, models), computing.mesh
    held = plan.held((nnx.state(models.blank), adapted.like if adapted else {}))
    if not beside.of_policy:  # loaded after the policy is freed
        other = zoo.abstract(reference.config, compute, compute, mesh)
        held = max(held, plan.held(nnx.state(other)))
    # Enough pairs at a time to fill the rows of all devices.
    together = min(max(64, 16 * sharding.data_shards(mesh)), len(inputs.every(data)))
    most = activations.most_positions(models.blank, {}, held, *activations.device_here())
    return Scoring(
        folder=policy,
        blank=models.blank,
        adapting=adapted,
        reference=reference,
        data=data,
        place=inputs.packed(given, models, inputs.every(data), mesh, together, most),
        computing=computing,
        memory=held,
    )


def _counted(data: Data) -> str:
    """How many rows of every source were used, dropped or malformed, as JSON."""
    parts = [
        {
            "name": one.name, "source": one.source, "layout": one.layout, "rows": one.counts.rows,
            "used": one.counts.used, "lost": one.counts.lost,
            "notes": {described(what): n for what, n in one.counts.notes.items() if n},
        }
        for one in data.sources
    ]  # fmt: skip
    return json.dumps(parts, indent=2, ensure_ascii=False) + "\n"


def _lost(data: Data) -> dict[str, int]:
    """The counts of dropped rows and of cut texts, by metric name."""
    cut = ("prompt_cut", "answer_cut")
    return {
        "data/dropped": sum(part.counts.lost.total() for part in data.sources),
        "data/truncated": sum(part.counts.notes[what] for part in data.sources for what in cut),
    }


def made(name: str, rooms: Iterable[str] = ()) -> places.Place:
    """Creates the directory of that name, with these folders in it.

    Raises:
      OSError, ValueError: it cannot be created.
    """
    try:
        directory = places.at(name, "--config.directory")
        directory.make()
        for room in rooms:
            directory.within(room).make()
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"--config.directory={name} cannot be used: {getattr(error, 'strerror', error)}"
        ) from error
    return directory


@contextlib.contextmanager
def _alone(directory: places.Place) -> Iterator[None]:
    """Keeps other runs out of the directory, as they would overwrite each other's checkpoints."""
    if not processes.is_first():
        yield
        return

    def refuse() -> None:
        raise StorageError(
            f"another run is using {directory}: wait for it, or choose another --config.directory"
        )

    exports = directory.within("hf")
    with directory.alone(otherwise=refuse):
        folders = "checkpoints", "hf", "tensorboard", "profile"
        directory.refuse_odd(files=records.FILES, folders=folders)
        exports.refuse_odd(models=[name for name in exports.names() if name.startswith("step-")])
        for room in (directory, exports):
            room.clear()
        yield


def _saved_facts(directory: places.Place) -> Facts | None:
    """The facts of the newest checkpoint in the directory of a run, if there is one."""
    checkpoints = directory.within("checkpoints")
    if not checkpoints.names():
        return None
    with RunStore(checkpoints, keep=None) as store:
        saved = store.newest(lambda facts: None)
    return None if saved is None else saved.facts


def _refuse_another_run(
    saved: Facts | None,
    shaping: dict[str, object],
    directory: places.Place,
    examples: int | None = None,
) -> None:
    """Refuses to resume if the settings in a checkpoint's facts differ from this run's.

    Raises:
      ValueError: they differ.
    """
    if saved is not None:
        settings = resume.fact(saved, "settings", directory)
        resume.refuse_other_settings(settings, shaping, directory, saved.get("step"), examples)

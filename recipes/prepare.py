"""All that can fail, before any long work: settings, files, data, room. Says the plan."""

from collections.abc import Iterator
import contextlib
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections

from checkpoints_io import hf_folder, lock, whole
from checkpoints_io.errors import BadInput, NotFound, StorageError
from checkpoints_io.run_state import RunStore
from recipes import identity, metrics, optimizer, plan, settings, terminal
from recipes.data import batches, pairs, reading, shapes
from recipes.data.mixture import Part
from recipes.data.reading import HeldOut
from recipes.data.tokens import PairIds
import zoo
from zoo import attention, sharding
from zoo.text.tokenizer import Tokenizer


class Run(NamedTuple):
    """A run that is ready to read its weights and start."""

    directory: pathlib.Path
    mesh: Mesh
    folder: pathlib.Path  # the policy's model folder
    tokenizer: Tokenizer
    tokenizer_folder: pathlib.Path
    stop_ids: tuple[int, ...]
    parts: list[Part]  # of the training data: one, or the sources of a mixture
    pairs: list[PairIds]  # of all of them
    held_out: list[HeldOut]
    place: batches.Place
    total_steps: int
    reference_cache: pathlib.Path
    facts: dict[str, Any]  # what a checkpoint of this run must agree with
    counts: dict[str, int]  # rows lost on the way, by metric name


def say(text: str) -> None:
    """Tells the person at the terminal, once however many processes there are."""
    if jax.process_index() == 0:
        terminal.write(text)


@contextlib.contextmanager
def prepared(config: ml_collections.ConfigDict) -> Iterator[Run]:
    """Reads and checks all that a run needs but the weights, and says what it will do.

    Within it the run's directory is this process's alone.

    Raises:
      ValueError, OSError: a sentence about what is wrong and how to mend it.
    """
    settings.check(config)
    directory = _directory(config.directory)
    with _alone(directory):
        yield _prepare(config, directory)


def _prepare(config: ml_collections.ConfigDict, directory: pathlib.Path) -> Run:
    mesh = sharding.mesh_of(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shaping = identity.of_settings(config)
    _refuse_directory_of_another_run(directory, shaping)

    folder = hf_folder.find(config.initialize_from_hf)
    from_hub = not pathlib.Path(config.initialize_from_hf).expanduser().is_dir()
    revision = hf_folder.revision(folder) if from_hub else None
    if revision and "@" not in config.initialize_from_hf:
        say(f"pin the model, and it stays this: {config.initialize_from_hf}@{revision}")
    hf_config = hf_folder.read_config(folder)
    model = zoo.abstract(hf_config, mesh=mesh)
    compute = settings.precision(config.mp).compute
    backend = attention.backend_of(model.config, compute, config.attention)
    if config.remat == "attention" and backend not in ("blocks", "splash"):
        raise BadInput(
            f"--config.remat=attention has no effect with the attention backend {backend}, which "
            "does not say what it keeps: use products, or the backend blocks or splash"
        )
    zoo.check(folder)
    reference_config = _checked_reference(config, hf_config)
    tokenizer_folder = folder
    if config.tokenizer:
        tokenizer_folder = hf_folder.find(config.tokenizer, files=hf_folder.TOKENIZER_FILES)
    longest = zoo.longest_text(hf_config)
    if longest and config.train_seq_len > longest:
        raise BadInput(
            f"--config.train_seq_len={config.train_seq_len} is more than the {longest} positions "
            f"that {config.initialize_from_hf} was made for"
        )

    data = reading.read(config, tokenizer_folder)
    for part in data.told:
        say("\n  ".join([f"{part.name} ({part.source}):", *part.told]))
    sets = [held.name for held in data.held_out]
    if config.keep_best and (name := config.keep_best.rpartition("/")[0]) not in sets:
        raise BadInput(
            f"--config.keep_best={config.keep_best} names no held-out set: there is no {name} in "
            f"{sets}"
        )
    train = [pair for part in data.train for pair in part.pairs]
    every = train + [pair for held in data.held_out for pair in held.pairs]
    _refuse_unknown_ids(every, model, data.tokenizer)
    alike = [n for hf in (hf_config, reference_config) if (n := zoo.turns_alike_to(hf))]
    shape = shapes.choose(
        every,
        per_update=config.train_batch_size,
        shards=sharding.data_shards(mesh),
        most=plan.most_positions_here(config, model),
        row_length=config.row_length,
        rows=config.per_device_parallelism,
        alike=min(alike, default=None),
    )
    steps = config.num_train_steps or max(
        1, round(min(config.num_epochs * len(train) / config.train_batch_size, 2**31))
    )
    if (last := max(settings.profiled(config.profile), default=0)) > steps:
        raise BadInput(
            f"--config.profile={config.profile} traces step {last}, and the run has {steps}"
        )
    optimizer.schedule_of(config, steps)  # refuses what does not fit into the steps
    run = Run(
        directory=directory,
        mesh=mesh,
        folder=folder,
        tokenizer=data.tokenizer,
        tokenizer_folder=tokenizer_folder,
        stop_ids=data.stop_ids,
        parts=data.train,
        pairs=train,
        held_out=data.held_out,
        place=batches.Place(shape, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))),
        total_steps=steps,
        reference_cache=pathlib.Path(
            config.reference_cache or directory.parent / "reference-cache"
        ).expanduser(),
        facts={
            "settings": shaping,
            "data": pairs.fingerprint(train),
            "models": {
                "policy": identity.of_model(model),
                "reference": identity.of_model(zoo.abstract(reference_config)),
            },
        },
        counts={
            "data/dropped": sum(part.rows - part.used for part in data.told),
            "data/truncated": sum(
                part.notes.get(cut, 0) for part in data.told for cut in ("prompt_cut", "answer_cut")
            ),
        },
    )
    say(plan.told(config, run, model))
    return run


def _directory(name: str) -> pathlib.Path:
    if "://" in name:
        raise BadInput(f"--config.directory={name} must be a path of this machine's file system")
    try:
        directory = pathlib.Path(name).expanduser().absolute()
        for room in ("checkpoints", "hf"):
            (directory / room).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"--config.directory={name} cannot be used: {getattr(error, 'strerror', error)}"
        ) from error
    return directory


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    """Two runs in one directory would write over each other's checkpoints."""
    if jax.process_index():
        yield
        return

    def refuse() -> None:
        raise StorageError(
            f"another run is going on in {directory}: wait for it, or choose another "
            "--config.directory"
        )

    with lock.held(directory / "lock", otherwise=refuse):
        for name in metrics.FILES:
            lock.refuse_link(directory / name)
        for name in ("checkpoints", "hf", "tensorboard", "profile"):
            lock.refuse_link(directory / name, folder=True)
        for path in (directory / "hf").glob("step-*"):
            whole.refuse_other(path)
        for room in (directory, directory / "hf"):
            whole.clear(room)
        yield


def _refuse_directory_of_another_run(directory: pathlib.Path, shaping: dict[str, Any]) -> None:
    if not any((directory / "checkpoints").iterdir()):
        return
    check = lambda saved: identity.refuse_other_settings(
        identity.fact(saved, "settings", directory), shaping, directory
    )
    with RunStore(directory / "checkpoints", keep=None) as store:
        store.newest(check)


def _checked_reference(config: ml_collections.ConfigDict, policy: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the reference, whose files have been looked at."""
    if not config.reference_is_hf:
        path = pathlib.Path(settings.reference_path(config)).expanduser()
        if not (path / "checkpoints").is_dir():
            raise NotFound(f"{path} is not the directory of a run: it has no checkpoints")
        return policy
    path = settings.reference_path(config)
    if path == config.initialize_from_hf:
        return policy
    zoo.check(path)
    return hf_folder.read_config(hf_folder.find(path))


def _refuse_unknown_ids(found: list[PairIds], model: zoo.Model, tokenizer: Tokenizer) -> None:
    top = max(
        int(max(ids.max(initial=0) for ids in (p.prompt, p.chosen, p.rejected))) for p in found
    )
    if top >= model.config.vocab_size:
        raise BadInput(
            f"the tokenizer gives id {top} ({tokenizer.decode([top])!r}), and the "
            f"model's embedding has {model.config.vocab_size} rows: it is another model's tokenizer"
        )

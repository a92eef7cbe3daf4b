"""The models and the data of a run, checked before any long work, and how data is packed."""

import itertools
import pathlib
from typing import NamedTuple

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints_io import hf_folder, places
from checkpoints_io.errors import BadInput, NotFound
from recipes.data import run_data
from recipes.data.ids.examples import Example
from recipes.data.packed import batches, shapes
from recipes.data.run_data import Data
from recipes.training import adapting, plan, written
from recipes.training.by_name import Values
from recipes.training.run import Beside, Computing, say
import zoo
from zoo.parts import attention, sharding
from zoo.text.tokenizer import Tokenizer


class Models(NamedTuple):
    """The models of a run, whose files have been checked."""

    folders: dict[str, hf_folder.Folder]  # of the policy, and of the reference if there is one
    blank: zoo.Model  # the policy, without weights
    tokenizer: pathlib.Path  # a folder


def looked_at(given: Values, beside: Beside | None, computing: Computing) -> Models:
    """Checks config.json, and refuses what cannot be read or computed before fetching weights."""
    path, precision = given["initialize_from_hf"], computing.precision
    folder = hf_folder.look_up(path)
    if folder.revision and "@" not in path:
        say(f"to pin this version of the model, give {path}@{folder.revision}")
    blank = adapting.blank(given, folder.config, precision, computing.mesh)
    plan.refuse_cut_rows(given, blank, computing.mesh.shape["context"])
    blank.source, blank.attention = folder, computing.attention
    blank.remat, blank.remat_layers = computing.remat or "full", None
    backend = attention.backend_of(blank.config, precision.compute, computing.attention)
    if computing.remat == "attention" and backend not in attention.NAMES_WHAT_IT_MADE:
        raise BadInput(
            f"--config.remat=attention has no effect with the attention backend {backend}, which "
            "keeps nothing: use --config.remat=products, or one of "
            f"--config.attention={', '.join(sorted(attention.NAMES_WHAT_IT_MADE))}"
        )
    folder = blank.source = hf_folder.fetched(folder)
    zoo.check(folder)
    folders = {"policy": folder}
    if beside:
        folders["reference"] = _checked_reference(beside, path, folder)
    tokenizer = folder.path
    if given["tokenizer"]:
        tokenizer = hf_folder.find(given["tokenizer"], files=hf_folder.TOKENIZER_FILES)
    longest = zoo.longest_text(folder.config)
    if longest and given["train_seq_len"] > longest:
        raise BadInput(
            f"--config.train_seq_len={given['train_seq_len']} exceeds the context length of "
            f"{path} as supported here, {longest} tokens: lower it"
        )
    return Models(folders, blank, tokenizer)


def read(given: Values, models: Models) -> Data:
    """The data of a run, checked against what the models can take."""
    data = run_data.read(run_data.data_settings(given, models.tokenizer, written.rows_of(given)))
    for part in data.sources:
        say("\n  ".join([f"{part.name} ({part.source}):", *part.lines]))
    sets = [held.name for held in data.held_out]
    for setting in ("keep_best", "stop_when"):
        figure = given.get(setting)
        if figure and (name := figure.rpartition("/")[0]) not in sets:
            raise BadInput(
                f"--config.{setting}={figure} names no held-out set: {name} is not in {sets}"
            )
    for texts in data.texts:
        say(texts.told())
    windows = [window for texts in data.texts for window in texts.windows]
    _refuse_unknown_ids([*every(data), *windows], models.blank, data.tokenizer)
    return data


def every(data: Data) -> list[Example]:
    """All examples, those for training and those held out."""
    return [example for part in (*data.train, *data.held_out) for example in part.examples]


def packed(
    given: Values,
    models: Models,
    examples: list[Example],
    mesh: Mesh,
    together: int,
    most: int,
) -> batches.Place:
    """The shape of micro-batches, given the examples and the most positions per device."""
    folders = models.folders.values()
    alike = [n for folder in folders if (n := zoo.turns_alike_to(folder.config))]
    shape = shapes.choose(
        examples,
        per_update=together,
        shards=sharding.data_shards(mesh),
        most=most,
        row_length=given["row_length"],
        rows=given["per_device_parallelism"],
        alike=min(alike, default=None),
        context=mesh.shape["context"],
    )
    shape = shape._replace(ld_alpha=given.get("ld_alpha"))
    return batches.Place(shape, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))


def packed_texts(
    given: Values, models: Models, data: Data, mesh: Mesh, most: int
) -> batches.Place | None:
    """The shape of micro-batches of plain texts, whose windows are longer than most pairs."""
    windows: list[Example] = [window for texts in data.texts for window in texts.windows]
    if not windows:
        return None
    together = min(given["train_batch_size"], len(windows))
    return packed(given | {"ld_alpha": None}, models, windows, mesh, together, most)


def _checked_reference(asked: Beside, policy: str, folder: hf_folder.Folder) -> hf_folder.Folder:
    """The reference's model folder, with its files checked."""
    if not asked.is_hf:
        other = places.at(asked.path, "--config.reference_model_path")
        if not other.exists("checkpoints"):
            raise NotFound(f"{other} is not the directory of a run: it has no checkpoints")
        return folder
    if asked.of_policy or asked.path == policy:
        return folder
    found = hf_folder.look_up(asked.path)
    zoo.abstract(found.config)  # refused before its weights are fetched
    found = hf_folder.fetched(found)
    zoo.check(found)
    return found


def _refuse_unknown_ids(found: list[Example], model: zoo.Model, tokenizer: Tokenizer) -> None:
    answers = (answer.ids for one in found for answer in one.answers)
    every = itertools.chain((one.prompt for one in found), answers)
    top = max(int(ids.max(initial=0)) for ids in every)
    if top >= model.config.vocab_size:
        raise BadInput(
            f"the tokenizer has id {top} ({tokenizer.decode([top])!r}), but the model's embedding "
            f"only has {model.config.vocab_size} rows: it is the tokenizer of another model; set "
            "--config.tokenizer to the model's own"
        )

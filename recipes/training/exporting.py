"""A run's checkpoint, read back by the settings in its directory, without the run's data."""

import json

import ml_collections

from checkpoints_io import hf_folder, places
from checkpoints_io.errors import BadInput, NotFound
from checkpoints_io.run_state import RunStore
from recipes.data import run_data
from recipes.training import (
    adapting,
    by_name,
    checks,
    optimizer,
    policy,
    records,
    resume,
    run_parts,
    settings,
    trained,
    written,
)
from recipes.training.by_name import Values
from recipes.training.policy import Policy, State
from recipes.training.run import Computing, Exporting
from zoo.parts import sharding


def of_directory(directory: places.Place) -> Exporting:
    """The settings of a run that an export needs; models are placed on the devices found here.

    Raises:
      FileNotFoundError, ValueError: it is not the directory of a run, or the model that the run
        began from cannot be read.
    """
    given = given_to(directory)
    mesh = sharding.mesh_of(1, -1, 1)
    computing = Computing(mesh, written.precision(given["mp"]), None, "full")
    folder = hf_folder.look_up(given["initialize_from_hf"])
    blank = adapting.blank(given, folder.config, computing.precision, mesh)
    folder = blank.source = hf_folder.fetched(folder)
    adapted, chosen = adapting.of_settings(given, blank), trained.chosen(given, blank)
    learnt = trained.of(blank, adapted, chosen)
    opt_state = None
    if given["ema_decay"] is not None:
        never = lambda step: 0.0  # the learning rate is not part of the state
        how = by_name.part(optimizer.OptimizerSettings, given)
        descent = optimizer.optimizer_of(how, never, *learnt[1:])
        if (every := given.get("reference_sync_steps")) is not None:
            descent = optimizer.followed(descent, every, 1.0)
        opt_state = optimizer.layout(descent, learnt.like, mesh)
    tokenizer_folder = folder.path
    if given["tokenizer"]:
        tokenizer_folder = hf_folder.find(given["tokenizer"], files=hf_folder.TOKENIZER_FILES)
    rows = written.rows_of(given)
    own, stop_ids = run_data.ends(run_data.data_settings(given, tokenizer_folder, rows))
    return Exporting(
        directory=directory,
        base=given["initialize_from_hf"],
        folder=folder,
        blank=blank,
        adapting=adapted,
        chosen=chosen,
        trained=learnt,
        opt_state=opt_state,
        tokenizer_folder=tokenizer_folder,
        stop_ids=tuple(i for i in stop_ids if i < blank.config.vocab_size),
        seed=given["seed"],
        computing=computing,
        saving=run_parts.saving(given, own),
        records=run_parts.records(given),
        facts={
            "settings": resume.of_settings(given),
            "models": {"policy": resume.of_model(folder.config)},
        },
    )


def given_to(directory: places.Place) -> Values:
    """The settings that the run in this directory was last started with.

    Raises:
      FileNotFoundError: there was none.
      ValueError: another version wrote them.
    """
    told = directory.read(records.SETTINGS)
    if told is None:
        raise NotFound(f"{directory} is not the directory of a run: it has no {records.SETTINGS}")
    try:
        config = ml_collections.ConfigDict(dict(json.loads(told)), type_safe=False)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{directory}: {records.SETTINGS} was not written by a run") from error
    config.wandb_project = config.trackio_project = None  # may not be installed here
    return checks.checked(config, settings.table_of(settings.recipe_of(config)))


def state(own: Policy, run: Exporting, step: int | None) -> State:
    """The weights of a checkpoint, by default the newest, and their average if one is kept.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it does not belong to these settings or frozen weights.
      OSError: it cannot be read.
    """
    like = {"policy": run.trained.like}
    if run.opt_state is not None:
        like["optimizer"] = run.opt_state
    facts = policy.facts_of(own, run)
    check = lambda saved: resume.refuse_other_run(saved, facts, run.directory)
    with RunStore(run.directory.within("checkpoints"), keep=None) as store:
        found = store.newest(check, like) if step is None else store.at(step, check, like)
    if found is None:
        raise NotFound(f"the run in {run.directory} has no checkpoint yet")
    trees = found.trees
    return State(found.step, trees["policy"], own.frozen, trees.get("optimizer"))

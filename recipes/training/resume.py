"""What identifies a run: the settings, data and weights that it must be resumed with."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from checkpoints_io.sealed import Facts
from recipes.training import by_name, optimizer, run_parts
from recipes.training.by_name import Values, flat
from recipes.training.settings import ALL
import zoo

LENGTHS = frozenset({"num_epochs", "num_train_steps"})
# What an evaluation is measured on, and the settings that compare one evaluation with another.
MEASURED_ON, COMPARING = ("validation", "max_eval_pairs"), ("keep_best", "stop_when")


def of_settings(given: Values) -> Values:
    """The settings that a resumed run must share, as JSON."""
    return _as_json({name: value for name, value in given.items() if not ALL[name].free})


def of_evaluations(given: Values) -> Values:
    """The settings that a resumed run must share where it compares evaluations, as JSON."""
    return _as_json({name: given[name] for name in MEASURED_ON})


def _as_json(some: Values) -> Values:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat(some)}


def of_model(hf_config: dict[str, object]) -> dict[str, str]:
    """What a config.json says about how the model computes, field by field."""
    return dict(_fields(zoo.abstract(hf_config).config))


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, repr(value)


def refuse_other_settings(
    saved: Values,
    now: Values,
    directory: places.Place,
    step: int | None = None,
    examples: int | None = None,
) -> None:
    """Compares the settings of a checkpoint, of a `step`, with those of this run.

    Where one of them counts epochs and it is not known how many examples there are, it is not
    compared how long they are.

    Raises:
      ValueError: they differ; the message says which, and which may differ.
    """
    saved, now = _in_words_of_today(saved), _in_words_of_today(now)
    # A setting that is newer than the checkpoint has, by default, the value it had without a name.
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # as JSON has it
    new = {
        name
        for name in now.keys() - saved.keys()
        if now[name] is None or (name in ALL and now[name] == plain(ALL[name].default))
    }
    differ = {name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)}
    names = sorted(differ - new)
    if step and not LENGTHS.isdisjoint(names):
        before, after = (_updates(given, examples) for given in (saved, now))
        if before is None or after is None or before <= after:  # which it may be
            names = [name for name in names if name not in LENGTHS]
            if not names and before and after and before < after:
                _refuse_longer(before, after, saved, directory, step)
    if names:
        told = ", ".join(f"{n}: {saved.get(n)!r} there, {now.get(n)!r} here" for n in names[:4])
        longer = ""
        if not LENGTHS.isdisjoint(names):
            longer = ". A run can be made longer, not shorter"
            if step:
                longer += "; to continue from what this one has learnt, "
                longer += _begun_anew(saved, directory, step)
        raise BadInput(
            f"{directory} holds a run with other settings ({told}); choose another "
            f"--config.directory, or use the settings of that run{longer}. --help marks what a "
            "resume may change"
        )


def refuse_other_evaluations(saved: Facts, given: Values, directory: places.Place) -> None:
    """Compares what the evaluations of a checkpoint were measured on with what this run measures.

    Raises:
      ValueError: it differs, and a setting compares old figures with new ones.
    """
    before, now = saved.get("evaluations"), of_evaluations(given)
    comparing = next((name for name in COMPARING if given[name] is not None), None)
    if comparing is None or before is None or before == now:
        return
    names = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    told = ", ".join(f"{n}: {before.get(n)!r} there, {now.get(n)!r} here" for n in names[:4])
    raise BadInput(
        f"--config.{comparing}={given[comparing]} compares evaluations of the same data, and those "
        f"in {directory} are of other data ({told}): use the settings of that run, or add "
        f"--config.{comparing}=None"
    )


def _updates(given: Values, examples: int | None) -> int | None:
    """The number of updates of a run; None if it depends on the number of examples."""
    if given.get("num_epochs") is None:
        return given.get("num_train_steps")
    every = {"num_train_steps": None, **given}
    return None if examples is None else run_parts.updates(every, examples)


def _refuse_longer(
    before: int, after: int, saved: Values, directory: places.Place, step: int
) -> None:
    """A run takes more steps where those it has taken would have had the same learning rates."""
    given = {name: setting.default for name, setting in ALL.items()} | saved
    rates = (
        jax.vmap(optimizer.schedule_of(by_name.part(optimizer.OptimizerSettings, given), total))(
            jnp.arange(step)
        )
        for total in (before, after)
    )
    if np.array_equal(next(rates), next(rates)):
        return
    raise BadInput(
        f"{directory} holds a run of {before} steps; in one of {after} steps, the {step} steps it "
        "has taken would have had other learning rates: a run can only be made longer at a "
        "constant rate, or before its cooldown. To continue from what this one has learnt, "
        f"{_begun_anew(saved, directory, step)}"
    )


def _begun_anew(saved: Values, directory: places.Place, step: int) -> str:
    """How a new run begins with the model, or the adapters, of a step of this one."""
    folder = directory.within(f"hf/step-{step}")
    made = ""
    if not folder.names():
        made = f"make its folder with python -m recipes.export {directory} --step={step}, and "
    begun = f"--config.initialize_from_hf={folder}"
    adapters = any(saved.get(f"adapter.{name}") is not None for name in ("rank", "path"))
    if adapters and not folder.exists("config.json"):  # a merged model has one
        begun = f"--config.adapter.path={folder} --config.adapter.rank=None"
    return f"{made}start a new run with {begun} --config.directory=ANOTHER"


def _in_words_of_today(settings: Values) -> Values:
    """Old checkpoints name the policy's own folder as the reference; now that is left unset."""
    policy, reference = (settings.get(n) for n in ("initialize_from_hf", "reference_model_path"))
    return settings | {"reference_model_path": None} if reference == policy else settings


def fact(saved: Facts, name: str, directory: places.Place) -> Any:
    """One fact of a checkpoint.

    Raises:
      ValueError: the checkpoint does not have it.
    """
    if name not in saved:
        raise BadInput(
            f"the checkpoint in {directory} does not record its {name!r}: resume it with the "
            "version that wrote it, or choose another --config.directory"
        )
    return saved[name]


def refuse_other_run(saved: Facts, facts: Facts, directory: places.Place) -> None:
    """Compares the facts of a checkpoint with those of this run.

    Raises:
      ValueError: it is another run's, or of a version that kept too little.
    """
    given = fact(saved, "settings", directory)
    refuse_other_settings(given, facts["settings"], directory, saved.get("step"))
    models = saved.get("models", {})  # the first checkpoints of format 2 say nothing of them
    for whose, now in facts["models"].items():
        before = models.get(whose, {})
        # A field that is newer than the checkpoint means what it meant when there was none.
        names = [name for name, value in now.items() if before.get(name, value) != value]
        if names:
            told = ", ".join(f"{n}: {before[n]} then, {now[n]} now" for n in names[:4])
            raise BadInput(
                f"the config.json of the {whose} has changed since the checkpoint in {directory} "
                f"was written ({told}): restore the old file, or choose another "
                "--config.directory"
            )
    for name, what in (
        ("data", "training data"),
        ("frozen", "frozen weights"),
        ("reference", "reference weights"),
    ):
        if name not in facts:  # this run has none
            continue
        if (before := fact(saved, name, directory)) != facts[name]:
            mode = ""
            if name == "reference" and facts["settings"].get("adapter.path") is not None:
                mode = (
                    " (--config.reference_mode=base is another reference than resident and cached)"
                )
            raise BadInput(
                f"the {what} have changed since the checkpoint in {directory} was written "
                f"(fingerprint {before} then, {facts[name]} now): a run must be resumed with "
                f"those it started with. Restore them{mode}, or choose another --config.directory"
            )

"""The policy: begun from its weights or gone on with from a checkpoint, and written for others."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
import jax
import ml_collections
import optax

from checkpoints_io import hf_folder, places
from checkpoints_io.errors import RunFailed
from checkpoints_io.processes import all_agree
from checkpoints_io.run_state import Keep, RunStore
from recipes import identity, optimizer, settings
from recipes.prepare import Run
import zoo


class State(NamedTuple):
    """What training changes."""

    step: int  # the last one taken
    params: dict[str, Any]
    opt_state: Any
    skipped: jax.Array | float = 0.0  # updates that were not finite, and changed nothing
    skipped_before: float = 0.0  # of them, those before this start


def blank(config: ml_collections.ConfigDict, run: Run) -> zoo.Model:
    """The policy with shapes and shardings in place of weights."""
    params, compute = settings.precision(config.mp)
    model = zoo.abstract(hf_folder.read_config(run.folder), params, compute, run.mesh)
    model.source, model.attention, model.remat = run.folder, config.attention, config.remat
    return model


def checkpoints_of(config: ml_collections.ConfigDict, run: Run) -> RunStore:
    """The checkpoints of this run: those that are there, and those that will be."""
    score = lambda facts: settings.score(config, facts.get("held_out") or {})
    best = score if config.keep_best is not None else None
    keep = Keep(config.keep_checkpoints, every=config.keep_every, highest=best)
    return RunStore(run.directory.within("checkpoints"), keep=keep, retries=config.save_retries)


def begin(
    model: zoo.Model,
    adamw: optax.GradientTransformation,
    run: Run,
    store: RunStore,
    facts: dict[str, Any],
) -> State:
    """The newest checkpoint of this run, or step 0 with the weights of `initialize_from_hf`.

    One or the other is read, never both: a resumed run needs no more memory than a fresh one.

    Raises:
      ValueError: the checkpoint is another run's, or the weights do not fit or are not finite.
    """
    params = nnx.to_pure_dict(nnx.state(model))
    like = {"policy": params, "optimizer": optimizer.layout(adamw, params, run.mesh)}
    check: Callable = lambda saved: identity.refuse_other_run(saved, facts, run.directory)
    saved = store.newest(check, like)
    if saved:
        trees, skipped = saved.trees, saved.facts["skipped"]
        return State(saved.step, trees["policy"], trees["optimizer"], skipped, skipped)
    dtype = jax.tree.leaves(params)[0].dtype
    loaded = zoo.load(run.folder, dtype=dtype, compute_dtype=model.dtype, mesh=run.mesh)
    zoo.check_finite(loaded)
    params = nnx.to_pure_dict(nnx.state(loaded))
    return State(0, params, optimizer.init(adamw, params, run.mesh))


def save(
    state: State,
    config: ml_collections.ConfigDict,
    run: Run,
    store: RunStore,
    facts: dict[str, Any],
    held_out: Mapping[str, float] | None = None,
) -> None:
    """A checkpoint, written behind the run. The reference is not in it.

    `held_out` are the figures of this step, if there are any: by them the best is known.

    Raises:
      RuntimeError: as `check_sound`.
      OSError: it cannot be written, or the one before it was not.
    """
    check_sound(state, config)
    now = {"skipped": float(state.skipped), "held_out": dict(held_out or {})}
    trees = {"policy": state.params, "optimizer": state.opt_state}
    store.save(state.step, trees, facts | now)


def check_sound(state: State, config: ml_collections.ConfigDict) -> None:
    """Stops a run that does not skip what is not finite.

    Raises:
      RuntimeError: some update was not.
    """
    if config.nonfinite == "stop" and float(state.skipped) > state.skipped_before:
        raise RunFailed(
            f"at step {state.step} the loss or its gradient was not a number; weights and "
            "checkpoints are as they were before it. Look for pairs that are odd, go on without "
            "such updates (--config.nonfinite=skip), or begin anew, in another directory, with a "
            "lower --config.learning_rate"
        )


def export_folder(step: int, run: Run) -> places.Place:
    """Where the Hugging Face folder of a step stands."""
    return run.directory.within(f"hf/step-{step}")


def exported(step: int, run: Run) -> bool:
    """Is it there, as far as every process can see?"""
    return all_agree(export_folder(step, run).exists("config.json"))


def export(model: zoo.Model, step: int, config: ml_collections.ConfigDict, run: Run) -> None:
    """Writes the policy as a Hugging Face folder, with the run's tokenizer and template."""
    zoo.save(
        model,
        export_folder(step, run).address,
        dtype=settings.DTYPES[config.hf_save_dtype],
        tokenizer=run.tokenizer_folder,
        stop_ids=run.stop_ids,
        chat_template=run.tokenizer.chat_template if config.chat_template else None,
    )

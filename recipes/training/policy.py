"""The policy: started from weights or resumed from a checkpoint, saved and exported."""

from collections.abc import Callable, Mapping
import functools
import json
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from checkpoints_io import hf_hub, peft_folder, places, processes
from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import RunFailed
from checkpoints_io.processes import all_agree
from checkpoints_io.run_state import RunStore
from checkpoints_io.sealed import Facts
from recipes.training import adapting, card, logps, optimizer, records, resume, trained
from recipes.training.adapting import Adapting
from recipes.training.run import Exporting, Run, Scoring, adapters_alone, say
from recipes.training.update import Params
import zoo
from zoo import adapters, narrow
from zoo.parts import adapted, partly


class Policy(NamedTuple):
    """The parts of the policy that training does not change."""

    blank: zoo.Model  # with shapes and shardings in place of weights
    graph: nnx.GraphDef
    frozen: Params  # what is not trained
    begun: Params | None  # the adapters as they are before the first step


class State(NamedTuple):
    """The parts of a run that training changes, and the frozen weights."""

    step: int  # the last step taken
    trained: Params
    frozen: Params
    opt_state: PyTree
    skipped: jax.Array | float = 0.0  # updates that were not finite, and changed nothing
    skipped_before: float = 0.0  # those of them before this start


def of(run: Run | Exporting) -> Policy:
    """The policy of a run, without its trained weights.

    Raises:
      ValueError: frozen weights do not fit or are not finite.
    """
    graph, _ = nnx.split(run.blank)
    asked = run.adapting
    if asked is None and run.chosen is None:
        return Policy(run.blank, graph, {}, None)
    say(f"reading the frozen weights: {run.folder}")
    if asked is None:
        assert run.chosen is not None
        frozen = trained.frozen(run.blank, run.chosen, run.blank.dtype)
        return Policy(run.blank, graph, frozen, None)
    return with_adapters(asked, run, run.seed)


def with_adapters(asked: Adapting, run: Run | Exporting | Scoring, seed: int = 0) -> Policy:
    """The policy with frozen weights and adapters, read from a folder or new from the seed.

    Raises:
      ValueError: the weights or the adapters do not fit or are not finite.
    """
    base, (graph, _) = loaded(run), nnx.split(run.blank)
    replicated = jax.NamedSharding(run.computing.mesh, jax.P())
    put = lambda x: jax.make_array_from_callback(x.shape, replicated, lambda at: x[at])
    frozen = adapters.attached(nnx.to_pure_dict(nnx.state(base)), asked.sites, put)
    begun = adapting.begun(asked, base, frozen, seed)
    return Policy(run.blank, graph, frozen, begun)


def loaded(run: Run | Exporting | Scoring) -> zoo.Model:
    """The weights of `initialize_from_hf`, with the dtypes and shardings of `blank`.

    Raises:
      ValueError: they do not fit or are not finite.
    """
    model = zoo.load(
        run.folder,
        dtype=run.blank.embedding.get_value().dtype,
        compute_dtype=run.blank.dtype,
        mesh=run.computing.mesh,
        frozen=narrow.kind_of(run.blank),
    )
    zoo.check_finite(model)
    return model


def facts_of(policy: Policy, run: Run | Exporting) -> Facts:
    """The facts that a checkpoint must match, including the frozen weights' fingerprint."""
    frozen = {"frozen": fingerprint(policy.frozen)} if policy.frozen else {}
    return run.facts | frozen


def checkpoints_of(run: Run) -> RunStore:
    """The store of this run's checkpoints, existing and future."""
    saving = run.saving
    return RunStore(run.directory.within("checkpoints"), keep=saving.keep, retries=saving.retries)


def begin(policy: Policy, run: Run, store: RunStore, facts: Facts) -> State:
    """The newest checkpoint of this run, or step 0 with the weights of `initialize_from_hf`.

    One or the other is read, never both: a resumed run needs no more memory than a fresh one.

    Raises:
      ValueError: the checkpoint is another run's, or the weights do not fit or are not finite.
    """
    mesh = run.computing.mesh
    like = {"policy": run.trained.like, "optimizer": run.opt_state}
    check: Callable = lambda saved: resume.refuse_other_run(saved, facts, run.directory)
    say(f"reading the policy: a checkpoint in {run.directory}, or {run.folder}")
    saved = store.newest(check, like)
    say(f"resuming from step {saved.step}" if saved else "starting at step 0")
    if saved:
        trees, skipped = saved.trees, saved.facts["skipped"]
        parts = trees["policy"], policy.frozen, trees["optimizer"]
        return State(saved.step, *parts, skipped, skipped)
    if policy.begun is not None:  # a copy, because a step donates its memory
        own = jax.tree.map(jnp.copy, policy.begun)
    elif run.chosen is not None:
        own = zoo.folders.read(run.blank, run.chosen, jnp.float32)
    else:
        own = nnx.to_pure_dict(nnx.state(loaded(run)))
    return State(0, own, policy.frozen, optimizer.init(run.optimizer, own, mesh))


def result(state: State) -> Params:
    """The trained weights to evaluate and export: their average, if one is kept."""
    average = optimizer.average_of(state.opt_state)
    return state.trained if average is None else average


def export_model(policy: Policy, state: State) -> zoo.Model:
    """The policy as a model with its current weights, or their average."""
    weights = partly.whole(adapted.joined(result(state), state.frozen))
    return nnx.merge(policy.graph, nnx.State(weights))


def eval_forward(policy: Policy, state: State, forward: logps.Compiled) -> logps.Forward:
    """The policy's forward pass with its current weights, or their average, in compute dtype."""
    return functools.partial(forward, policy.graph, eval_weights(policy, state))


def train_forward(policy: Policy, state: State, forward: logps.Compiled) -> logps.Forward:
    """The policy's forward pass with the trained weights, even if an average is kept."""
    own = logps.cast_for_compute(state.trained, policy.blank)
    return functools.partial(forward, policy.graph, adapted.joined(own, state.frozen))


def eval_weights(policy: Policy, state: State) -> Params:
    """The weights, or their average, in the compute dtype, as frozen ones already are."""
    return adapted.joined(logps.cast_for_compute(result(state), policy.blank), state.frozen)


def eval_model(policy: Policy, state: State) -> zoo.Model:
    """The policy for evaluation, in its compute dtype: equal weights give the reference's bits."""
    weights = partly.whole(eval_weights(policy, state))
    return nnx.merge(policy.graph, nnx.State(weights))


def save(
    state: State,
    run: Run,
    store: RunStore,
    facts: Facts,
    held_out: Mapping[str, float] | None = None,
) -> None:
    """Writes a checkpoint in the background, without frozen weights or the reference.

    `held_out` are the figures of this step, if there are any: they decide which checkpoint is best.

    Raises:
      RuntimeError: as `check_sound`.
      OSError: it cannot be written, or the one before it was not.
    """
    check_sound(state, run)
    now = {"skipped": float(state.skipped), "held_out": dict(held_out or {})}
    trees = {"policy": state.trained, "optimizer": state.opt_state}
    store.save(state.step, trees, {**facts, **now})


def best(state: State, run: Run, store: RunStore) -> tuple[State, dict[str, float]] | None:
    """The state of the best checkpoint with its held-out figures; None: there is none.

    Of the optimizer's state it has only what an average of the weights needs.
    """
    like = {"policy": run.trained.like}
    if run.optimizer_settings.ema_decay is not None:
        like["optimizer"] = run.opt_state
    found = store.best(like)
    if found is None:
        return None
    trees = found.trees
    own = State(found.step, trees["policy"], state.frozen, trees.get("optimizer", ()))
    return own, found.facts["held_out"]


def check_sound(state: State, run: Run) -> None:
    """Stops a run at an update that is not finite, unless it skips such updates.

    Raises:
      RuntimeError: an update was not finite.
    """
    if run.nonfinite == "stop" and float(state.skipped) > state.skipped_before:
        raise RunFailed(
            f"at step {state.step} the loss or its gradient was NaN or infinite; weights and "
            "checkpoints are unchanged by it. Look for unusual examples, resume and skip such "
            "updates (--config.nonfinite=skip), or start again in another directory with a lower "
            "--config.learning_rate"
        )


def export_name(step: int, run: Run | Exporting) -> str:
    """The name of a step's Hugging Face folder within the run's directory.

    A merged model has a folder next to that of the adapters.
    """
    merged = "-merged" if run.adapting is not None and not adapters_alone(run) else ""
    return f"hf/step-{step}{merged}"


def export_folder(step: int, run: Run | Exporting) -> places.Place:
    """The place of the Hugging Face folder of a step."""
    return run.directory.within(export_name(step, run))


def exported(step: int, run: Run | Exporting) -> bool:
    """Whether every process sees the step's export, in the dtype that is asked for."""
    folder = export_folder(step, run)
    if adapters_alone(run):
        return all_agree(folder.exists(peft_folder.CONFIG))
    content, asked = folder.read("config.json"), jnp.dtype(run.saving.export_dtype).name
    said = json.loads(content or "{}")
    is_so = said.get("dtype", said.get("torch_dtype", asked)) == asked
    return all_agree(content is not None and is_so)


def send(step: int, run: Run) -> None:
    """Sends the export of a step to the hub, unless the run has sent it in this form.

    Raises:
      OSError: it could not be sent.
    """
    hub, folder = run.saving.hub, export_folder(step, run)
    if hub is None or not processes.is_first():
        return
    form = {} if adapters_alone(run) else {
        "dtype": jnp.dtype(run.saving.export_dtype).name, "text_only": run.saving.text_only,
    }  # fmt: skip
    what = {"repo": hub.repo, "step": step, "export": export_name(step, run)}
    sent = json.dumps(what | form).encode()
    if run.directory.read(records.SENT) == sent:
        return
    say(f"pushing {folder} to {hub.repo}")
    hf_hub.push(folder.local(), hub.repo, f"step {step} of {run.total_steps}")
    run.directory.write_whole(records.SENT, sent)


def base_of(run: Run | Exporting) -> str:
    """The adapters' base model as other programs name it, without its revision."""
    return run.base.partition("@")[0] if run.folder.revision else run.base


def export(model: zoo.Model, step: int, run: Run | Exporting) -> None:
    """Writes the policy as a Hugging Face folder, with the run's tokenizer and template.

    For a policy with adapters it holds only these, in PEFT's format, unless they are to be merged.
    """
    told = card.text(run, step)
    if adapters_alone(run):
        folder, revision = export_folder(step, run).address, run.folder.revision
        own = run.saving.chat_template is not None or run.tokenizer_folder != run.folder.path
        tokenizer_folder = run.tokenizer_folder if own else None
        return zoo.save_adapter(
            model, folder, base=base_of(run), revision=revision, card=told,
            tokenizer=tokenizer_folder, chat_template=run.saving.chat_template,
        )  # fmt: skip
    if run.adapting is not None:
        lost = adapters.lost_in(model, run.saving.export_dtype)
        say(f"merged: {adapters.lost_told(lost, run.saving.export_dtype)}")
    zoo.save(
        model,
        export_folder(step, run).address,
        dtype=run.saving.export_dtype,
        tokenizer=run.tokenizer_folder,
        stop_ids=run.stop_ids,
        chat_template=run.saving.chat_template,
        text_only=run.saving.text_only,
        card=told,
    )

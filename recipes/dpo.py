"""Direct preference optimization: train a policy on pairs of answers, against a frozen reference.

  python recipes/dpo.py --config=recipes/configs/tiny.py
  python recipes/dpo.py --config=recipes/configs/llama8b.py --config.directory=runs/first

The reference is read afresh from its weights at every start and never saved. The policy begins as
`initialize_from_hf`, or goes on from the newest checkpoint in `--config.directory`.
"""

import functools
import pathlib

from flax import nnx
import jax
import ml_collections
import tqdm

from checkpoints_io.run_state import RunStore
from recipes import (
    command,
    evaluation,
    losses,
    metrics,
    optimizer,
    reference,
    samples,
    settings,
    step,
)
from recipes.data import batches, chat
from recipes.prepare import Run, prepare, refuse_other_run, say
import zoo


def train(config: ml_collections.ConfigDict) -> None:
    """Runs the recipe to its last step, going on from the newest checkpoint if there is one.

    Raises:
      ValueError, OSError: a sentence about the settings, the data, the models or the disk.
      RuntimeError: policy and reference disagree before anything was learnt.
    """
    run = prepare(config)
    with jax.set_mesh(run.mesh):
        _train(config, run)


def _train(config: ml_collections.ConfigDict, run: Run) -> None:
    compute = settings.precision(config.mp).compute
    policy_graph, state = nnx.split(run.policy)
    reference_graph, frozen = nnx.split(run.reference)
    if reference_graph == policy_graph:
        reference_graph = policy_graph  # equal, and now one program runs both
    matrices = optimizer.matrices(state)
    policy, frozen = nnx.to_pure_dict(state), nnx.to_pure_dict(frozen)

    schedule = optimizer.schedule_of(config, run.total_steps)
    adamw = optimizer.optimizer_of(config, schedule, matrices)
    opt_state = optimizer.init(adamw, policy, run.mesh)
    loss = functools.partial(
        losses.LOSSES[config.loss], beta=config.beta, label_smoothing=config.label_smoothing
    )
    programs = step.compiled(
        policy, opt_state, graphs=(policy_graph, reference_graph), adamw=adamw, loss=loss,
        beta=config.beta, pairs=run.shape.pairs,
    )  # fmt: skip

    store = RunStore(run.directory / "checkpoints", keep=config.keep_checkpoints)
    check = functools.partial(refuse_other_run, run=run)
    saved = store.restore_newest({"policy": policy, "optimizer": opt_state}, check)
    start = saved.step if saved else 0
    if saved:
        policy, opt_state = saved.trees["policy"], saved.trees["optimizer"]
        say(f"going on from the checkpoint of step {start} in {run.directory}")
    log = metrics.Log(run.directory, config, after=start)
    updates = batches.iterate(run.pairs, run.shape, run.rows, seed=config.seed, start=start)
    put = functools.partial(batches.put, rows=run.shape.rows, sharding=run.rows)
    of_reference = functools.partial(programs.forward, reference_graph, frozen)

    def policy_now() -> zoo.Model:
        return nnx.merge(policy_graph, nnx.State(policy))

    def of_policy() -> evaluation.Forward:
        return functools.partial(programs.forward, policy_graph, reference.cast(policy, compute))

    def evaluate(at: int) -> None:
        for held_out in run.held_out:
            figures = evaluation.evaluate(
                held_out,
                of_policy(),
                of_reference,
                run.shape,
                run.rows,
                loss=loss,
                beta=config.beta,
            )
            log.write(at, figures)
            say(metrics.line(at, figures))

    at_once = start == 0 and reference.equal_weights(policy, frozen, compute)
    if at_once:
        say("policy and reference begin as the same weights: their log-probabilities must be equal")
        reference.check_logps(of_policy(), of_reference, put(run.first.micro_batches[0]))
    if start == 0 and config.run_initial_eval:
        evaluate(0)

    meter = metrics.Meter()
    for at in tqdm.trange(start + 1, run.total_steps + 1, unit="step", disable=None):
        update = next(updates)
        sums = programs.zero()
        for batch in update.micro_batches:
            sums = programs.add(sums, policy, frozen, put(batch))
        policy, opt_state, values = programs.apply(sums, policy, opt_state)
        meter.add(update, run.shape)

        last = at == run.total_steps
        due = lambda every, at=at, last=last: last or (every is not None and at % every == 0)
        if at == 1 and at_once:
            reference.check_first_loss(float(values["dpo_loss"]), compute)
        if at == start + 1 or due(config.steps_per_log):
            figures = metrics.on_host(values) | run.counts
            if (
                start + 1 < at <= start + 1 + config.steps_per_log
            ):  # the first that compiled nothing
                say(metrics.time_left(meter.seconds_per_update() * (run.total_steps - at)))
            figures |= meter.read()
            figures["learning_rate"] = float(jax.device_get(schedule(at - 1)))
            figures = {f"train/{name}": value for name, value in figures.items()}
            log.write(at, figures)
            say(metrics.line(at, figures))
        if due(config.steps_per_eval):
            evaluate(at)
        if due(config.steps_per_checkpoint):
            # The order of the pairs is a function of the seed, so this is all there is of chance.
            place = {"position": at * run.shape.pairs, "seed": config.seed}
            store.save(at, {"policy": policy, "optimizer": opt_state}, run.facts | place)
        if config.steps_per_hf_export != -1 and due(config.steps_per_hf_export):
            say(f"exporting to {export(policy_now(), at, config, run)}")

    store.close()
    log.close()
    if start == run.total_steps:
        say(f"this run was finished before; choose another --config.directory than {run.directory}")
    samples.show(run, policy_now(), run.reference, config.sample_tokens)


def export(model: zoo.Model, at: int, config: ml_collections.ConfigDict, run: Run) -> pathlib.Path:
    """Writes the policy as a Hugging Face folder, and says where."""
    folder = run.directory / "hf" / f"step-{at}"
    template = run.tokenizer.chat_template if config.chat_template else None
    zoo.save(
        model,
        folder,
        dtype=settings.DTYPES[config.hf_save_dtype],
        stop_ids=chat.stop_ids(run.tokenizer),
        chat_template=template,
    )
    return folder


if __name__ == "__main__":
    command.main(train)

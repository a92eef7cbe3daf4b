"""Direct preference optimization: train a policy on pairs of answers, against a frozen reference.

  python recipes/dpo.py --config=recipes/configs/tiny.py
  python recipes/dpo.py --config=recipes/configs/llama8b.py --config.directory=runs/first

The reference is read afresh from its weights at every start and never saved. The policy begins as
`initialize_from_hf`, or goes on from the newest checkpoint in `--config.directory`.
"""

from collections.abc import Callable
import contextlib
import functools

from flax import nnx
import jax
import ml_collections

from checkpoints_io.run_state import RunStore
from recipes import (
    command,
    ending,
    evaluation,
    logps,
    losses,
    metrics,
    optimizer,
    policy,
    reference,
    settings,
    step,
    stopping,
    terminal,
)
from recipes.data import batches, mixture
from recipes.prepare import Run, prepared, say
import zoo


def train(config: ml_collections.ConfigDict) -> None:
    """Runs the recipe to its last step, going on from the newest checkpoint if there is one.

    Raises:
      ValueError, OSError: a sentence about the settings, the data, the models or the disk.
      RuntimeError: policy and reference disagree before anything was learnt.
    """
    with (
        prepared(config) as run,
        jax.set_mesh(run.mesh),
        stopping.asked() as stop,
        policy.checkpoints_of(config, run) as store,
    ):
        _train(config, run, store, stop)


def _train(
    config: ml_collections.ConfigDict, run: Run, store: RunStore, stop: Callable[[], bool]
) -> None:
    compute = settings.precision(config.mp).compute
    blank = policy.blank(config, run)
    graph, layout = nnx.split(blank)
    schedule = optimizer.schedule_of(config, run.total_steps)
    adamw = optimizer.optimizer_of(config, schedule, optimizer.matrices(layout))
    forward = logps.compiled(run.mesh)

    frozen = reference.ready(config, blank, run, forward, stop)
    facts = run.facts | {"reference": frozen.fingerprint}
    say(f"reading the policy: a checkpoint in {run.directory}, or {config.initialize_from_hf}")
    state = policy.begin(blank, adamw, run, store, facts)
    start = state.step
    say(f"going on from step {start}" if start else "beginning at step 0")

    loss = losses.of(config)
    programs = step.compiled(
        state.params, state.opt_state, graph=graph, adamw=adamw, loss=loss, beta=config.beta,
        pairs=run.place.shape.pairs,
    )  # fmt: skip

    def of_policy() -> logps.Forward:
        return functools.partial(forward, graph, reference.cast(state.params, compute))

    def policy_now() -> zoo.Model:
        return nnx.merge(graph, nnx.State(state.params))

    def evaluate() -> dict[str, float]:
        heeding, found = stopping.heeding(stop, of_policy()), {}
        with contextlib.suppress(stopping.Asked):  # then it is done first when the run goes on
            for held_out, theirs in zip(run.held_out, frozen.held_out, strict=True):
                figures = evaluation.evaluate(
                    held_out, heeding, theirs, run.place, loss=loss, beta=config.beta
                )
                say(metrics.line(state.step, run.total_steps, figures))
                found |= figures
            if found:
                log.write(state.step, found)
            return found
        return {}

    def due(every: int | None) -> bool:
        return state.step == run.total_steps or (every is not None and state.step % every == 0)

    def export_if_due() -> None:
        if config.steps_per_hf_export != -1 and due(config.steps_per_hf_export):
            say(f"exporting to {policy.export_folder(state.step, run)}")
            policy.export(policy_now(), state.step, config, run)

    held_out = metrics.of_held_out(run.directory, start) if start else {}
    log = metrics.Log(run.directory, config, after=start or -1)
    with contextlib.closing(log):
        equal = start == 0 and reference.equal_weights(state.params, frozen.fingerprint, compute)
        if equal:
            say("policy and reference are the same weights: they must agree to the last bit")
            first = next(batches.in_order(run.pairs, run.place))
            reference.check_logps(of_policy(), frozen, first, run.place, compute)
        if start == 0 and config.run_initial_eval:
            evaluate()
        # Stopped between the checkpoint and what else was due.
        if start and due(config.steps_per_eval) and not held_out:
            held_out = evaluate()
        if start and not stop() and not policy.exported(start, run):
            export_if_due()
        if stop():
            raise stopping.Asked

        endless = mixture.endless(run.parts, config.seed)
        updates = batches.iterate(endless, run.place, start=start)
        meter, trend = metrics.Meter(), metrics.Trend()
        traced = [at for at in settings.profiled(config.profile) if at > start]
        for at in terminal.bar(range(start + 1, run.total_steps + 1), unit="step"):
            if at in traced[:1]:
                jax.profiler.start_trace(run.directory.within("profile").local())
            with meter.waiting():
                update = next(updates)
            sums = programs.zero()
            for packed in update.micro_batches:
                batch = batches.put(packed, run.place)
                theirs = frozen.of_batch(batch, update.rows)
                sums = programs.add(sums, state.params, theirs, batch)
            params, opt_state, values = programs.apply(sums, state.params, state.opt_state)
            answers = sums.policy_logps, sums.reference_logps
            del sums  # as large as the policy
            # Of the step before: nothing waits for this one.
            policy.check_sound(state, config)
            skipped = state.skipped + values.pop("skipped")
            state = policy.State(at, params, opt_state, skipped, state.skipped_before)
            meter.add(update)

            if at == 1 and equal:
                reference.check_first_loss(float(values["dpo_loss"]), compute, config.beta)
            if at == start + 1 or due(config.steps_per_log):
                figures = metrics.on_host(values) | run.counts
                figures["skipped"] = float(state.skipped)
                taken = max(at - round(figures["skipped"]), 1)
                figures["learning_rate"] = float(jax.device_get(schedule(taken - 1)))
                if left := meter.time_left(run.total_steps - at):
                    say(left)
                figures |= meter.read()
                figures |= metrics.by_part(
                    run.parts, update.rows, *answers, loss=loss, beta=config.beta
                )
                figures = {f"train/{name}": value for name, value in figures.items()}
                log.write(at, figures)
                say(metrics.line(at, run.total_steps, figures))
                if warning := trend.read(figures):
                    say(warning)
            if at in traced[-1:]:
                jax.block_until_ready(state.params)
                jax.profiler.stop_trace()
            with meter.paused():
                held_out = evaluate() if due(config.steps_per_eval) and not stop() else {}
                leaving = stop()
                if leaving or due(config.steps_per_checkpoint) or store.lost():
                    policy.save(state, config, run, store, facts, held_out)
                if leaving:
                    say(f"stopped after step {at}: the same command goes on from there")
                    return
                export_if_due()

        store.wait()
        while store.lost():
            policy.save(state, config, run, store, facts, held_out)
            store.wait()
    if start == run.total_steps:
        say(f"this run was finished before; choose another --config.directory than {run.directory}")
    if not stop():
        ending.show(config, run, policy_now(), frozen.model, held_out)


if __name__ == "__main__":
    command.main(train, joins=True)

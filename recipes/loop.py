"""A run around its steps: what is logged, evaluated, saved and exported, and when it stops.

A recipe gives three functions: how a step is taken, what is measured on held-out examples, and what
else a record says of a step.
"""

from collections.abc import Callable, Iterator
import contextlib
from typing import NamedTuple

import jax

from checkpoints_io.run_state import RunStore
from recipes import metrics, policy, stopping, terminal
from recipes.data import batches, mixture
from recipes.data.batches import Said, Update
from recipes.policy import Policy, State
from recipes.run import Run, say
from recipes.update import Answers, Programs, Sums


class Taken(NamedTuple):
    """The result of a step."""

    state: State
    values: dict[str, jax.Array]  # its figures, on the devices
    answers: Answers  # of the examples it was taken on


class Recipe(NamedTuple):
    """What differs between recipes."""

    take: Callable[[State, Update], Taken]
    # Figures of each held-out set, as long as the run is not asked to stop.
    evaluate: Callable[[State], Iterator[dict[str, float]]]
    describe: Callable[[Update, Taken], dict[str, float]]  # more figures of a step that is logged
    warn: Callable[[dict[str, float]], str | None]  # by the figures of a record
    answers: tuple[str, ...]  # what the answers of an example are called in figures


def run_steps(
    recipe: Recipe,
    own: Policy,
    state: State,
    run: Run,
    store: RunStore,
    facts: dict,
    stop: Callable[[], bool],
) -> tuple[State, dict[str, float]]:
    """Takes the remaining steps; returns the last state and its held-out figures.

    Raises:
      Asked: the run was asked to stop.
      RuntimeError, OSError: as `policy.save`.
    """
    start, every = state.step, run.every
    held_out = metrics.of_held_out(run.directory, start) if start else {}
    log = metrics.Log(run.directory, run.records, after=start or -1)

    def due(steps: int | None) -> bool:
        return state.step == run.total_steps or (steps is not None and state.step % steps == 0)

    def evaluate() -> dict[str, float]:
        found: dict[str, float] = {}
        try:
            for figures in recipe.evaluate(state):
                say(metrics.line(state.step, run.total_steps, figures))
                found |= figures
        except stopping.Asked:  # then it is done first when the run is resumed
            return {}
        if found:
            log.write(state.step, found)
        return found

    def export_if_due() -> None:
        if every.steps_per_hf_export != -1 and due(every.steps_per_hf_export):
            say(f"exporting to {policy.export_folder(state.step, run)}")
            policy.export(policy.model_of(own, state), state.step, run)

    with contextlib.closing(log):
        if start == 0 and run.run_initial_eval:
            evaluate()
        # The run was stopped after the checkpoint, before the rest that was due.
        if start and due(every.steps_per_eval) and not held_out:
            held_out = evaluate()
        if start and not stop() and not policy.exported(start, run):
            export_if_due()
        if stop():
            raise stopping.Asked

        updates = batches.iterate(mixture.endless(run.parts, run.seed), run.place, start=start)
        meter = metrics.Meter(recipe.answers)
        traced = [step for step in run.profile if step > start]
        for step in terminal.bar(range(start + 1, run.total_steps + 1), unit="step"):
            if step in traced[:1]:
                jax.profiler.start_trace(run.directory.within("profile").local())
            with meter.waiting():
                update = next(updates)
            taken = recipe.take(state, update)
            # This checks the step before, so that nothing waits for this one.
            policy.check_sound(state, run)
            state = taken.state
            meter.add(update)
            if step == start + 1 or due(every.steps_per_log):
                if left := meter.time_left(run.total_steps - step):
                    say(left)
                figures = recorded(recipe, own, run, update, taken) | meter.read()
                figures |= recipe.describe(update, taken)
                figures = {f"train/{name}": value for name, value in figures.items()}
                log.write(step, figures)
                say(metrics.line(step, run.total_steps, figures))
                if warning := recipe.warn(figures):
                    say(warning)
            if step in traced[-1:]:
                jax.block_until_ready(state.trained)
                jax.profiler.stop_trace()
            with meter.paused():
                held_out = evaluate() if due(every.steps_per_eval) and not stop() else {}
                leaving = stop()
                if leaving or due(every.steps_per_checkpoint) or store.lost():
                    policy.save(state, run, store, facts, held_out)
                if leaving:
                    say(f"stopped after step {step}: the same command resumes from there")
                    return state, held_out
                export_if_due()

        store.wait()
        while store.lost():
            policy.save(state, run, store, facts, held_out)
            store.wait()
    if start == run.total_steps:
        say(f"this run is already finished; choose another --config.directory than {run.directory}")
    return state, held_out


def applied(programs: Programs, sums: Sums, state: State, said: Said) -> Taken:
    """One optimizer step with the sums of an update."""
    answers = Answers(sums.policy, sums.reference, *said)
    trained, opt_state, values = programs.apply(sums, state.trained, state.opt_state, said)
    skipped = state.skipped + values.pop("skipped")
    after = State(state.step + 1, trained, state.frozen, opt_state, skipped, state.skipped_before)
    return Taken(after, values, answers)


def recorded(
    recipe: Recipe, own: Policy, run: Run, update: Update, taken: Taken
) -> dict[str, float]:
    """The figures of a step that every recipe records. Waits for the devices."""
    figures = metrics.on_host(taken.values) | run.counts
    figures["skipped"] = float(taken.state.skipped)
    steps = max(taken.state.step - round(figures["skipped"]), 1)  # the optimizer has seen
    figures["learning_rate"] = float(jax.device_get(own.schedule(steps - 1)))
    return figures

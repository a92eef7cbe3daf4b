"""The training loop: what is logged, evaluated, saved and exported, and when the run stops.

A recipe gives its functions as a `Recipe`: how a step is taken, what is measured on held-out
examples, how samples are drawn, how the page is written, and what else is recorded of a step.
"""

from collections.abc import Callable, Iterator
import contextlib
from typing import NamedTuple

import jax

from checkpoints_io import places, processes
from checkpoints_io.run_state import RunStore
from recipes import terminal
from recipes.data import mixture
from recipes.data.packed import batches
from recipes.data.packed.batches import DataFields, Update
from recipes.training import (
    by_time,
    compiling,
    policy,
    preemption,
    records,
    stopping,
    tracing,
    watchdog,
    watched,
)
from recipes.training.metering import Meter
from recipes.training.policy import Policy, State
from recipes.training.run import Run, say
from recipes.training.update import Answers, Programs, Sums


class Taken(NamedTuple):
    """The result of a step."""

    state: State
    values: dict[str, jax.Array]  # its figures, on the devices
    answers: Answers  # of the examples it was taken on


class Recipe(NamedTuple):
    """The functions in which recipes differ."""

    take: Callable[[State, Update], Taken]
    # Figures of each held-out set, as long as the run is not asked to stop.
    evaluate: Callable[[State], Iterator[dict[str, float]]]
    sample: Callable[[State], list[watched.Sample]]  # where they are asked for
    page: Callable[[places.Place], None]  # writes the run's page, from its files
    # More figures of a step that is logged, and a warning that depends on a record's figures.
    describe: Callable[[Update, Taken], dict[str, float]] | None = None
    warn: Callable[[dict[str, float]], str | None] | None = None


class Around(NamedTuple):
    """The objects that the loop around the steps of a run uses."""

    recipe: Recipe
    own: Policy
    run: Run
    store: RunStore
    facts: dict
    stop: Callable[[], bool]
    log: records.Log
    meter: Meter
    alarm: by_time.Alarm
    trace: tracing.Trace
    watch: stopping.Watch


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
      StopRequested: the run was asked to stop before its first step.
      RuntimeError, OSError: as `policy.save`; the last export could not be sent.
    """
    start = state.step
    log = records.Log(run.directory, run.records, after=start or -1)
    watch = stopping.Watch(run.patience, run.directory)
    alarm = by_time.Alarm(run.every.minutes_per_checkpoint)
    trace = tracing.Trace(run.profile, run.directory.within("profile"))
    with contextlib.closing(log), compiling.heard() as compiled, contextlib.closing(trace):
        meter = Meter(compiled)
        around = Around(
            recipe=recipe, own=own, run=run, store=store, facts=facts, stop=stop, log=log,
            meter=meter, alarm=alarm, trace=trace, watch=watch,
        )  # fmt: skip
        is_over = is_last(around, start)
        if not is_over:
            say("compiling the programs of a step (unless they are in --config.compile_cache)")
        held_out = _before_first(around, state)
        if is_last(around, start):  # perhaps by the evaluation that was due
            if not is_over:
                _write_page(around)
            state, held_out = _after_last(around, state, held_out)
            if is_over:
                say(
                    "this run is already finished; choose another --config.directory than "
                    f"{run.directory}"
                )
            return state, held_out
        for update in _updates(around, start):
            state = _step(around, state, update, is_first=state.step == start)
            held_out, leaving = _after_step(around, state)
            if leaving:
                say(f"stopped after step {state.step}: the same command resumes from there")
                return state, held_out
            if is_last(around, state.step):
                break
        store.wait()
        while store.lost():
            policy.save(state, run, store, facts, held_out)
            store.wait()
        _write_page(around)
        return _after_last(around, state, held_out)


def due(around: Around, step: int, every: int | None) -> bool:
    """Whether something that is due every `every` steps, and at the end, is due after this step."""
    return is_last(around, step) or (every is not None and step % every == 0)


def is_last(around: Around, step: int) -> bool:
    """Whether the run ends after this step: all are taken, or a figure no longer improves."""
    return step >= around.run.total_steps or around.watch.ends()


def eval_due(around: Around, step: int) -> bool:
    """Whether an evaluation is due after this step."""
    return step in around.run.eval_at or due(around, step, around.run.every.steps_per_eval)


def _before_first(around: Around, state: State) -> dict[str, float]:
    """What a fresh run measures first, or what was still due when a resumed one stopped."""
    run = around.run
    held_out = records.of_held_out(run.directory, state.step) if state.step else {}
    if state.step == 0 and run.run_initial_eval:
        _evaluate(around, state)
    if not around.stop() and not records.sampled(run.directory, state.step):
        _sample_if_due(around, state)
    if state.step and eval_due(around, state.step) and not held_out:
        held_out = _evaluate(around, state)
    if run.saving.keep.highest is not None:
        for step in around.store.steps():  # a stop saves before the evaluation that was due
            around.store.amend(step, {"held_out": records.of_held_out(run.directory, step)})
    if state.step and not around.stop() and not policy.exported(state.step, run):
        _export_if_due(around, state)
    if around.stop():
        raise preemption.StopRequested
    return held_out


def _updates(around: Around, start: int) -> Iterator[Update]:
    """The updates of the remaining steps, with a progress bar and, if asked for, a trace."""
    run = around.run
    updates = batches.iterate(mixture.endless(run.parts, run.seed), run.place, start=start)
    for step in terminal.bar(range(start + 1, run.total_steps + 1), unit="step"):
        around.trace.before(step)
        with around.meter.waiting():
            update = next(updates)
        yield update


def _step(around: Around, state: State, update: Update, *, is_first: bool) -> State:
    """Takes a step, and records it if that is due; the first that is taken always is."""
    taken = around.recipe.take(state, update)
    # This checks the step before, so that nothing waits for this one.
    policy.check_sound(state, around.run)
    state = taken.state
    around.meter.add(update)
    if is_first or due(around, state.step, around.run.every.steps_per_log):
        _record(around, update, taken)
    around.trace.after(state.step, state.trained)
    return state


def _record(around: Around, update: Update, taken: Taken) -> None:
    """Writes the figures of a step to all records; it waits for the devices."""
    run, meter, step = around.run, around.meter, taken.state.step
    figures = records.on_host(taken.values) | run.counts
    figures["skipped"] = float(taken.state.skipped)
    steps = max(step - round(figures["skipped"]), 1)  # steps that the optimizer has seen
    figures["learning_rate"] = float(jax.device_get(run.schedule(steps - 1)))
    if left := meter.time_left(run.total_steps - step):
        say(left)
    times = meter.times()  # before `read`, which resets the meter
    figures |= meter.read()
    if around.recipe.describe:
        figures |= around.recipe.describe(update, taken)
    figures = {f"train/{name}": value for name, value in figures.items()}
    around.log.write(step, figures | times)
    say(records.line(step, run.total_steps, figures))
    if around.recipe.warn and (warning := around.recipe.warn(figures)):
        say(warning)


def _after_step(around: Around, state: State) -> tuple[dict[str, float], bool]:
    """Evaluates, saves and exports what is due; returns held-out figures, and whether to stop."""
    run, store, every = around.run, around.store, around.run.every
    watchdog.check_save(store.seconds_saving(), run.hang_minutes)
    is_due = eval_due(around, state.step)
    held_out = _evaluate(around, state) if is_due and not around.stop() else {}
    leaving, rings = around.stop(), around.alarm.rings()
    if not leaving:
        _sample_if_due(around, state)
        if is_due:
            _write_page(around)
    if leaving or rings or due(around, state.step, every.steps_per_checkpoint) or store.lost():
        around.alarm.restart()
        with around.meter.paused("saving"):
            policy.save(state, run, store, around.facts, held_out)
    if not leaving:
        _export_if_due(around, state)
    return held_out, leaving


def _evaluate(around: Around, state: State) -> dict[str, float]:
    found: dict[str, float] = {}
    try:
        with around.meter.paused("evaluation"):
            for figures in around.recipe.evaluate(state):
                say(records.line(state.step, around.run.total_steps, figures))
                found |= figures
    except preemption.StopRequested:  # the evaluation is made first when the run is resumed
        return {}
    if found:
        seconds = around.meter.time_of("evaluation")
        around.log.write(state.step, found | {"time/evaluation": seconds})
    if ending := around.watch.add(found, state.step):
        say(ending)
    return found


def _sample_if_due(around: Around, state: State) -> None:
    run, every = around.run, around.run.watching.every
    if every is not None and due(around, state.step, every):
        with around.meter.paused("samples"):
            some = around.recipe.sample(state)
        around.log.samples(state.step, some)
        say(watched.excerpt(some, state.step, run.total_steps))


def _write_page(around: Around) -> None:
    """Writes the page of the run from what its files say so far."""
    if not processes.is_first():
        return
    with around.meter.paused("page"):
        try:
            around.recipe.page(around.run.directory)
        except Exception as error:  # no failure of the page is a reason to lose a run
            say(f"the page of the run could not be written: {error!r}")


def _export_if_due(around: Around, state: State) -> None:
    run, every = around.run, around.run.every.steps_per_hf_export
    if run.saving.keep.highest is not None and is_last(around, state.step):
        return  # the best state is exported instead, which may be another step's
    if every != -1 and due(around, state.step, every):
        _export(around, state)
        if run.saving.hub and run.saving.hub.every and not is_last(around, state.step):
            try:
                with around.meter.paused("export"):
                    policy.send(state.step, run)
            except OSError as error:  # a later push may succeed, and the last one must
                say(f"the run continues: {error}")


def _after_last(
    around: Around, state: State, held_out: dict[str, float]
) -> tuple[State, dict[str, float]]:
    """Exports and sends the run's result: the best state if it keeps one, else the last."""
    run = around.run
    if run.saving.keep.highest is not None:
        if found := policy.best(state, run, around.store):
            state, held_out = found
            say(f"the best checkpoint is the one of step {state.step}")
        if run.every.steps_per_hf_export != -1 and not policy.exported(state.step, run):
            _export(around, state)
    if policy.exported(state.step, run):
        records.conclude(run.directory, policy.export_name(state.step, run))
        if run.saving.hub:
            policy.send(state.step, run)
    return state, held_out


def _export(around: Around, state: State) -> None:
    say(f"exporting to {policy.export_folder(state.step, around.run)}")
    with around.meter.paused("export"):
        policy.export(policy.export_model(around.own, state), state.step, around.run)


def applied(programs: Programs, sums: Sums, state: State, fields: DataFields) -> Taken:
    """Takes one optimizer step with the sums of an update."""
    trained, opt_state, values = programs.apply(sums, state.trained, state.opt_state, fields)
    skipped = state.skipped + values.pop("skipped")
    after = State(state.step + 1, trained, state.frozen, opt_state, skipped, state.skipped_before)
    return Taken(after, values, sums.answers(fields))

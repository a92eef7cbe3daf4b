"""Direct preference optimization: train a policy on pairs of answers, against a frozen reference.

  python recipes/dpo.py --config=recipes/configs/tiny.py
  python recipes/dpo.py --config=recipes/configs/llama8b.py --config.directory=runs/first

The reference is read from its weights at every start and never saved. The policy starts from
`initialize_from_hf`, or resumes from the newest checkpoint in `--config.directory`.
"""

if __name__ == "__main__":  # a wrong flag is answered before the imports below, which take seconds
    from recipes.training import command, settings

    command.answer(settings.DPO)

from collections.abc import Iterator
import functools

import jax
import ml_collections

from recipes.data.packed import batches
from recipes.data.packed.batches import Update
from recipes.pages import run_page
from recipes.preference import coupled, evaluation, gates, metrics, objectives, reference
from recipes.preference.displacement import Trend
from recipes.training import (
    checks,
    command,
    ending,
    logps,
    loop,
    plain_texts,
    policy,
    preemption,
    settings,
    tasks,
    update,
    watchdog,
    watched,
)
from recipes.training.policy import State
from recipes.training.prepare import prepared


def train(config: ml_collections.ConfigDict) -> bool:
    """Runs the recipe to its last step, resuming from the newest checkpoint if there is one.

    False: it was asked to stop before its end, and the same config resumes it.

    Raises:
      ValueError, OSError: a sentence about the settings, the data, the models or the disk.
      RuntimeError: policy and reference disagree before anything was learnt.
    """
    given = checks.checked(config, settings.table_of(settings.DPO))
    objective = objectives.objective(given)
    wanted = reference.wanted(given, objective)
    with (
        prepared(given, beside=wanted) as run,
        jax.set_mesh(run.computing.mesh),
        preemption.stop_on_signals() as stop_requested,
        watchdog.over(run.hang_minutes, stop_requested) as stop,
        policy.checkpoints_of(run) as store,
    ):
        own, forward = policy.of(run), logps.compiled(run.computing.mesh)
        initial = reference.ready(wanted, own, run, forward, stop)
        # The reference at a state of the run: the initial one, unless it follows the policy.
        reference_at = functools.partial(reference.at_step, initial, own, forward)
        facts = policy.facts_of(own, run) | {"reference": initial.fingerprint}
        state = policy.begin(own, run, store, facts)
        programs = update.compiled(
            state.trained, state.opt_state, graph=own.graph, optimizer=run.optimizer,
            loss=objective.loss, figures=lambda answers: metrics.preference(answers, objective),
            shape=run.place.shape,
        )  # fmt: skip
        equal = gates.check_logps(
            policy.eval_forward(own, state, forward), own, state, reference_at(state), run
        )

        def take(state: State, pairs: Update) -> loop.Taken:
            """One step of DPO on the pairs of an update, in micro-batches."""
            fields, sums = batches.data_fields(pairs, run.place), programs.zero()
            of_reference = reference_at(state).of_batch
            pull = of_all = None
            if objective.is_coupled:  # a pair's part of the gradient depends on all the others
                pull, of_all = coupled.pull(
                    objective, policy.train_forward(own, state, forward), of_reference, pairs,
                    fields, run.place,
                )  # fmt: skip
            for packed in pairs.micro_batches:
                batch = batches.put(packed, run.place)
                # log p of each answer under the reference, and then under the policy: the loss of
                # their log-ratios (losses.py), its gradient, added to that of earlier pairs.
                theirs = of_reference(batch, pairs.source_rows) if of_all is None else of_all
                sums = programs.add(sums, state.trained, state.frozen, theirs, fields, batch, pull)
            taken = loop.applied(programs, sums, state, fields)  # the optimizer
            if equal and taken.state.step == 1:
                gates.check_first_loss(taken.values, objective, run, taken.answers)
            return taken

        def evaluate(state: State) -> Iterator[dict[str, float]]:
            """The same forward pass for policy and reference, on every held-out set."""
            ask = preemption.heeding(stop, policy.eval_forward(own, state, forward))
            sets = reference.held_out_at_step(initial, own, forward, state, run, stop)
            for held_out, theirs in zip(run.held_out, sets, strict=True):
                yield evaluation.evaluate(held_out, ask, theirs, run.place, objective)
            yield from plain_texts.evaluate(run, ask)
            yield from tasks.evaluate(run, lambda: policy.eval_model(own, state), stop)

        def describe(pairs: Update, taken: loop.Taken) -> dict[str, int | float]:
            """The figures of a step by source, where there are several."""
            return metrics.by_part(run.parts, pairs.source_rows, taken.answers, objective)

        def sample(state: State) -> list[watched.Sample]:
            """Answers of both to a few prompts."""
            ours, theirs = policy.eval_model(own, state), reference_at(state)
            return watched.taken(ours, theirs.model, theirs.samples, run, state.step)

        recipe = loop.Recipe(
            take=take, evaluate=evaluate, sample=sample, page=run_page.write,
            describe=describe, warn=Trend(objective).read,
        )  # fmt: skip
        state, held_out = loop.run_steps(recipe, own, state, run, store, facts, stop)
        if not stop():
            ending.show(run, policy.export_model(own, state), initial.model, held_out, state.step)
            return True
    return False


if __name__ == "__main__":
    command.main(train, settings.DPO, joins=True)

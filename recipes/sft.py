"""Supervised fine-tuning: train a model on answers, by the log-probability of their tokens.

  python recipes/sft.py --config=recipes/configs/tiny_sft.py
  python recipes/sft.py --config=recipes/configs/tiny_sft.py --config.train_data=mine.jsonl

Rows are conversations (`messages`), or a prompt with its answer. Templates, masks, packing, resume
and exports are those of recipes/dpo.py.
"""

if __name__ == "__main__":  # a wrong flag is answered before the imports below, which take seconds
    from recipes.training import command, settings

    command.answer(settings.SFT)

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import ml_collections
import numpy as np

from recipes.data.packed import batches, streams
from recipes.data.packed.batches import Update
from recipes.pages import run_page
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
from recipes.training.update import Answers


def train(config: ml_collections.ConfigDict) -> bool:
    """Runs the recipe to its last step, resuming from the newest checkpoint if there is one.

    False: it was asked to stop before its end, and the same config resumes it.

    Raises:
      ValueError, OSError: a sentence about the settings, the data, the model or the disk.
    """
    given = checks.checked(config, settings.table_of(settings.SFT))
    with (
        prepared(given) as run,
        jax.set_mesh(run.computing.mesh),
        preemption.stop_on_signals() as stop_requested,
        watchdog.over(run.hang_minutes, stop_requested) as stop,
        policy.checkpoints_of(run) as store,
    ):
        own, forward = policy.of(run), logps.compiled(run.computing.mesh)
        facts = policy.facts_of(own, run)
        state = policy.begin(own, run, store, facts)
        programs = update.compiled(
            state.trained, state.opt_state, graph=own.graph, optimizer=run.optimizer,
            loss=negative_logps, shape=run.place.shape,
            figures=figures,
        )  # fmt: skip
        nothing = batches.put_replicated(
            np.zeros((run.place.shape.examples, 1), np.float32), run.place
        )

        def take(state: State, answers: Update) -> loop.Taken:
            """One step on the answers of an update, in micro-batches."""
            fields, sums = batches.data_fields(answers, run.place), programs.zero()
            for packed in answers.micro_batches:
                batch = batches.put(packed, run.place)
                sums = programs.add(sums, state.trained, state.frozen, nothing, fields, batch)
            return loop.applied(programs, sums, state, fields)

        def evaluate(state: State) -> Iterator[dict[str, float]]:
            """Nats per scored token of each held-out set."""
            ask = preemption.heeding(stop, policy.eval_forward(own, state, forward))
            for one in run.held_out:
                tokens = np.array([*map(streams.scored_tokens, one.examples)])
                total = logps.of_examples(ask, one.examples, run.place).sum(dtype=np.float64)
                yield {f"eval/{one.name}/loss": float(-total / tokens.sum())}
            yield from plain_texts.evaluate(run, ask)
            yield from tasks.evaluate(run, lambda: policy.eval_model(own, state), stop)

        def sample(state: State) -> list[watched.Sample]:
            """Answers to a few prompts."""
            return watched.taken(policy.eval_model(own, state), None, None, run, state.step)

        recipe = loop.Recipe(take=take, evaluate=evaluate, sample=sample, page=run_page.write)
        state, held_out = loop.run_steps(recipe, own, state, run, store, facts, stop)
        if not stop():
            ending.show(run, policy.export_model(own, state), None, held_out, state.step)
            return True
    return False


def figures(answers: Answers) -> dict[str, Float[Array, ""]]:
    """Metrics of an update: nats per scored token, and the share of most likely tokens."""
    return {"loss": jnp.mean(negative_logps(answers))} | update.token_accuracy(answers)


def negative_logps(answers: Answers) -> Float[Array, " P"]:
    """Losses of the answers, whose mean is the update's mean over all scored tokens, in nats."""
    examples, tokens = len(answers.tokens), answers.tokens.sum()
    return -answers.policy.sum(-1) * (examples / tokens)


if __name__ == "__main__":
    command.main(train, settings.SFT, joins=True)

"""The plan's notes on settings that have no effect, or a surprising one, in this run."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from recipes.data import mixture, shown
from recipes.training import optimizer
from recipes.training.run import Run, adapters_alone


def of(run: Run, num_epochs: float | None, max_eval_pairs: int | None) -> list[str]:
    """All notes on a run, given also the two settings that it does not hold."""
    return [
        *_on_rate(run.optimizer_settings, run.total_steps),
        *_on_examples(run, num_epochs),
        *_on_held_out(run, max_eval_pairs),
        *_on_due(run),
        *_on_adapters(run),
    ]


def _on_rate(given: optimizer.OptimizerSettings, total: int) -> Iterator[str]:
    peak = given.learning_rate
    warmup, decay = optimizer.phases(given, total)
    schedule = optimizer.schedule_of(given, total)
    highest = float(jax.device_get(schedule(min(warmup, total - 1))))
    if highest < 0.999 * peak:
        yield (
            f"the learning rate never reaches --config.learning_rate={peak:g}, only "
            f"{highest:.3g}: --config.warmup={given.warmup:g} is {warmup} steps, but the run has "
            f"{total}"
        )
    # A step changes a weight by about the rate; half the spacing of float32 numbers is 2**-25.
    if highest * 2**25 < 0.03:
        yield (
            f"at a learning rate of {highest:.3g}, weights larger than {highest * 2**25:.2g} do "
            "not change: the step is rounded away in float32"
        )
    if given.ema_decay is not None and total * (1 - given.ema_decay) < 1:
        yield (
            f"--config.ema_decay={given.ema_decay:g} averages over about "
            f"{1 / (1 - given.ema_decay):.4g} updates, but the run has {total}: the exported "
            "weights stay close to the initial ones"
        )
    for name, steps in (("warmup", warmup), ("cooldown", decay)):
        amount = given._asdict()[name]
        if amount and not steps:
            yield f"--config.{name}={amount:g} of {total} steps rounds to 0 steps"


def _on_examples(run: Run, num_epochs: float | None) -> Iterator[str]:
    update, total = run.place.shape.examples, run.total_steps
    what = shown.noun(run.examples)
    for part, share in zip(run.parts, mixture.shares(run.parts), strict=True):
        whose = "" if len(run.parts) == 1 else f" of {part.name}"
        drawn = update * share
        if drawn > len(part.examples):
            yield (
                f"an update of --config.train_batch_size={update} takes about {drawn:.4g} "
                f"{what}{whose} but there are only {len(part.examples)}: it uses each one "
                f"{drawn / len(part.examples):.3g} times"
            )
        if drawn * total < 1:
            yield f"less than one {what[:-1]}{whose} is drawn in {total} steps: raise its weight"
    if num_epochs:
        exact = num_epochs * len(run.examples) / update
        if abs(total - exact) > 0.05 * exact:
            yield (
                f"--config.num_epochs={num_epochs:g} would be {exact:.3g} updates of {update} "
                f"{what}; rounded to {total}"
            )


def _on_held_out(run: Run, most: int | None) -> Iterator[str]:
    if not run.held_out:
        what = shown.noun(run.examples)
        yield (
            f"no {what} are held out: no metric will show how the policy does on unseen {what}, "
            "and no answers are shown at the end; --config.validation_split_fraction=0.05 holds "
            f"out prompts, --config.validation.NAME=FILE sets a file of held-out {what}"
        )
    elif most and all(len(held.examples) < most for held in run.held_out):
        yield (
            f"--config.max_eval_pairs={most} exceeds the size of every held-out set: all examples "
            "are used"
        )


def _on_due(run: Run) -> Iterator[str]:
    names = ["steps_per_log", "steps_per_checkpoint", "steps_per_hf_export"]
    names += ["steps_per_eval"] if run.held_out else []
    every = run.every._asdict()
    if late := [name for name in names if (every[name] or 0) > run.total_steps]:
        told = ", ".join(f"--config.{name}={every[name]}" for name in late)
        yield f"{told} never applies within {run.total_steps} steps, except after the last"
    kept = run.saving.keep.every
    if kept and kept > run.total_steps:
        yield (
            f"--config.keep_every={kept} keeps no checkpoint: the run ends at step "
            f"{run.total_steps}"
        )


def _on_adapters(run: Run) -> Iterator[str]:
    if run.adapting is None:
        return
    if run.optimizer_settings.learning_rate < 1e-6:
        start = ", and 5e-6 is a common start" if run.place.shape.answers > 1 else ""
        yield (
            f"--config.learning_rate={run.optimizer_settings.learning_rate:g} suits training all "
            f"weights: adapters hardly move below 1e-6{start}"
        )
    if run.adapting.folder is None and run.records.settings.get("reference_mode") == "base":
        yield (
            "--config.reference_mode=base is the same as resident: new adapters start as the "
            "policy without them"
        )
    rank = run.adapting.rank
    if adapters_alone(run) and rank > 16:
        yield f"adapters of rank {rank}: vLLM takes at most 16 unless --max-lora-rank is raised"
    dtype = jnp.dtype(run.saving.export_dtype)
    if adapters_alone(run) and dtype not in (jnp.bfloat16, jnp.float32):  # the default, and theirs
        yield (
            f"--config.hf_save_dtype={dtype.name} has no effect: exported adapters are float32, as "
            "they are trained"
        )
    if adapters_alone(run) and run.saving.chat_template is not None:
        yield (
            "an export of adapters does not contain --config.chat_template: pass it to the "
            "server as well (vLLM: --chat-template)"
        )

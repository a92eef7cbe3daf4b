"""The frozen reference: read again at every start, and known by its fingerprint.

`resident`: its weights stay on the devices, for every step. `cached`: its log-probabilities of all
pairs are computed once and kept on disk, and it leaves memory. What is frozen of the policy is its
reference's too, and stays.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, PyTree
import numpy as np

from checkpoints_io import places
from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import BadInput, NotFound
from checkpoints_io.run_state import RunStore
from checkpoints_io.sealed import Facts
from recipes.data import mixture
from recipes.data.ids.examples import Example
from recipes.data.mixture import Part
from recipes.data.packed import batches
from recipes.data.packed.packing import Packed
from recipes.data.run_data import HeldOut
from recipes.preference import reference_cache
from recipes.preference.objectives import Objective
from recipes.training import checks, listing, logps, optimizer, preemption, watched
from recipes.training.by_name import Values
from recipes.training.policy import Policy, State
from recipes.training.run import Beside, Run, Scoring, say
from recipes.training.settings import REFERENCE
from recipes.training.update import Params
from recipes.training.watched import ReferenceSamples
import zoo
from zoo import adapters
from zoo.parts import adapted, attention, partly

# How much of the way to the policy a reference that follows it moves, and what it is known by.
MIXUP, FOLLOWS = 0.6, "follows"


class Reference(NamedTuple):
    """What a run needs of its reference."""

    fingerprint: str  # "follows" of one that moves with the policy
    of_batch: Callable[[Packed, np.ndarray], Float[Array, "P A"]]  # micro-batch, rows in the source
    held_out: list[np.ndarray]  # log-probabilities [pairs, A] of each held-out set, in nats
    model: zoo.Model | None  # none when it has left memory
    samples: ReferenceSamples | None = None  # none of one that follows
    weights: Params | None = None  # of one that follows, at this step

    def fingerprint_now(self) -> str:
        """The fingerprint of its weights at this step; of one that follows it is computed."""
        if self.weights is None:
            return self.fingerprint
        return fingerprint(adapters.bare(self.weights))


def wanted(given: Values, objective: Objective) -> Beside | None:
    """The reference that the settings name, or else the weights that the policy starts from.

    Beside frozen weights it holds none of them again. There is none where no loss looks at it.

    Raises:
      ValueError: there is none, and the settings speak of one.
    """
    path, every = given["reference_model_path"], given["reference_sync_steps"]
    if not objective.has_reference:
        for name, setting in REFERENCE.items():
            if given[name] != setting.default:
                raise BadInput(
                    f"--config.{name}={given[name]} has no effect: --config.loss={given['loss']} "
                    f"does not use a reference; leave it at {listing.spelt(setting.default)}"
                )
        return None
    _check_following(given)
    wanted, mode = checks.adapters_wanted(given), given["reference_mode"]
    if wanted and mode == "resident" and path == given["initialize_from_hf"]:
        path, mode = None, "base"  # they are there already, and perhaps in few bits
    return Beside(
        path or given["initialize_from_hf"],
        given["reference_is_hf"],
        mode,
        given["reference_cache"],
        of_policy=path is None and (wanted or given["trainable"] is not None),
        follows=None if every is None else (every, given["reference_mixup_alpha"] or MIXUP),
    )


def _check_following(given: Values) -> None:
    every = given["reference_sync_steps"]
    if every is None:
        if given["reference_mixup_alpha"] is not None:
            raise BadInput(
                "--config.reference_mixup_alpha has no effect without "
                "--config.reference_sync_steps: set it (e.g. 512)"
            )
        return
    if given["reference_mode"] != "resident" or given["reference_model_path"] is not None:
        raise BadInput(
            f"--config.reference_sync_steps={every} only applies to a reference that starts as a "
            "copy of the policy: leave out --config.reference_model_path, and keep "
            "--config.reference_mode=resident"
        )
    for name in ("keep_best", "stop_when"):
        figure = given[name]
        if figure is None or figure.endswith("/dpo_margin_policy"):
            continue
        raise BadInput(
            f"--config.{name}={figure} is measured against the reference, which moves with "
            "--config.reference_sync_steps: use dpo_margin_policy, or leave it out"
        )


def ready(
    asked: Beside | None,
    policy: Policy,
    run: Run,
    forward: Callable[[nnx.GraphDef, PyTree, Packed], Array],
    stop: Callable[[], bool],
) -> Reference:
    """Reads the reference, and computes what is needed of it before the first step.

    Raises:
      StopRequested: the run is asked to stop meanwhile.
      FileNotFoundError, ValueError: as `load`.
      RuntimeError: its cached log-probabilities are not those it gives now, or not finite.
    """
    if asked is None:
        return _none(run)
    if asked.follows:
        every, share = asked.follows
        say(
            f"the reference: a copy of the initial policy, moved {100 * share:g}% towards the "
            f"policy every {every} steps"
        )
        return Reference(FOLLOWS, _not_yet, [], None)
    graph, frozen = _weights(asked, policy, run)
    model, dtype = nnx.merge(graph, nnx.State(frozen)), policy.blank.dtype
    samples = watched.reference_samples(nnx.merge(graph, nnx.State(partly.whole(frozen))), run)
    ask = functools.partial(forward, graph, frozen)
    heeding = preemption.heeding(stop, ask)
    known = fingerprint(adapters.bare(frozen))
    sets = [held_out.examples for held_out in run.held_out]
    if asked.resident:
        held_out = [logps.of_examples(heeding, pairs, run.place) for pairs in sets]
        return Reference(known, lambda batch, _: ask(batch), held_out, model, samples)

    if asked.cache:
        directory = places.at(asked.cache, "--config.reference_cache")
    else:
        directory = places.beside(run.directory, "reference-cache")
    cache = reference_cache.opened(
        directory, fingerprint=known, compute=dtype,
        attention=attention.backend_of(model.config, dtype, policy.blank.attention),
        ld_alpha=run.place.shape.ld_alpha,
    )  # fmt: skip
    say(f"the reference's log-probabilities of every pair are cached in {cache.folder}")
    trained, *held_out = (
        reference_cache.of_pairs(
            cache, pairs, heeding, run.place, reference=asked.path, row=functools.partial(_row, one)
        )
        for one, pairs in zip((run.parts, *run.held_out), (run.examples, *sets), strict=True)
    )
    off = reference_cache.check(cache, run.examples, ask, run.place, dtype)
    leaves = "" if asked.of_policy and run.adapting else "; the reference leaves memory"
    say(f"recomputed a sample of pairs: maximum difference {off:.2g} nats{leaves}")
    count = 1 + max(pair.row for pair in run.examples)
    table = np.zeros((count, run.place.shape.answers), np.float32)
    table[[pair.row for pair in run.examples]] = trained

    def of_batch(batch: Packed, rows: np.ndarray) -> Array:
        slots = np.zeros(batch.scored.shape, np.float32)
        slots[: len(rows)] = table[rows]
        return batches.put_replicated(slots, run.place)

    return Reference(known, of_batch, held_out, None, samples)


def at_step(initial: Reference, policy: Policy, forward: logps.Compiled, state: State) -> Reference:
    """The reference at this step of the run: the initial one, unless it follows the policy.

    Held-out log-probabilities of one that follows are computed by `held_out_at_step`.
    """
    theirs = optimizer.reference_of(state.opt_state)
    if theirs is None:
        return initial
    weights = adapted.joined(logps.cast_for_compute(theirs, policy.blank), state.frozen)
    ask = functools.partial(forward, policy.graph, weights)
    model = nnx.merge(policy.graph, nnx.State(weights))
    return Reference(FOLLOWS, lambda batch, _: ask(batch), [], model, weights=weights)


def held_out_at_step(
    initial: Reference,
    policy: Policy,
    forward: logps.Compiled,
    state: State,
    run: Run,
    stop: Callable[[], bool],
) -> list[np.ndarray]:
    """Log-probabilities [pairs, A] of each held-out set under the reference at this step.

    Raises:
      StopRequested: the run is asked to stop meanwhile.
    """
    if optimizer.reference_of(state.opt_state) is None:
        return initial.held_out
    of_batch = at_step(initial, policy, forward, state).of_batch
    ask = preemption.heeding(stop, lambda batch: of_batch(batch, np.zeros(0)))
    return [logps.of_examples(ask, held_out.examples, run.place) for held_out in run.held_out]


def _row(of: list[Part] | HeldOut, pair: Example) -> str:
    """Which row of its source a pair is from, training data or held out, for a sentence."""
    if isinstance(of, HeldOut):
        return f"row {pair.row - of.first_row} of {of.name}"
    (i,) = mixture.part_of(of, np.array([pair.row])).tolist()
    return f"row {pair.row - mixture.first_rows(of)[i]} of {of[i].name}"


def _not_yet(*_: object) -> Array:
    raise AssertionError("a reference that follows the policy is asked through `at_step`")


def _none(run: Run) -> Reference:
    """Stands in for a reference if no loss uses one: log-ratios are log-probabilities."""
    shape = run.place.shape
    nothing = batches.put_replicated(
        np.zeros((shape.examples, shape.answers), np.float32), run.place
    )
    held_out = [np.zeros((len(one.examples), shape.answers), np.float32) for one in run.held_out]
    return Reference("none", lambda *_: nothing, held_out, None)


def _weights(asked: Beside, policy: Policy, run: Run) -> tuple[nnx.GraphDef, Params]:
    """The reference's graph and weights; if they are like the policy's, one program runs both."""
    if asked.of_policy and run.chosen is not None:
        say(f"reading the reference: the trained weights as they are in {asked.path}")
        theirs = zoo.folders.read(run.blank, run.chosen, policy.blank.dtype)
        return policy.graph, adapted.joined(theirs, policy.frozen)
    if asked.of_policy:
        assert policy.begun is not None
        base = asked.mode == "base"
        say("the reference: the policy " + ("without its adapters" if base else "as it starts"))
        theirs = adapters.nothing(policy.begun, policy.frozen) if base else policy.begun
        return policy.graph, adapted.joined(theirs, policy.frozen)
    say(f"reading the reference: {asked.path}")
    graph, state = nnx.split(load(asked, policy.blank, run))
    weights = nnx.to_pure_dict(state)
    if graph != policy.graph:
        return graph, weights
    weights = partly.like(weights, policy.frozen)
    if policy.begun is not None:
        weights = adapters.alike(weights, policy.frozen)
        weights = adapted.joined(adapters.nothing(policy.begun, weights), weights)
    return policy.graph, weights


def load(asked: Beside, policy: zoo.Model, run: Run | Scoring) -> zoo.Model:
    """The reference in the compute dtype, from HF weights or from the newest checkpoint of a run.

    `policy` may have no weights.

    Raises:
      FileNotFoundError: there is no such model, or no checkpoint in that run.
      ValueError: the weights do not fit or are not finite, or the reference has another vocabulary
        than the policy.
    """
    path, dtype = asked.path, policy.dtype
    if not asked.is_hf:
        whole = zoo.abstract(policy.config, np.float32, dtype, run.computing.mesh)
        _like(whole, policy)
        return _of_run(places.at(path, "--config.reference_model_path"), whole)
    assert run.reference is not None  # it is looked up where one is asked for
    model = zoo.load(run.reference, dtype=dtype, mesh=run.computing.mesh)
    zoo.check_finite(model)
    _like(model, policy)
    if model.config.vocab_size != policy.config.vocab_size:
        raise BadInput(
            f"the reference {path} has {model.config.vocab_size} token ids and the policy "
            f"{policy.config.vocab_size}: both must have the same tokenizer"
        )
    return model


def _like(model: zoo.Model, policy: zoo.Model) -> None:
    """Sets the model to compute like the policy, so that one program is compiled for both."""
    model.attention = policy.attention
    model.remat, model.remat_layers = policy.remat, policy.remat_layers


def _refuse_parts(facts: Facts, directory: places.Place) -> None:
    settings = facts.get("settings", {})
    held, merged = "its adapters", "-merged (which --config.adapter.export=merged writes there)"
    if settings.get("trainable") is not None:
        held, merged = "the weights that it trains", ""
    elif settings.get("adapter.rank") is None and settings.get("adapter.path") is None:
        return
    raise BadInput(
        f"the checkpoints of the run in {directory} only hold {held}, not a whole model: set "
        f"--config.reference_model_path to its export, {directory}/hf/step-N{merged}, and "
        "--config.reference_is_hf=true"
    )


def _of_run(directory: places.Place, policy: zoo.Model) -> zoo.Model:
    graph, state = nnx.split(policy)
    like = {"policy": nnx.to_pure_dict(state)}
    with RunStore(directory.within("checkpoints"), keep=None) as store:
        try:
            saved = store.newest(lambda facts: _refuse_parts(facts, directory), like)
        except OSError as error:
            raise BadInput(
                f"no checkpoint of the run in {directory} can be read as a model like "
                "initialize_from_hf: is it a run of another model?"
            ) from error
    if saved is None:
        raise NotFound(f"the run in {directory} has no checkpoint yet")
    return nnx.merge(graph, nnx.State(logps.cast_for_compute(saved.trees["policy"], policy)))

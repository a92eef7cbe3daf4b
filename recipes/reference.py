"""The frozen reference: read afresh at every start, known by its fingerprint, and the gates.

`resident`, its weights stay on the devices and it is asked in every step; `cached`, it is asked
once for every pair, the answers are kept on disk, and it leaves memory.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import ml_collections
import numpy as np

from checkpoints_io import places
from checkpoints_io.bits import fingerprint
from checkpoints_io.errors import BadInput, NotFound, RunFailed
from checkpoints_io.run_state import RunStore
from recipes import logps, reference_cache, settings, stopping
from recipes.data import batches
from recipes.data.batches import Place, Update
from recipes.data.packing import Packed
from recipes.logps import Forward
from recipes.prepare import Run, say
import zoo
from zoo import attention


class Reference(NamedTuple):
    """What a run needs of its reference."""

    fingerprint: str
    of_batch: Callable[[Packed, np.ndarray], Float[Array, "P A"]]  # micro-batch, rows in the source
    held_out: list[np.ndarray]  # log-probabilities [pairs, A] of each held-out set, in nats
    model: zoo.Model | None  # none when it has left memory


def ready(
    config: ml_collections.ConfigDict,
    policy: zoo.Model,
    run: Run,
    forward: Callable[[nnx.GraphDef, Any, Packed], Array],
    stop: Callable[[], bool],
) -> Reference:
    """Reads the reference and asks it what can be asked before the first step.

    Raises:
      Asked: the run is asked to stop meanwhile.
      FileNotFoundError, ValueError: as `load`.
      RuntimeError: what was kept of it is not what it says now.
    """
    say(f"reading the reference: {settings.reference_path(config)}")
    model = load(config, policy, run.mesh)
    graph, state = nnx.split(model)
    if graph == (ours := nnx.graphdef(policy)):
        graph = ours  # equal, and now one program runs both
    frozen = nnx.to_pure_dict(state)
    ask = functools.partial(forward, graph, frozen)
    heeding = stopping.heeding(stop, ask)
    known = fingerprint(frozen)
    sets = [held_out.pairs for held_out in run.held_out]
    if config.reference_mode == "resident":
        held_out = [logps.of_pairs(heeding, pairs, run.place) for pairs in sets]
        return Reference(known, lambda batch, _: ask(batch), held_out, model)

    cache = reference_cache.opened(
        run.reference_cache, fingerprint=known, compute=policy.dtype,
        attention=attention.backend_of(model.config, policy.dtype, policy.attention),
    )  # fmt: skip
    say(f"asking the reference, or {cache.folder}, about every pair")
    trained, *held_out = (
        reference_cache.of_pairs(cache, pairs, heeding, run.place) for pairs in (run.pairs, *sets)
    )
    off = reference_cache.check(cache, run.pairs, ask, run.place, policy.dtype)
    say(f"worked out again, {off:.2g} nats apart at most; the reference leaves memory")
    table = np.zeros((1 + max(pair.row for pair in run.pairs), 2), np.float32)
    table[[pair.row for pair in run.pairs]] = trained

    def of_batch(batch: Packed, rows: np.ndarray) -> Array:
        slots = np.zeros((len(batch.is_pair), 2), np.float32)
        slots[: len(rows)] = table[rows]
        return batches.everywhere(slots, run.place)

    return Reference(known, of_batch, held_out, None)


def load(
    config: ml_collections.ConfigDict, policy: zoo.Model, mesh: jax.sharding.Mesh
) -> zoo.Model:
    """The reference in the compute dtype, from HF weights or from the newest checkpoint of a run.

    `policy` may be without weights.

    Raises:
      FileNotFoundError: there is no such model, or no checkpoint in that run.
      ValueError: the weights do not fit or are not finite, or the reference has another vocabulary
        than the policy.
    """
    path, dtype = settings.reference_path(config), policy.dtype
    if not config.reference_is_hf:
        return _of_run(places.at(path, "--config.reference_model_path"), policy)
    model = zoo.load(path, dtype=dtype, mesh=mesh)
    zoo.check_finite(model)
    model.attention, model.remat = policy.attention, policy.remat
    if model.config.vocab_size != policy.config.vocab_size:
        raise BadInput(
            f"the reference {path} has {model.config.vocab_size} token ids and the policy "
            f"{policy.config.vocab_size}: they must share a tokenizer"
        )
    return model


def _of_run(directory: places.Place, policy: zoo.Model) -> zoo.Model:
    graph, state = nnx.split(policy)
    like = {"policy": nnx.to_pure_dict(state)}
    with RunStore(directory.within("checkpoints"), keep=None) as store:
        try:
            saved = store.newest(lambda _: None, like)
        except OSError as error:
            raise BadInput(
                f"no checkpoint of the run in {directory} can be read as a model like "
                "initialize_from_hf: is it a run of another model?"
            ) from error
    if saved is None:
        raise NotFound(f"the run in {directory} has no checkpoint yet")
    return nnx.merge(graph, nnx.State(cast(saved.trees["policy"], policy.dtype)))


@functools.partial(jax.jit, static_argnums=1)
def cast(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Every weight in `dtype`, where it is."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def equal_weights(policy: Any, frozen: str, compute: jax.typing.DTypeLike) -> bool:
    """Is the policy, in the compute dtype, the reference bit for bit? By its fingerprint."""
    return fingerprint(cast(policy, compute)) == frozen


def check_logps(
    policy: Forward, reference: Reference, update: Update, place: Place, dtype: Any
) -> None:
    """The gate before the first step: equal weights through one program are equal, bit for bit.

    What was kept of the reference was packed otherwise, and is held to rounding.

    Raises:
      RuntimeError: they are not, so the two do not see the same thing; or they are not finite.
    """
    batch = batches.put(update.micro_batches[0], place)
    here = update.micro_batches[0].is_pair
    ours = np.asarray(policy(batch))[here]
    theirs = np.asarray(reference.of_batch(batch, update.rows))[here]
    if not np.isfinite(ours).all():
        raise RunFailed(_not_finite("log-probabilities of the first pairs are", dtype))
    bound = 0 if reference.model else reference_cache.bound(theirs, dtype)
    if not (np.abs(ours - theirs) <= bound).all():
        raise RunFailed(
            "policy and reference have equal weights and give different log-probabilities (by up "
            f"to {np.abs(ours - theirs).max():.3g} nats): the run would not train what it says; "
            "please report it"
        )


def _not_finite(what: str, compute: jax.typing.DTypeLike) -> str:
    """Of weights that are all finite: `zoo.check_finite` has seen them."""
    wider = "" if compute == jnp.float32 else " Or compute in float32: --config.mp=p=f32,c=f32"
    return (
        f"the {what} not finite (NaN or infinity), though every weight is: the model overflows in "
        f"{np.dtype(compute).name}. Is it the right checkpoint (python -m zoo FOLDER)?{wider}"
    )


def check_first_loss(loss: float, compute: jax.typing.DTypeLike, beta: float) -> None:
    """The gate after the first step: before anything was learnt the loss is ln 2.

    Raises:
      RuntimeError: it is not.
    """
    if not math.isfinite(loss):
        raise RunFailed(_not_finite("loss of the first update is", compute))
    # With remat the training program may round otherwise than the reference's; beta scales that.
    bound = (1e-5 if compute == jnp.float32 else 5e-3) * max(1.0, 10 * beta)
    if not abs(loss - math.log(2)) <= bound:
        raise RunFailed(
            f"the first loss is {loss:.6f} and should be ln 2 = 0.693147 within {bound:.1g}: the "
            "training program and the reference disagree; please report it"
        )

"""LoRA in a notebook: adds adapters to a model, and splits it into trained and frozen weights."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math

from flax import nnx
import jax
from jaxtyping import PyTree
import numpy as np

from checkpoints_io.errors import BadInput
from zoo import adapters
from zoo import targets as choosing
from zoo.models import Model, refuse_other, refuse_seed
from zoo.parts import adapted

Number = int | float | np.integer | np.floating


def with_adapters(
    model: Model,
    *,
    rank: int | np.integer,
    alpha: Number | None = None,
    targets: Sequence[str] | str = (choosing.ALL_LINEAR,),
    exclude: Sequence[str] | str = (),
    layers: Iterable[int | np.integer] | int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, Number] | None = None,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
) -> Model:
    """Adds new adapters to a model, in float32, without changing its logits yet.

    The arguments mean what they mean in PEFT's `LoraConfig`, which calls `layers`
    `layers_to_transform`, and B starts at 0, as it does there; `alpha` defaults to `rank`.

    Example:
      model = zoo.lora.with_adapters(zoo.load(folder), rank=8, targets=["q_proj", "v_proj"])

    Raises:
      ValueError: the model already has adapters, a target names no weight, there is no such layer,
        or a rank or alpha is out of range.
    """
    refuse_other(model, "with_adapters(model, rank=8)")
    refuse_seed(seed)
    rank = _rank("rank", rank)
    alpha = _alpha("alpha", rank if alpha is None else alpha)
    ranks = {name: _rank(name, value) for name, value in (rank_pattern or {}).items()}
    alphas = {name: _alpha(name, value) for name, value in (alpha_pattern or {}).items()}
    numbers = None if layers is None else _numbers(layers)
    for name, given in (("targets", targets), ("exclude", exclude)):
        if not isinstance(given, Iterable):
            raise BadInput(f"{name}={given!r}: names of weights in a list, like ['q_proj']")
    targets, exclude = ((x,) if isinstance(x, str) else tuple(x) for x in (targets, exclude))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    is_one = adapted.is_adapted
    if any(map(is_one, jax.tree.leaves(params, is_leaf=is_one))):
        raise BadInput("the model has adapters: load it without them to give it new ones")
    sites = choosing.sites(model, choosing.Lora(
        rank=rank, alpha=alpha, targets=targets, exclude=exclude, layers=numbers,
        rank_pattern=ranks, alpha_pattern=alphas, rslora=rslora, dora=dora, zero="B",
    ))  # fmt: skip
    frozen = adapters.attached(params, sites)
    trained = adapters.fresh(frozen, adapters.layout(model, sites, dora=dora), zero="B", seed=seed)
    return joined(graph, trained, frozen)


def _rank(name: str, value: int | np.integer) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise BadInput(f"{name}={value!r}: adapters have a whole number of dimensions, like 8")
    return int(value)


def _alpha(name: str, value: Number) -> float:
    if isinstance(value, bool) or not isinstance(value, Number) or not 0 < value < math.inf:
        raise BadInput(f"{name}={value!r}: what adapters add is scaled by a number, like 16")
    return float(value)


def _numbers(layers: Iterable[int | np.integer] | int) -> tuple[int, ...]:
    given = (layers,) if isinstance(layers, int) else tuple(layers)
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in given):
        raise BadInput(f"layers={layers!r}: numbers of layers in a list, like [0, 1]")
    return tuple(map(int, given))


def parted(model: Model) -> tuple[nnx.GraphDef, dict, dict]:
    """Splits a model into its graph, its adapters (trained) and all its other weights (frozen).

    `joined` puts them back together, also inside a loss function.

    Raises:
      ValueError: the model has no adapters.
    """
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    trained = _adapters_of(params)
    if not trained:
        raise BadInput("the model has no adapters: zoo.lora.with_adapters gives it new ones")
    without = lambda x: dataclasses.replace(x, adapter=None) if adapted.is_adapted(x) else x
    return graph, trained, jax.tree.map(without, params, is_leaf=adapted.is_adapted)


def joined(graph: nnx.GraphDef, trained: PyTree, frozen: PyTree) -> Model:
    """Rebuilds the model from the parts that `parted` returns."""
    return nnx.merge(graph, nnx.State(adapted.joined(trained, frozen)))


def _adapters_of(params: PyTree) -> dict:
    found = {}
    for name, value in params.items():
        if adapted.is_adapted(value):
            found[name] = value.adapter
        elif isinstance(value, dict) and (within := _adapters_of(value)):
            found[name] = within
    return found

"""Chooses the weights of a model to quantise: the matrices of its blocks except routers."""

import math

from flax import nnx
import jax
from jaxtyping import PyTree

from checkpoints_io import quantised
from checkpoints_io.errors import BadInput
from checkpoints_io.quantised import Narrow
from zoo import targets
from zoo.models import Model, name_of
from zoo.parts import sharding
from zoo.parts.adapted import is_adapted, lead_of
from zoo.parts.quantised import Quantised, is_quantised


def narrowed(model: Model, kind: str) -> Model:
    """Marks the matrices of an abstract model to be quantised to "int8" or "nf4".

    On several devices their rows are split, where they divide evenly.

    Raises:
      ValueError: there is no such kind, or the model already has weights.
    """
    if kind not in quantised.KINDS:
        raise BadInput(f"frozen={kind!r} is none of {', '.join(quantised.KINDS)}")
    graph, state = nnx.split(model)
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(state)):
        raise BadInput(
            f"the model has weights, which would be lost: zoo.load(folder, frozen={kind!r}) makes "
            "them narrow as it reads them"
        )
    matrices = targets.linear(model)
    made = []
    for path, param in nnx.to_flat_state(state):
        name = name_of(path)
        if name in matrices and not name.endswith("router"):
            into, out = targets.sides(param.axes, matrices[name][1])
            param = param.replace(_room(param, kind, into, out))
        made.append((path, param))
    return nnx.merge(graph, nnx.from_flat_state(made))


def kind_of(model: Model) -> str | None:
    """How the matrices of a model are quantised: "int8" or "nf4"; None: not at all."""
    for param, _ in targets.linear(model).values():
        value = param.get_value()
        value = value.base if is_adapted(value) else value
        if is_quantised(value):
            return value.kind
    return None


def _room(param: PyTree, kind: str, into: str, out: str) -> Quantised:
    size = dict(zip(param.axes.split(), param.shape, strict=True))
    product = lambda letters: math.prod(size[c] for c in letters.split())
    lead, like = lead_of(param.axes, into, out), param.get_value().sharding

    def placed(array: tuple, axes: str) -> jax.ShapeDtypeStruct:
        shape = (*(size[c] for c in lead.split()), *array[0])
        return sharding.placed_as(like, f"{lead} {axes}", shape, array[1])

    codes, *others = quantised.shapes(kind, product(out), product(into))
    rest = [x and placed(x, " ".join("." * len(x[0]))) for x in others]
    axes = param.axes.removeprefix("L ")
    sizes = tuple(size[c] for c in axes.split())
    return Quantised(Narrow(placed(codes, "rows ."), *rest), axes, sizes, into, out)

"""What is trained: all weights of a model, some of them by name, or adapters beside them."""

import difflib
import functools
import re
from typing import NamedTuple

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from checkpoints_io import hf_names
from checkpoints_io.errors import BadInput
from recipes.training import adapting, by_matrix, optimizer
from recipes.training.adapting import Adapting
from recipes.training.by_name import Values
from recipes.training.update import Params
import zoo
from zoo import models, targets
from zoo.parts import layers, partly, text_half
from zoo.parts.adapted import RANK, Adapter

# Weights by our paths, and which of their layers, as they stand in the weight; None: all of it.
Chosen = dict[str, tuple[int, ...] | None]


class Trained(NamedTuple):
    """Trees with the structure of what is trained."""

    like: Params  # shapes and shardings
    decayed: PyTree  # whether it is subject to weight decay
    rates: PyTree | None  # what the learning rate is multiplied by; none: one for all
    sides: PyTree  # how each is matrices (`by_matrix.Sides`)


def of(blank: zoo.Model, adapters: Adapting | None, chosen: Chosen | None) -> Trained:
    """What is trained of a model without weights: adapters, `chosen` weights, or all of them."""
    if adapters is not None:
        decayed = adapting.each(adapters.like, Adapter._make((True, True, False)))
        rates = None
        if adapters.lora_plus != 1:
            each = Adapter._make((1.0, adapters.lora_plus, 1.0))
            rates = adapting.each(adapters.like, each)
        return Trained(adapters.like, decayed, rates, sides_of_adapters(adapters))
    layout = nnx.state(blank)
    like, decayed, sides = nnx.to_pure_dict(layout), optimizer.matrices(layout), sides_of(blank)
    if chosen is None:
        return Trained(like, decayed, None, sides)
    those = functools.partial(_those, chosen)
    return Trained(layout_of(blank, chosen, jnp.float32), those(decayed), None, those(sides))


def _those(chosen: Chosen, tree: PyTree) -> PyTree:
    flat: dict[str, PyTree] = traverse_util.flatten_dict(tree, sep=".")
    return traverse_util.unflatten_dict({path: flat[path] for path in chosen}, sep=".")


def sides_of(blank: zoo.Model) -> PyTree:
    """How the weights of a model are matrices: those of the layers as their products take them.

    What stands side by side in one tensor is several, so that a model learns the same whichever way
    its weights are written; but q, k and v of different sizes (Phi's) are one.
    """
    linear, found = targets.linear(blank), {}
    for path, param in nnx.to_flat_state(nnx.state(blank)):
        name, axes = models.name_of(path), param.get_metadata("axes")
        if name in linear:
            into, out = targets.sides(axes, linear[name][1])
            own = " ".join(letter for letter in out.split() if letter != "J")
            found[name] = by_matrix.sides(axes, into, own, hidden=True)
        elif layers.is_matrix(axes):  # an embedding, positions, or a head
            found[name] = by_matrix.sides(axes, *axes.split(), hidden=False)
        else:
            found[name] = by_matrix.of_vector(axes)
    return traverse_util.unflatten_dict(found, sep=".")


def sides_of_adapters(adapters: Adapting) -> PyTree:
    """The `Sides` of adapters: A and B are each a matrix of every layer."""
    like: dict[str, PyTree] = traverse_util.flatten_dict(adapters.like, sep=".")
    found = {}
    for site in adapters.sites:
        a, b = f"{site.lead} {site.into} {RANK}", f"{site.lead} {RANK} {site.out}"
        found[site.path] = Adapter(
            by_matrix.sides(a, site.into, RANK, hidden=True),
            by_matrix.sides(b, RANK, site.out, hidden=True),
            None
            if like[site.path].magnitude is None
            else by_matrix.of_vector(f"{site.lead} {site.out}"),
        )
    return traverse_util.unflatten_dict(found, sep=".")


def chosen(given: Values, blank: zoo.Model) -> Chosen | None:
    """The weights that are trained by name, if not all are.

    Raises:
      ValueError: as `matching`.
    """
    return None if given["trainable"] is None else matching(blank, given["trainable"])


def layout_of(blank: zoo.Model, some: Chosen, dtype: jax.typing.DTypeLike) -> Params:
    """Shapes and shardings of some weights of a model without weights."""
    weights = nnx.to_pure_dict(nnx.state(blank))
    flat: dict[str, PyTree] = traverse_util.flatten_dict(weights, sep=".")
    cut = lambda x, layers: x.shape if layers is None else (len(layers), *x.shape[1:])
    placed = {
        path: jax.ShapeDtypeStruct(cut(flat[path], layers), dtype, sharding=flat[path].sharding)
        for path, layers in some.items()
    }
    return traverse_util.unflatten_dict(placed, sep=".")


def others(blank: zoo.Model, chosen: Chosen) -> Chosen:
    """What is frozen if these weights are trained."""
    left: Chosen = {}
    for path, param in nnx.to_flat_state(nnx.state(blank)):
        layers = chosen.get(name := models.name_of(path), ())
        if layers is not None:
            rest = tuple(n for n in range(param.shape[0]) if n not in layers)
            left[name] = rest if layers else None
    return left


def frozen(blank: zoo.Model, chosen: Chosen, dtype: jax.typing.DTypeLike) -> Params:
    """Reads what is not trained; a weight with both has room for its trained layers.

    Raises:
      FileNotFoundError, ValueError: as `zoo.folders.read`.
    """
    return with_room(zoo.folders.read(blank, others(blank, chosen), dtype), chosen)


def with_room(weights: Params, chosen: Chosen) -> Params:
    """Frozen weights, or their shapes, with room for the layers of them that are trained."""
    flat: dict[str, PyTree] = traverse_util.flatten_dict(weights, sep=".")
    for path in flat.keys() & chosen.keys():
        layers, value = chosen[path], flat[path]
        assert layers is not None
        slot: PyTree = partly.slots(layers, len(layers) + value.shape[0])
        where = value.sharding
        if isinstance(where, jax.NamedSharding):
            where = jax.NamedSharding(where.mesh, jax.P())
        if isinstance(value, jax.ShapeDtypeStruct):
            slot = jax.ShapeDtypeStruct(slot.shape, slot.dtype, sharding=where)
        else:
            slot = jax.make_array_from_callback(slot.shape, where, lambda at, slot=slot: slot[at])
        flat[path] = partly.Partly(value, slot)
    return traverse_util.unflatten_dict(flat, sep=".")


def matching(blank: zoo.Model, pattern: str) -> Chosen:
    """The weights whose names in the Hugging Face files match the pattern, whole.

    Raises:
      ValueError: it matches none or all of them, some experts of a layer, or a tied head alone.
    """
    said = f"--config.trainable={pattern!r}"
    try:
        fits = re.compile(pattern).fullmatch
    except re.error as error:
        raise BadInput(f"{said} is not a valid regular expression: {error}") from error
    table, hf = models.hf_table(blank), models.said_of(blank)
    params = {models.name_of(path): x for path, x in nnx.to_flat_state(nnx.state(blank))}
    head, embedding = table["head"].name, table["embedding"].name
    if "head" not in params and fits(head) and not fits(embedding):
        raise BadInput(
            f"{said}: {head} of this model is tied to {embedding}: name that one instead"
        )
    names = {
        path: [name for _, name in hf_names.of(table[path], x.shape)] for path, x in params.items()
    }
    chosen: Chosen = {}
    for path, own in names.items():
        met = [any(map(fits, text_half.spellings(hf, name))) for name in own]
        if not any(met):
            continue
        by_layer = np.reshape(met, (params[path].shape[0] if len(own) > 1 else 1, -1))
        if (by_layer.any(1) != by_layer.all(1)).any():
            raise BadInput(
                f"{said} matches {own[met.index(True)]} but not {own[met.index(False)]}: train "
                "either all experts of a layer or none"
            )
        chosen[path] = None if all(met) else tuple(map(int, np.flatnonzero(by_layer.all(1))))
    if not chosen:
        raise BadInput(f"{said} matches no weight of the model{_near(pattern, names)}")
    if len(chosen) == len(names) and not any(chosen.values()):
        raise BadInput(f"{said} matches every weight, which is the default: leave it out")
    return chosen


def _near(pattern: str, names: dict[str, list[str]]) -> str:
    """A suggestion of what may have been meant."""
    every = [own[0] for own in names.values()]
    if within := [name for name in every if re.search(pattern, name)]:
        return f" (names are matched as a whole, e.g. {within[0]}): did you mean .*{pattern}.*?"
    ends = {re.sub(r"^.*\.(?=[^.]+\.[^.]+$)", "", name): name for name in every}
    word = re.sub(r"[^\w.]|\.\*", "", pattern)
    near = [ends[end] for end in difflib.get_close_matches(word, ends, 2, 0.5)]
    return f" (did you mean {' or '.join(near)}?)" if near else f", like {every[0]}"

"""What micro-batches take of a device's memory: how long they may be, and what layers may keep."""

import collections
from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_io import processes
from recipes.data.packed.packing import Shape
import zoo
from zoo import models, narrow
from zoo.parts import blocks, sharding, spans, stack, token_logps

# Positions of a micro-batch, per device, that are enough to keep a device busy.
ENOUGH = {"cpu": 2**12}
ROW = 2**11  # a row as long as most
USED = 0.9  # of a device's memory, by what is counted here: compilers want some of their own
# Of what one layer makes in the backward pass this much is there at a time: as gradients come, it
# goes; those of all states of a recurrence come at once.
AT_WORK, AT_WORK_RECURRENT = 1.0, 1.7


class Remat(NamedTuple):
    """What layers keep for the backward pass: see `zoo.parts.remat`."""

    policy: str
    layers: int | None = None  # the last so many, the others keep attention alone; None: all
    kept: int = 0  # bytes of a device, by this count


def device_here() -> tuple[float | None, str]:
    """Bytes that a device here may use, the same in all processes, and its platform.

    Bytes are None where devices do not say: CPUs.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return float(processes.of_first(np.array(limit, np.float32))) or None, device.platform


def most_positions(model: zoo.Model, held: int, memory: float | None, platform: str) -> int:
    """Positions a device may compute at a time: what fits its memory, but no more than enough.

    `held` are the bytes that stay allocated through an update: the sum of `plan.memory`.
    More than enough is no faster: the products are large, and the padding grows.
    """
    most = ENOUGH.get(platform, 2**14)
    if memory is None:
        return most
    while most > 512 and held + layer_bytes(model, most).needed > USED * memory:
        most //= 2
    return most


def remat(model: zoo.Model, shape: Shape, held: int, memory: float | None) -> Remat:
    """The most that layers may keep in the memory that micro-batches of this shape leave.

    The output of attention first, which spares the most for its bytes, then products, of as many
    layers as there is room for. Where memory is not known it is nothing: CPUs make small products
    again in less time than they take to write and read them.
    """
    if memory is None:
        return Remat("full")
    positions = shape.rows * shape.row_length // shape.shards // shape.context
    each, count = layer_bytes(model, positions), model.config.sizes["L"]
    left = int(USED * memory) - held - each.needed
    if left < count * each.attention:
        return Remat("full")
    layers = min((left - count * each.attention) // max(each.products, 1), count)
    if layers < count / 8:  # the second loop would have to be compiled for little
        named = each.attention > 0
        return Remat("attention", None, count * each.attention) if named else Remat("full")
    kept = count * each.attention + layers * each.products
    return Remat("products", None if layers == count else layers, kept)


class LayerBytes(NamedTuple):
    """Of a device: what all layers together need if nothing is kept, and what one may keep."""

    needed: int  # what enters each, what one at work makes, logits, and weights' copies
    attention: int  # of the kind of layer that has the most
    products: int  # beside that


def layer_bytes(model: zoo.Model, positions: int) -> LayerBytes:
    """Worked out from the shapes of so many positions of a device; nothing is computed."""
    graph, state = nnx.split(model)
    T, sizes, config = min(positions, ROW), sharding.axes_here(), model.config
    shards, parts = sizes.get("data", 1) * sizes.get("fsdp", 1), sizes.get("context", 1)
    tokens = jax.ShapeDtypeStruct((shards * max(positions // T, 1), T * parts), jnp.int32)
    found: dict[str, dict[str, list[jax.Array]]] = {}

    def through(state: nnx.State, tokens: jax.Array) -> jax.Array:
        where = spans.causal(tokens.shape[0], tokens.shape[1])
        return nnx.merge(graph, state).hidden(tokens, where, stack.measuring(found))

    jax.eval_shape(through, state, tokens)
    weights = nnx.to_flat_state(nnx.state(model.blocks))
    of_weights = {param.get_value().shape[1:] for _, param in weights}
    tensor = _mesh_of(model).get("tensor", 1)
    # Devices along `tensor` share what is not as wide as the model.
    own = lambda x: 1 if x.shape[-1:] == (config.sizes["D"],) else tensor
    size = lambda arrays: sum(x.nbytes // own(x) for x in arrays if x.shape not in of_weights)
    of = lambda policy: max(size(kept[policy]) for kept in found.values()) // (shards * parts)
    entering = positions * config.sizes["L"] * config.sizes["D"] * np.dtype(model.dtype).itemsize
    at_work = AT_WORK_RECURRENT if models.recurrent(model) else AT_WORK
    logits = min(token_logps.logits_bytes(), 4 * positions * config.sizes["V"] // tensor)
    needed = entering + int(at_work * of("none")) + logits + _weight_bytes(model)
    return LayerBytes(needed, of("attention"), of("products") - of("attention"))


def _weight_bytes(model: zoo.Model) -> int:
    """Of one layer, and of the vocabulary's: as they are computed with, and their gradients."""
    mesh, width = _mesh_of(model), np.dtype(model.dtype).itemsize
    is_gathered = mesh.get("fsdp", 1) * mesh.get("context", 1) > 1
    is_trained = model.embedding.get_value().dtype != model.dtype  # in float32
    in_layer, rest = collections.Counter(), 0
    for path, param in nnx.to_flat_state(nnx.state(model)):
        value = param.get_value()
        if path[0] == stack.STACKS:
            in_layer[path[1] if model.config.kinds else blocks.ALIKE] += (
                value.size // value.shape[0]
            )
        else:
            rest += value.size
    layer = max(in_layer.values())
    is_copied = is_trained or is_gathered or narrow.kind_of(model) is not None
    # The next layer's weights are gathered while one is at work.
    copies = width * (layer * (1 + is_gathered) + rest * (is_trained or is_gathered)) * is_copied
    return (copies + 4 * (layer + rest) * is_trained) // mesh.get("tensor", 1)


def _mesh_of(model: zoo.Model) -> Mapping[str, int]:
    """The sizes of the mesh that a model's weights are laid out on, if they are on any."""
    mesh = getattr(model.embedding.get_value().sharding, "mesh", None)
    return dict(mesh.shape) if mesh else {}

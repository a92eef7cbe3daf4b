"""What micro-batches take of a device's memory: how long they may be, and what layers may keep."""

from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_io import processes
from recipes.data.packed.packing import Shape
from recipes.training.update import Params
import zoo
from zoo import models, narrow
from zoo.parts import blocks, pattern, sharding, spans, stack, token_logps
from zoo.parts import remat as policies

# Positions of a micro-batch, per device, that are enough to keep a device busy.
ENOUGH = {"cpu": 2**12}
ROW = 2**11  # a row as long as most
# Of a device's memory, by what is counted here: for what must be there, and with what may be kept.
MOST, USED = 0.95, 0.9
# Of what one layer makes in the backward pass this much is there at a time: as gradients come, it
# goes; those of all states of a recurrence come at once.
AT_WORK, AT_WORK_RECURRENT = 1.0, 1.7


class Remat(NamedTuple):
    """What layers keep for the backward pass: see `zoo.parts.remat`."""

    policy: str
    layers: int | None = None  # the last so many, the others keep attention alone; None: all
    kept: int = 0  # bytes of a device, by this count


class LayerBytes(NamedTuple):
    """Bytes that the layers take on one device."""

    needed: int  # what enters each layer, what one at work makes, logits, copies of weights
    kept: dict[str, dict[str, int]]  # by a layer, by its kind and by policy

    def of(self, parts: list[tuple[pattern.Part, str]]) -> int:
        """Bytes that layers keep with these policies."""
        kept = lambda part, policy: sum(self.kept[kind][policy] for kind in part.kinds)
        return sum(part.times * kept(part, policy) for part, policy in parts)


def device_here() -> tuple[float | None, str]:
    """Bytes that a device here may use, the same in all processes, and its platform.

    Bytes are None where devices do not say: CPUs.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return float(processes.of_first(np.array(limit, np.float32))) or None, device.platform


def most_positions(
    model: zoo.Model, trained: Params, held: int, memory: float | None, platform: str
) -> int:
    """Positions a device may compute at a time: what fits its memory, but no more than enough.

    `held` are the bytes that stay allocated through an update: the sum of `plan.memory`. More than
    enough is no faster: the products are large, and the padding grows.
    """
    most = ENOUGH.get(platform, 2**14)
    if memory is None:
        return most
    needed = lambda most: layer_bytes(model, trained, max(most // ROW, 1), min(most, ROW)).needed
    while most > 512 and held + needed(most) > MOST * memory:
        most //= 2
    return most


def keeping(
    model: zoo.Model,
    asked: str | None,
    trained: Params,
    shape: Shape,
    held: int,
    memory: float | None,
) -> Remat:
    """Has layers of the model keep what is `asked`, or else what fits; and says what that is."""
    kept = remat(model, trained, shape, held, memory) if asked is None else Remat(asked)
    model.remat, model.remat_layers, _ = kept
    return kept


def remat(
    model: zoo.Model, trained: Params, shape: Shape, held: int, memory: float | None
) -> Remat:
    """The most that layers may keep in the memory that micro-batches of this shape leave.

    The output of attention first, which spares the most for its bytes, then products, of as many
    layers as there is room for. Where memory is not known it is nothing: CPUs make small products
    again in less time than they take to write and read them.
    """
    if memory is None:
        return Remat("full")
    row = shape.row_length // shape.context
    each = layer_bytes(model, trained, shape.rows // shape.shards, row)
    left, parts = int(USED * memory) - held - each.needed, blocks.parts_of(model)
    count = model.config.sizes["L"]
    for asked in range(count, 0, -1):
        found = policies.by_part(parts, "products", asked)
        layers = sum(p.times * len(p.kinds) for p, policy in found if policy == "products")
        # For a few of many the second loop would have to be compiled for little.
        if layers >= count / 8 and each.of(found) <= left:
            return Remat("products", None if layers == count else layers, each.of(found))
    kept = each.of(policies.by_part(parts, "attention", None))
    return Remat("attention", None, kept) if 0 < kept <= left else Remat("full")


def layer_bytes(model: zoo.Model, trained: Params, rows: int, T: int) -> LayerBytes:
    """Bytes of a layer, computed from the shapes of `rows` of T tokens on each device."""
    graph, state = nnx.split(model)
    here, config = sharding.axes_here(), model.config
    shards, parts = here.get("data", 1) * here.get("fsdp", 1), here.get("context", 1)
    tokens = jax.ShapeDtypeStruct((shards * rows, T * parts), jnp.int32)
    found = stack.Measured({}, [])

    def through(state: nnx.State, tokens: jax.Array) -> jax.Array:
        where = spans.causal(tokens.shape[0], tokens.shape[1])
        return nnx.merge(graph, state).hidden(tokens, where, stack.measuring(found))

    jax.eval_shape(through, state, tokens)
    weights = nnx.to_flat_state(nnx.state(model.blocks))
    of_weights = {param.get_value().shape[1:] for _, param in weights}
    tensor = _mesh_of(model).get("tensor", 1)
    split = _split_sizes(model, tensor) - {T * parts}
    own = lambda x: tensor if split.intersection(x.shape[1:]) else 1
    size = lambda arrays: sum(x.nbytes // own(x) for x in arrays) // (shards * parts)
    kept = {
        kind: {
            policy: size([x for x in arrays if x.shape not in of_weights])
            for policy, arrays in by_policy.items()
        }
        for kind, by_policy in found.kept.items()
    }
    positions, sizes = rows * T, config.sizes
    entering = positions * sizes["L"] * sizes["D"] * np.dtype(model.dtype).itemsize
    at_work = AT_WORK_RECURRENT if models.recurrent(model) else AT_WORK
    at_work *= max(by_policy["none"] for by_policy in kept.values())
    logits = min(token_logps.logits_bytes(sizes["V"]), 4 * positions * sizes["V"] // tensor)
    beside = 2 * size(found.beside)  # and their gradients
    needed = entering + int(at_work) + beside + logits + _weight_bytes(model, trained)
    return LayerBytes(needed, kept)


def _weight_bytes(model: zoo.Model, trained: Params) -> int:
    """Bytes for a layer and the head: copies to compute with, and gradients of what is trained."""
    mesh, width = _mesh_of(model), np.dtype(model.dtype).itemsize
    is_gathered = mesh.get("fsdp", 1) * mesh.get("context", 1) > 1
    in_layer = dict.fromkeys(model.config.kinds or (blocks.ALIKE,), 0)
    for path, param in nnx.to_flat_state(nnx.state(model.blocks)):
        value, kind = param.get_value(), str(path[0]) if model.config.kinds else blocks.ALIKE
        in_layer[kind] += value.size // value.shape[0]
    layer, head = max(in_layer.values()), model.embedding.get_value().size
    others, stacks = stack.split(trained)
    # Of embedding and head one after the other.
    learnt = max((x.size for x in jax.tree.leaves(others)), default=0)
    by_kind = [(stacks or {}).get(kind) if kind else stacks for kind in in_layer]
    learnt += max(sum(x.size // x.shape[0] for x in jax.tree.leaves(kind)) for kind in by_kind)
    copied = learnt if model.dtype != jnp.float32 else 0
    if is_gathered:  # and the next layer's, while one is at work
        copied = 2 * layer + head
    elif narrow.kind_of(model) is not None:
        copied += layer
    return (width * copied + 4 * learnt) // mesh.get("tensor", 1)


def _split_sizes(model: zoo.Model, tensor: int) -> set[int]:
    """The sizes of axes that devices along `tensor` share: those that divide evenly."""
    config = model.config
    every = [config.sizes, *map(config.sizes_of, set(config.kinds))]
    return {
        size
        for sizes in every
        for letter, size in sizes.items()
        if "tensor" in sharding.STORED.get(letter, ()) and size % tensor == 0
    }


def _mesh_of(model: zoo.Model) -> Mapping[str, int]:
    """The sizes of the mesh that a model's weights are laid out on, if they are on any."""
    mesh = getattr(model.embedding.get_value().sharding, "mesh", None)
    return dict(mesh.shape) if mesh else {}

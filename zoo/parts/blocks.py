"""The stacked blocks of a model, with a leading L axis, and the application of one layer.

Layers are all alike, or of several kinds that repeat in a pattern, with one stack per kind.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from checkpoints_io.errors import BadInput
from zoo.parts import hf_config, partly, pattern, sharding

Weights = dict[str, PyTree]  # arrays by name, each with a leading L axis
ByKind = dict[str, PyTree]  # one tree per kind of layer
Entering = tuple[Array, PyTree]  # the inputs of a layer: x, and what earlier layers handed on

ALIKE = ""  # the kind of every layer of a model whose layers are all alike


@runtime_checkable
class Stacked(Protocol):
    """The attributes that `stack.run` needs of a model; every CausalLM has them."""

    blocks: nnx.Module
    config: hf_config.Config
    attention: str | None
    remat: str
    remat_layers: int | None


class Layout(NamedTuple):
    """The graph of each kind of block, and the order of the layers."""

    graphs: tuple[tuple[str, nnx.GraphDef], ...]
    parts: tuple[pattern.Part, ...]


def parts_of(model: Stacked) -> tuple[pattern.Part, ...]:
    """The patterns that a model's layers form."""
    return pattern.schedule(model.config.kinds or (ALIKE,) * model.config.sizes["L"])


def taken_apart(model: Stacked) -> tuple[Layout, ByKind]:
    """Splits a model's blocks into their layout and their weights by kind.

    Raises:
      ValueError: the number of blocks differs from the Config's.
    """
    parts = {kind: nnx.split(block) for kind, block in by_kind(model, model.blocks).items()}
    graphs = tuple((kind, graph) for kind, (graph, _) in parts.items())
    weights = {kind: nnx.to_pure_dict(state) for kind, (_, state) in parts.items()}
    for kind, own in weights.items():
        _refuse_other_count(model, kind, own)
    return Layout(graphs, parts_of(model)), weights


def _refuse_other_count(model: Stacked, kind: str, weights: Weights) -> None:
    """Refuses a wrong number of layers: indexing past the end would repeat the last one."""
    count = model.config.kinds.count(kind) if kind else model.config.sizes["L"]
    every = jax.tree.leaves(weights, is_leaf=partly.is_partly)
    if others := {len(x) for x in every if not partly.is_partly(x)} - {count}:
        raise BadInput(
            f"the model has {others.pop()} blocks{f' that are {kind}' if kind else ''}, and by "
            f"model.config {count}: change model.config with them, by dataclasses.replace"
        )


def by_kind(model: Stacked, tree: PyTree) -> ByKind:
    """Wraps per-layer inputs by kind: a model whose layers are all alike has one kind."""
    if not model.config.kinds:
        return {ALIKE: tree}
    return dict.fromkeys(model.config.kinds) | dict(tree or {})


def at(tree: PyTree, n: Array) -> PyTree:
    """Layer n of a tree whose arrays have a leading L axis."""

    def one(x: PyTree) -> Array:
        if isinstance(x, partly.Partly):
            return x.layer(n)
        return jax.lax.dynamic_index_in_dim(x, n, keepdims=False)

    return jax.tree.map(one, tree, is_leaf=partly.is_partly)


def through(layout: Layout, layer: Callable, carry: PyTree) -> tuple[PyTree, list]:
    """Runs `carry, left = layer(carry, kind, n)` for every layer, the n-th of its kind.

    Also returns what the layers left: by part, place in its pattern, and repetition.
    """
    left = []
    for part in layout.parts:

        def repetition(counted: tuple, _: None, part: pattern.Part = part) -> tuple[tuple, list]:
            carry, i = counted
            some = []
            for kind, n in part.layers(i):
                carry, one = layer(carry, kind, n)
                some.append(one)
            return (carry, i + 1), some

        begin = (carry, jnp.zeros((), jnp.int32))
        (carry, _), some = jax.lax.scan(repetition, begin, length=part.times)
        left.append(some)
    return carry, left


def block_of(
    graph: nnx.GraphDef, entering: Entering, weights: Weights, own: PyTree, shared: tuple
) -> Entering:
    """Applies one layer with its weights and, if any, its per-layer inputs."""
    block = nnx.merge(graph, nnx.State(weights))
    (x, handed), more = entering, shared if own is None else (*shared, own)
    x, handed = (block(x, *more), None) if handed is None else block(x, *more, handed=handed)
    return sharding.constrain(x, "B T D"), handed

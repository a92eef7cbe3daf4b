"""The blocks of a model: the weights of like layers with a leading L, and how one is applied.

Layers are all alike, or of several kinds that follow each other in a pattern, each kind a stack of
its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from checkpoints_io.errors import BadInput
from zoo.parts import hf_config, partly, pattern, sharding

Weights = dict[str, PyTree]  # arrays by name, each with a leading L
ByKind = dict[str, PyTree]  # something for each kind of layer
Entering = tuple[Array, PyTree]  # what a layer is given: x, and what earlier ones handed on

ALIKE = ""  # the kind of every layer of a model whose layers are all alike


@runtime_checkable
class Stacked(Protocol):
    """What `run` asks of a model, as every CausalLM has it."""

    blocks: nnx.Module
    config: hf_config.Config
    attention: str | None
    remat: str
    remat_layers: int | None


class Layout(NamedTuple):
    """What the blocks of each kind are, and in which order layers follow."""

    graphs: tuple[tuple[str, nnx.GraphDef], ...]
    parts: tuple[pattern.Part, ...]


def parts_of(model: Stacked) -> tuple[pattern.Part, ...]:
    """The patterns in which a model's layers follow each other."""
    return pattern.schedule(model.config.kinds or (ALIKE,) * model.config.sizes["L"])


def taken_apart(model: Stacked) -> tuple[Layout, ByKind]:
    """The layout of a model's blocks, and their weights by kind.

    Raises:
      ValueError: there are more or fewer of them than its Config says.
    """
    parts = {kind: nnx.split(block) for kind, block in by_kind(model, model.blocks).items()}
    graphs = tuple((kind, graph) for kind, (graph, _) in parts.items())
    weights = {kind: nnx.to_pure_dict(state) for kind, (_, state) in parts.items()}
    for kind, own in weights.items():
        _refuse_other_count(model, kind, own)
    return Layout(graphs, parts_of(model)), weights


def _refuse_other_count(model: Stacked, kind: str, weights: Weights) -> None:
    """A loop over layers would take the last one again for those that are missing."""
    count = model.config.kinds.count(kind) if kind else model.config.sizes["L"]
    every = jax.tree.leaves(weights, is_leaf=partly.is_partly)
    if others := {len(x) for x in every if not partly.is_partly(x)} - {count}:
        raise BadInput(
            f"the model has {others.pop()} blocks{f' that are {kind}' if kind else ''}, and by "
            f"model.config {count}: change model.config with them, by dataclasses.replace"
        )


def by_kind(model: Stacked, tree: PyTree) -> ByKind:
    """What is given for a model's layers, by kind: where all are alike there is one."""
    if not model.config.kinds:
        return {ALIKE: tree}
    return dict.fromkeys(model.config.kinds) | dict(tree or {})


def at(tree: PyTree, n: Array) -> PyTree:
    """One layer of what has a leading L."""

    def one(x: Any) -> Array:
        if isinstance(x, partly.Partly):
            return x.layer(n)
        return jax.lax.dynamic_index_in_dim(x, n, keepdims=False)

    return jax.tree.map(one, tree, is_leaf=partly.is_partly)


def through(layout: Layout, layer: Callable, carry: PyTree) -> tuple[PyTree, list]:
    """`carry, left = layer(carry, kind, n)` for every layer: the n-th of its kind.

    What they left comes too: of each part, for each place of its pattern, by repetition.
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
    """One layer: its weights, and what it has of its own, if anything."""
    block: Callable[..., Any] = nnx.merge(graph, nnx.State(weights))
    (x, handed), more = entering, shared if own is None else (*shared, own)
    x, handed = (block(x, *more), None) if handed is None else block(x, *more, handed=handed)
    return sharding.constrain(x, "B T D"), handed

"""Gradient checkpointing: what a layer saves for its backward pass besides its inputs.

Saving less takes less memory and more time. Recomputing a number of a product costs twice the
input's width in FLOPs, and one of attention's output more; saving it costs 2 or 4 bytes. What lies
between products is cheap to recompute.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree

from zoo.parts import pattern

ATTENTION, PRODUCT = "attention", "product"  # names of values that may be saved
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "products": jax.checkpoint_policies.save_only_these_names(ATTENTION, PRODUCT),
    "none": jax.checkpoint_policies.everything_saveable,
}

as_attention = functools.partial(checkpoint_name, name=ATTENTION)
as_product = functools.partial(checkpoint_name, name=PRODUCT)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("pull", "places")
)
@dataclasses.dataclass(frozen=True)
class Kept:
    """The residuals of a backward pass, without the arrays that are inputs of the layer."""

    arrays: list[Array]
    pull: object  # the tree of its leaves
    places: tuple[int | None, ...]  # of each leaf among those of what was given


def by_part(
    parts: Sequence[pattern.Part], policy: str, layers: int | None
) -> list[tuple[pattern.Part, str]]:
    """The policy of each part, if the last `layers` layers have `policy` (None: all).

    The others save only the output of attention, if `policy` saves more. All layers of a repetition
    have the same policy: with a pattern of six layers, the last ten are rounded down to six.
    """
    if layers is None or policy in ("full", "attention"):
        return [(part, policy) for part in parts]
    found, left = [], layers
    for part in reversed(parts):
        times = min(part.times, left // len(part.kinds))
        left = left - times * len(part.kinds) if times == part.times else 0
        first, last = part.split(part.times - times)
        both = (last, policy), (first, "attention")
        found += [(one, name) for one, name in both if one.times]
    return found[::-1]


def forward(
    function: Callable, arguments: tuple, given: PyTree, policy: str
) -> tuple[PyTree, Kept | None]:
    """`function(*arguments)`, and what a policy saves of it: nothing if it is "full".

    `given` is all that the function may read: it is not saved, but passed to `backward` again.
    """
    if policy == "full":
        return function(*arguments), None
    checkpointed = jax.checkpoint(function, prevent_cse=False, policy=POLICIES[policy])
    made, pull = jax.vjp(checkpointed, *arguments)
    leaves, tree = jax.tree.flatten(pull)
    # An array that passes through unchanged is the same object.
    place_of = {id(x): i for i, x in enumerate(jax.tree.leaves(given))}
    places = tuple(place_of.get(id(leaf)) for leaf in leaves)
    arrays = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return made, Kept(arrays, tree, places)


def backward(function: Callable, arguments: tuple, given: PyTree, kept: Kept | None) -> Callable:
    """The function from the gradient of `forward`'s output to those of its arguments."""
    if kept is None:
        return jax.vjp(function, *arguments)[1]
    arrays, inputs = iter(kept.arrays), jax.tree.leaves(given)
    leaves = [next(arrays) if place is None else inputs[place] for place in kept.places]
    return jax.tree.unflatten(kept.pull, leaves)

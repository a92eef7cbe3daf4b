"""Gradients that stay apart along `data` until the optimizer takes them.

Slices of a pod and nodes of a cluster are joined by a slower network. Where `data` goes over them,
each part of `data` adds its micro-batches up by itself, in the memory that a sum takes anyway, and
the parts meet once an update. What crosses with every micro-batch are the log-probabilities of its
answers: an answer's partner may be in another part.
"""

from collections.abc import Callable

import jax
import jax.flatten_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from recipes.data.packed.packing import Packed

AXIS = "data"


def place(whole: NamedSharding) -> NamedSharding:
    """Where the parts of a sum are that is placed so when it is whole: one more axis, in front."""
    return NamedSharding(whole.mesh, PartitionSpec(AXIS, *whole.spec))


def met(parts: PyTree, like: PyTree) -> PyTree:
    """The sum of the parts, placed as `like` is."""
    add = lambda x, to: jax.lax.with_sharding_constraint(x.sum(0), to)
    return jax.tree.map(add, parts, like)


def by_part(add: Callable, mesh: Mesh) -> Callable:
    """`update.add_micro_batch`, given `sum_parts=`, as what each part of `data` does."""

    def part(sums, trained, frozen, reference, fields, batch, pull):
        own = sums._replace(gradient=jax.tree.map(lambda x: x[0], sums.gradient))
        own = add(own, trained, frozen, reference, fields, batch, pull, sum_parts=sum_of_parts)
        return own._replace(gradient=jax.tree.map(lambda x: x[None], own.gradient))

    def of_parts(sums, trained, frozen, reference, fields, batch, pull=None):
        split, whole = PartitionSpec(AXIS), PartitionSpec()
        of_sums = sums._replace(gradient=split, policy=whole, reference=whole)
        of_rows = Packed(*[split] * len(Packed._fields))._replace(scored=whole)
        return jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(of_sums, whole, whole, whole, whole, of_rows, whole),
            out_specs=of_sums,
            axis_names={AXIS},
            check_vma=False,
        )(sums, trained, frozen, reference, fields, batch, pull)

    return of_parts


@jax.custom_vjp
def sum_of_parts(here: PyTree) -> PyTree:
    """The sum of what all parts have, on each of them, in one exchange of as many numbers."""
    numbers, shaped = jax.flatten_util.ravel_pytree(here)
    return shaped(jax.lax.psum(numbers, AXIS))


# Each part has the whole loss, and not a share of it: what the loss asks of the sum it asks of what
# is here.
sum_of_parts.defvjp(lambda here: (sum_of_parts(here), None), lambda _, asked: (asked,))

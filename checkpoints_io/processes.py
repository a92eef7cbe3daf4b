"""The processes of a multi-process run: what they agree on, and what one does for all.

All processes must call the functions that communicate, equally often and in the same order.
"""

import functools

import jax
from jax.experimental import multihost_utils
from jaxtyping import Array
import numpy as np


def is_first() -> bool:
    """Whether this is the process that writes files and prints to the terminal."""
    return jax.process_index() == 0


def all_agree(here: bool) -> bool:
    """Whether `here` is true on every process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).all())


def any_says(here: bool) -> Array:
    """Whether `here` is true on any process, as a device value: it may be read later, or never."""
    everyone = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
    split, whole = (jax.NamedSharding(everyone, spec) for spec in (jax.P("device"), jax.P()))
    said = jax.make_array_from_callback((everyone.size,), split, lambda _: np.array([here]))
    with jax.set_mesh(everyone):
        return _any(said, whole)


@functools.partial(jax.jit, static_argnums=1)
def _any(said: Array, whole: jax.NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(said.any(), whole)


def of_first(value: np.ndarray) -> np.ndarray:
    """The first process's value; all processes must pass one of the same shape and dtype."""
    return multihost_utils.broadcast_one_to_all(value)


def gathered(value: Array) -> np.ndarray:
    """The whole of an array that is sharded over several processes, in host memory."""
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def wait_for_all(where: str) -> None:
    """Returns when every process has reached `where`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)

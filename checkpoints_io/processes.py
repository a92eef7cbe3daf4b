"""The processes of a run, where it has several: what they agree on, and what one does for all.

All processes must call what exchanges something, equally often and in the same order.
"""

import jax
from jax.experimental import multihost_utils
from jaxtyping import Array
import numpy as np


def is_first() -> bool:
    """Is this the process that writes files and talks to the person at the terminal?"""
    return jax.process_index() == 0


def all_agree(here: bool) -> bool:
    """Is it so on every process?"""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).all())


def of_first(value: np.ndarray) -> np.ndarray:
    """The value that the first process has; all of them give one of the same shape and dtype."""
    return multihost_utils.broadcast_one_to_all(value)


def gathered(value: Array) -> np.ndarray:
    """All of an array that is spread over the devices of several processes, in host memory."""
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def wait_for_all(where: str) -> None:
    """Returns when every process has come to `where`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)

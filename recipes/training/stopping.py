"""When a run ends before its last step: a held-out figure has not improved for a while."""

from collections.abc import Mapping, Sequence
import math

import numpy as np

from checkpoints_io import places, processes
from checkpoints_io.errors import RunFailed
from recipes.training import records
from recipes.training.run import Patience


class Watch:
    """Watches the figure that may end a run, from one evaluation to the next."""

    def __init__(self, patience: Patience | None, directory: places.Place):
        self._patience = patience
        self._values = recorded(patience, directory)

    def add(self, held_out: Mapping[str, float], step: int) -> str | None:
        """Adds an evaluation; if the run is to end because of it, says why.

        Raises:
          RuntimeError: as `value`.
        """
        if self._patience is None:
            return None
        self._values.append(value(self._patience, held_out))
        return told(self._patience, self._values, step) if self.ends() else None

    def ends(self) -> bool:
        """Is the run to end?"""
        return is_stale(self._patience, self._values)


def is_stale(patience: Patience | None, values: Sequence[float]) -> bool:
    """Has the figure, by its value at each evaluation, not improved for so many of them?

    What is not finite is no improvement, and neither is a tie.
    """
    if patience is None:
        return False
    sign = 1 if patience.higher else -1
    best, since = -math.inf, 0
    for value in values:
        better = math.isfinite(value) and sign * value > best
        best, since = (sign * value, 0) if better else (best, since + 1)
    return since >= patience.evaluations


def value(patience: Patience, held_out: Mapping[str, float]) -> float:
    """The figure at an evaluation.

    Raises:
      RuntimeError: the evaluations of this run have no such figure.
    """
    try:
        return held_out[f"eval/{patience.figure}"]
    except KeyError as error:
        raise RunFailed(
            f"--config.stop_when={patience.figure}: the evaluations of this run have no such "
            f"metric; they have {', '.join(name.removeprefix('eval/') for name in held_out)}"
        ) from error


def recorded(patience: Patience | None, directory: places.Place) -> list[float]:
    """The values of the evaluations so far, as the first process has recorded them."""
    if patience is None:
        return []
    found = np.array(records.values(directory, f"eval/{patience.figure}"), np.float64)
    count = int(processes.of_first(np.array(len(found))))
    return processes.of_first(np.resize(found, count)).tolist()


def told(patience: Patience, values: Sequence[float], step: int) -> str:
    """Why the run ends."""
    best = (max if patience.higher else min)(filter(math.isfinite, values), default=math.nan)
    return (
        f"the run ends after step {step}: {patience.figure} has not improved for "
        f"{patience.evaluations} evaluations (best {best:.4g}, now {values[-1]:.4g}); with "
        "--config.stop_when=None the same command continues"
    )

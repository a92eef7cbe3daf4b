"""The state of a run on disk: what it takes to go on as if it had never stopped, by Orbax.

A checkpoint is written in the background and appears when it is whole. It holds named trees of
sharded arrays, each readable alone, and `facts`, a small JSON object.
"""

from collections.abc import Callable, Mapping
import pathlib
import shutil
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

FORMAT = 1


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    trees: dict[str, Any]
    facts: dict[str, Any]


class RunStore:
    """Keeps the newest `keep` checkpoints of one run under `directory`."""

    def __init__(self, directory: pathlib.Path, *, keep: int):
        self._directory = directory.absolute()
        self._keep = keep
        self._pending = None
        self._open()

    def _open(self) -> None:
        newest: Any = ocp.training.preservation_policies.LatestN(self._keep)
        self._saver = ocp.training.Checkpointer(
            str(self._directory), preservation_policy=newest, cleanup_tmp_directories=True
        )

    def steps(self) -> list[int]:
        """The steps that are there whole, newest first."""
        return sorted((c.step for c in self._saver.checkpoints), reverse=True)

    def save(self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Returns once the arrays may be donated; the writing goes on behind.

        Raises:
          OSError: the save before this one failed, or the disk has no room for this one.
        """
        self.wait()
        needed = sum(x.nbytes for x in jax.tree.leaves(dict(trees)))
        free = shutil.disk_usage(self._directory).free
        if jax.process_count() > 1:  # all of them are to come to the same answer
            free = int(multihost_utils.broadcast_one_to_all(np.float64(free)))
        if free < needed:
            raise OSError(
                f"a checkpoint takes {needed >> 20} MiB and {self._directory} has {free >> 20} MiB "
                "free: make room, and the same command goes on from the newest checkpoint that is "
                f"there, {max(self.steps(), default='none')}"
            )
        facts = dict(facts) | {"format": FORMAT, "step": step}
        self._pending = self._saver.save_checkpointables_async(step, {**trees, "facts": facts})

    def facts(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint, without its arrays."""
        return self._saver.load_checkpointables(step, {"facts": None})["facts"]

    def restore(self, step: int, like: Mapping[str, Any]) -> Restored:
        """The trees named in `like`, with its shapes, dtypes and shardings."""
        trees = self._saver.load_checkpointables(step, {**_abstract(dict(like)), "facts": None})
        return Restored(step, trees, trees.pop("facts"))

    def newest(
        self, check: Callable[[dict[str, Any]], None], like: Mapping[str, Any] | None = None
    ) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none at all.

        `check` sees the facts first and may raise. Without `like` only the facts are read. With it,
        a checkpoint that cannot be read is named, set aside as `unreadable-STEP`, and passed over.

        Raises:
          ValueError: another version of this file wrote it.
          OSError: there are checkpoints, and none can be read.
        """
        steps = self.steps()
        for step in steps:
            facts = _tried(step, lambda step=step: self.facts(step))
            if facts is None:
                continue
            if facts.get("format") != FORMAT:
                raise ValueError(
                    f"checkpoint {step} in {self._directory} has format {facts.get('format')}, and "
                    f"this program reads {FORMAT}"
                )
            check(facts)
            if like is None:
                return Restored(step, {}, facts)
            restored = _tried(step, lambda step=step: self.restore(step, like))
            if restored is not None:
                self._set_aside([s for s in steps if s > step])
                return restored
        if steps and like is not None:
            raise OSError(f"none of the checkpoints {steps} in {self._directory} can be read")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Out of the way of Orbax, which would skip every save up to the newest it sees."""
        if not steps:
            return
        self._saver.close()
        if jax.process_index() == 0:
            for step in steps:
                (self._directory / str(step)).rename(self._directory / f"unreadable-{step}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._open()

    def wait(self) -> None:
        """Waits for the writing under way.

        Raises:
          OSError: it failed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise OSError(f"a checkpoint could not be written: {error}") from error

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.wait()
        self._saver.close()


def _tried(step: int, read: Callable[[], Any]) -> Any | None:
    """What `read` gives, or None if the checkpoint is torn; all processes come to the same answer.

    Running out of memory says nothing about the checkpoint and is passed on.
    """
    value = None
    try:
        value = read()
    except Exception as error:  # whatever Orbax makes of a torn file
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        told = str(error).strip().splitlines()[:1]
        logging.warning("checkpoint %d cannot be read and is passed over: %s", step, *told)
    if jax.process_count() > 1:
        everyone = multihost_utils.process_allgather(np.array(value is not None))
        value = value if everyone.all() else None
    return value


def _abstract(tree: Any) -> Any:
    as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(as_shape, tree)

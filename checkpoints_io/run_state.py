"""The state of a run on disk: what it takes to go on as if it had never stopped, by Orbax.

A checkpoint is written in the background and appears when it is whole. It holds named trees of
sharded arrays, each readable alone, and `facts`, a small JSON object.
"""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from orbax.checkpoint import v1 as ocp

FORMAT = 1


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    trees: dict[str, Any]
    facts: dict[str, Any]


class RunStore:
    """Keeps the newest `keep` checkpoints of one run under `directory`."""

    def __init__(self, directory: pathlib.Path, *, keep: int, read_only: bool = False):
        newest: Any = ocp.training.preservation_policies.LatestN(keep)
        self._saver = ocp.training.Checkpointer(
            str(directory.absolute()),
            preservation_policy=newest,
            cleanup_tmp_directories=not read_only,
        )
        self._pending = None

    def steps(self) -> list[int]:
        """The steps that are there whole, newest first."""
        return sorted((c.step for c in self._saver.checkpoints), reverse=True)

    def save(self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Returns once the arrays may be donated; the writing goes on behind.

        Raises:
          OSError: the save before this one failed.
        """
        self.wait()
        facts = dict(facts) | {"format": FORMAT, "step": step}
        self._pending = self._saver.save_checkpointables_async(step, {**trees, "facts": facts})

    def facts(self, step: int) -> dict[str, Any]:
        """The facts of a checkpoint, without its arrays.

        Raises:
          ValueError: another version of this file wrote it.
        """
        facts = self._saver.load_checkpointables(step, {"facts": None})["facts"]
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint {step} has format {facts.get('format')}; this program reads {FORMAT}"
            )
        return facts

    def restore(self, step: int, like: Mapping[str, Any]) -> Restored:
        """The trees named in `like`, with its shapes, dtypes and shardings."""
        trees = self._saver.load_checkpointables(step, {**_abstract(dict(like)), "facts": None})
        return Restored(step, trees, trees.pop("facts"))

    def restore_newest(
        self, like: Mapping[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none at all.

        `check` sees the facts first and may raise. One that cannot be read is named and passed
        over, and is deleted when a newer one is saved in its place.

        Raises:
          OSError: there are checkpoints, and none can be read.
        """
        steps = self.steps()
        for step in steps:
            try:
                facts = self.facts(step)
            except Exception as error:  # whatever Orbax makes of a torn file
                logging.warning("checkpoint %d cannot be read and is passed over: %s", step, error)
                continue
            check(facts)
            try:
                restored = self.restore(step, like)
            except Exception as error:
                logging.warning("checkpoint %d cannot be read and is passed over: %s", step, error)
                continue
            self._forget_after(step)
            return restored
        if steps:
            raise OSError(f"none of the checkpoints {steps} can be read")
        return None

    def _forget_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step`: Orbax would skip every save up to the newest."""
        for newer in [s for s in self.steps() if s > step]:
            self._saver.delete(newer)

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


def _abstract(tree: Any) -> Any:
    as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(as_shape, tree)

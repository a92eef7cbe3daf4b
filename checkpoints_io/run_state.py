"""The state of a run: all it takes to resume as if it had never stopped, kept with Orbax.

A checkpoint is written in the background and appears when it is complete. It holds named trees of
sharded arrays, each readable on its own, and `facts`, a small JSON object. The facts include the
fingerprint of each tree, so that any bit that has changed since is detected.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import fnmatch
import time
import types
from typing import Any, NamedTuple, TypeVar

from absl import logging
import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from checkpoints_io import places, processes, sealed
from checkpoints_io.errors import NotFound, StorageError
from checkpoints_io.processes import all_agree
from checkpoints_io.sealed import Facts

Found = TypeVar("Found")


class Restored(NamedTuple):
    """A checkpoint that has been read back."""

    step: int
    trees: dict[str, PyTree]
    facts: Facts


class Keep(NamedTuple):
    """Which checkpoints are kept: those that at least one of these fields selects."""

    newest: int  # this many of the newest
    every: int | None = None  # those at multiples of this step
    # The one whose facts have the highest score; None: the facts have no score.
    highest: Callable[[Facts], float | None] | None = None


class RunStore:
    """The checkpoints of one run in a place of their own; without `keep` they are only read.

    After a failed save, `retries` more in a row may fail before the run is stopped. A normal exit
    waits for the last save; after an error it does not wait for the other processes, which may be
    at another point.
    """

    def __init__(self, place: places.Place, *, keep: Keep | None, retries: int = 0):
        self._place = place
        self._keep = keep
        self._retries = retries
        self._pending: tuple[int, Any] | None = None
        self._begun_at = 0.0  # when the pending save began
        self._failures = 0  # in a row
        self._known: dict[int, Facts | None] = {}  # facts by step; None: a torn checkpoint
        self._going_up: futures.ThreadPoolExecutor | None = None
        place.refuse_odd(trees=[""])
        self._at = place.for_orbax()
        if self._at != place.address:  # a copy on this machine
            place.bring(["facts"])
            self._going_up = futures.ThreadPoolExecutor(1)
        self._open()

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # another error is being raised already
            if self._pending:
                self._pending[1].result()
            self._saver.close()

    def _open(self) -> None:
        if self._keep and processes.is_first():
            # In a bucket Orbax would also clear checkpoints that were set aside.
            self._place.clear(checkpoints=True)
        policy = types.SimpleNamespace(should_preserve=self._to_stay)
        self._saver = ocp.training.Checkpointer(
            self._at,
            preservation_policy=policy,
            # A process that only reads must not clear away what another one is writing.
            cleanup_tmp_directories=self._keep is not None and "://" not in self._at,
        )
        if self._keep and self._keep.highest:
            for step in self.steps():
                self._look_at(step)

    def _to_stay(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Which to keep: Orbax calls this after every save, with all of them, oldest first."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stay = _staying(steps, self._keep, self._known) if self._keep else set(steps)
        return [step in stay for step in steps]

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, newest first."""
        return sorted((c.step for c in self._saver.checkpoints), reverse=True)

    def save(
        self,
        step: int,
        trees: Mapping[str, PyTree],
        facts: Mapping[str, object],
    ) -> None:
        """Starts a save and returns once the arrays may be donated; writing goes on in background.

        Raises:
          OSError: this save or the one before it failed, and no retry is left.
        """
        self.wait()
        facts = sealed.with_bits(step, facts, trees)
        self._known[step] = facts
        failure = _without_room(self._place, trees)
        if all_agree(failure is None):  # Orbax needs all processes or none
            under_way, failure = self._begun(step, {**trees, "facts": sealed.closed(facts)})
            if all_agree(failure is None):
                self._pending, self._begun_at = (step, under_way), time.monotonic()
                return
        self._failed(step, failure)

    def _begun(self, step: int, content: dict[str, PyTree]) -> tuple[object, Exception | None]:
        try:
            under_way = self._saver.save_checkpointables_async(step, content)
        except Exception as error:  # whatever Orbax makes of the disk's answer
            return None, error
        if under_way is None:
            later = "a checkpoint of a later step, which this run did not write"
            return None, OSError(f"there is {later}, in {self._place}")
        if self._going_up:
            return self._going_up.submit(lambda: (under_way.result(), self._place.put_up())), None
        return under_way, None

    def _is_saving(self) -> bool:
        pending = self._pending and self._pending[1]
        goes_up = isinstance(pending, futures.Future) and not pending.done()
        return goes_up or self._saver.is_saving_in_progress()

    def lost(self) -> bool:
        """Whether the newest save is known to have failed, so that it should be repeated at once.

        Raises:
          OSError: it failed, and no retry is left.
        """
        # With several processes none can know alone; they check together, at the next save.
        if jax.process_count() == 1 and self._pending and not self._is_saving():
            self.wait()
        return self._failures > 0

    def seconds_saving(self) -> float:
        """How long the current save has been running; 0: there is none."""
        if self._pending is None or not self._is_saving():
            return 0.0
        return time.monotonic() - self._begun_at

    def wait(self) -> None:
        """Waits for the current save to finish.

        Raises:
          OSError: it failed, and no retry is left.
        """
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        failure = None
        try:
            pending.result()
        except Exception as error:
            failure = error
        if all_agree(failure is None):
            self._failures = 0
        else:
            self._failed(step, failure)

    def _failed(self, step: int, error: Exception | None) -> None:
        """Reports a failed save, or raises; its incomplete checkpoint is cleared away."""
        with contextlib.suppress(Exception):  # Orbax raises the same failure again
            self._saver.close()
        if processes.is_first():
            with contextlib.suppress(OSError):  # of that disk
                for torn in fnmatch.filter(self._place.names(), f"{step}.*tmp*"):
                    self._place.remove(torn)
        self._open()
        self._failures += 1
        told = f"the checkpoint of step {step} could not be written: {_first_line(error)}"
        if self._failures > self._retries:
            raise StorageError(
                f"{told}. Once that is fixed, the same command resumes from the newest existing "
                f"checkpoint: {max(self.steps(), default='none')}"
            ) from error
        left = self._retries - self._failures
        logging.warning("%s. It is tried again, and up to %d times more", told, left)

    def facts(self, step: int) -> Facts:
        """The facts of a checkpoint, without its arrays.

        Raises:
          ValueError: they have changed since they were written.
        """
        kept = self._saver.load_checkpointables(step, {"facts": None})["facts"]
        return sealed.opened(kept, step)

    def _look_at(self, step: int) -> Facts | None:
        """The facts, read only once; None, with a warning, if they are torn."""
        if step not in self._known:
            self._known[step] = _tried(step, lambda: self.facts(step))
        return self._known[step]

    def amend(self, step: int, more: Facts) -> None:
        """Adds facts that became known after the checkpoint was saved; nothing is written to it."""
        if (facts := self._look_at(step)) is not None:
            self._known[step] = facts | {key: facts.get(key) or more[key] for key in more}

    def _read(self, step: int, like: Mapping[str, PyTree]) -> Restored:
        trees = self._saver.load_checkpointables(step, {**_abstract(dict(like)), "facts": None})
        facts = sealed.opened(trees.pop("facts"), step)
        return Restored(step, trees, facts)

    def _restored(self, step: int, like: Mapping[str, PyTree]) -> Restored | None:
        """A checkpoint with its arrays; None, with a warning, if it is torn."""
        self._place.bring(like, str(step))  # a network error does not mean it is torn
        # All processes must have read it before they compare its bits, which they do together.
        found = _tried(step, lambda: self._read(step, like))
        return found and _tried(step, lambda: _with_its_bits(found))

    def newest(
        self, check: Callable[[Facts], None], like: Mapping[str, PyTree] | None = None
    ) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none at all.

        `check` sees the facts first and may raise. Without `like` only the facts are read. With it,
        an unreadable checkpoint is reported, set aside as `unreadable-STEP`, and passed over.

        Raises:
          ValueError: another version of this file wrote it.
          OSError: there are checkpoints, but none can be read.
        """
        steps = self.steps()
        for step in steps:
            facts = self._look_at(step)
            if facts is None:
                continue
            sealed.refuse_other_format(facts, f"checkpoint {step} in {self._place}")
            check(facts)
            if like is None:
                return Restored(step, {}, facts)
            restored = self._restored(step, like)
            if restored is not None:
                self._without([s for s in steps if s > step], self._place.set_aside)
                self._let_go([s for s in steps if s <= step])
                return restored
        if steps and like is not None:
            raise StorageError(
                f"none of the checkpoints {steps} in {self._place} can be read: repair the disk, "
                "or start in another directory"
            )
        return None

    def at(self, step: int, check: Callable[[Facts], None], like: Mapping[str, PyTree]) -> Restored:
        """The checkpoint of this step; `check` sees its facts first and may raise.

        Raises:
          FileNotFoundError: there is none.
          ValueError: another version of this file wrote it.
          OSError: it cannot be read.
        """
        if step not in (there := self.steps()):
            raise NotFound(
                f"{self._place} has no checkpoint of step {step}: there are "
                f"{', '.join(map(str, sorted(there))) or 'none'}"
            )
        facts = self._look_at(step)
        restored = None
        if facts is not None:
            sealed.refuse_other_format(facts, f"checkpoint {step} in {self._place}")
            check(facts)
            restored = self._restored(step, like)
        if restored is None:
            raise StorageError(f"checkpoint {step} in {self._place} cannot be read: use another")
        return restored

    def best(self, like: Mapping[str, PyTree]) -> Restored | None:
        """The checkpoint with the highest score, as defined by `keep`; None if none has a score.

        One that cannot be read is reported, and the next best is used.
        """
        score = self._keep.highest if self._keep else None
        scores = {step: score(self._look_at(step) or {}) for step in self.steps()} if score else {}
        scored = [(-value, step) for step, value in scores.items() if value is not None]
        for _, step in sorted(scored):
            if (found := self._restored(step, like)) is not None:
                return found._replace(facts=self._look_at(step) or {})
        return None

    def _let_go(self, steps: list[int]) -> None:
        """Removes what the save of the newest of these steps, which can be read, was to remove.

        The run may have been killed in between, and a finished run saves no more. Which one is best
        is known only after `amend` has added what is known of each.
        """
        if self._keep and not self._keep.highest and self._at == self._place.address:
            stay = _staying(sorted(steps), self._keep, self._known)
            self._without([step for step in steps if step not in stay], self._place.remove)

    def _without(self, steps: list[int], move: Callable[[str], None]) -> None:
        """Hides these steps from Orbax, which would skip every save up to the newest of them."""
        if not steps or not self._keep:
            return
        self._saver.close()
        if processes.is_first():
            for step in steps:
                move(str(step))
        processes.wait_for_all("moved")
        self._open()

    def close(self) -> None:
        """Waits for the last save, and releases the directory.

        Raises:
          OSError: the last save failed.
        """
        self._retries = 0  # there will be no further save
        try:
            self.wait()
        finally:
            self._saver.close()


def _without_room(place: places.Place, trees: Mapping[str, PyTree]) -> OSError | None:
    """The error if the trees do not fit in the place; None: they fit, as far as is known."""
    needed = sum(x.nbytes for x in jax.tree.leaves(dict(trees)))
    try:
        free = place.room()
    except OSError as error:
        return error
    if free < needed:
        return StorageError(
            f"it takes {needed >> 20} MiB, but {place} has {int(free) >> 20} MiB free"
        )
    return None


def _staying(steps: Sequence[int], keep: Keep, known: Mapping[int, Facts | None]) -> set[int]:
    """Which of the steps, given oldest first, are kept; `known` has their facts."""
    stay = set(steps[-keep.newest :])
    if keep.every:
        stay |= {step for step in steps if step % keep.every == 0}
    if keep.highest:
        scores = {step: keep.highest(known.get(step) or {}) for step in steps}
        scored = [(score, -step) for step, score in scores.items() if score is not None]
        if scored:
            stay.add(-max(scored)[1])
    return stay


def _with_its_bits(found: Restored) -> Restored:
    sealed.refuse_other_bits(found.trees, found.facts)
    return found


def _first_line(error: BaseException | None) -> str:
    while error and error.__cause__:  # Orbax wraps the disk's error in its own
        error = error.__cause__
    if "No space left on device" in str(error):
        return "the disk is full"
    lines = str(error).strip().splitlines() if error else ["another process failed at it"]
    return lines[0][:300] if lines else type(error).__name__


def _tried(step: int, read: Callable[[], Found]) -> Found | None:
    """What `read` returns, or None if the checkpoint is torn; the same on all processes.

    Running out of memory says nothing about the checkpoint, so that error is raised.
    """
    value = None
    try:
        value = read()
    except Exception as error:  # whatever Orbax raises for a torn file
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        told = _first_line(error)
        logging.warning("checkpoint %d cannot be read and is passed over: %s", step, told)
    return value if all_agree(value is not None) else None


def _abstract(tree: PyTree) -> PyTree:
    as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(as_shape, tree)

"""Strangers' programs in processes of their own: chat templates, and what cuts texts into tokens.

A worker is born with its limits of CPU time and memory. What it is sent and what it answers is
JSON or bytes, which nothing here runs. A template that escapes its sandbox, a pattern that tries
everything and a library that crashes reach a process that holds nothing else.
"""

from collections.abc import Callable
import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, NamedTuple
import weakref

from checkpoints_io import errors
from zoo.text import worker

KINDS = {
    kind.__name__: kind
    for kind in errors.UserError.__subclasses__()
    if kind.__module__ == errors.__name__
}
ROOT = str(pathlib.Path(__file__).parents[2])  # where `zoo` is imported from
BEGIN = "from zoo.text import worker; worker.serve()"


class Limits(NamedTuple):
    """What a worker may use."""

    seconds: float = 5.0  # of CPU time in a `step`
    loading: float = 60.0  # of CPU time before a step, and after: files are read there
    memory: int = 2**32  # bytes, of address space, where the system knows such a limit


class Failed(Exception):
    """A bug in what a worker ran; the text is its traceback."""


class Worker:
    """A process that is started when it is first asked, and again after it has died.

    It imports neither the caller's `__main__` nor anything that the function's module does not,
    leaves its streams alone, and ends with it, however that ends. A fork has one of its own.
    """

    def __init__(self, programs: str, remedy: str, limits: Limits | None = None):
        """`programs` names what it runs, and `remedy` what to do about it, in its errors."""
        self._programs, self._remedy = programs, remedy
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._end: weakref.finalize | None = None

    def call(self, function: Callable[..., object], *given: object) -> Any:
        """What `function(step, *given)` returns, in the worker: bytes, or what JSON can say.

        The function is a module's own, under its name. Within `with step(where, what):` it may
        take `Limits.seconds`, and a sentence says that `what` took longer, as an error that the
        function can catch. A library that does not return within them ends the worker, and
        the error names `where`.

        Raises:
          BadInput: it took too long, or too much memory.
          UserError: what the function raises, as the same kind with the same words.
          RunFailed: the process died.
        """
        name = {"module": function.__module__, "name": function.__qualname__}
        request = worker.as_json(name | {"given": given})
        with self._lock:
            running = self._alive()
            try:
                worker.send(running.process.stdin, worker.VALUE, request)
                answer = worker.receive(running.process.stdout)
            except BrokenPipeError:
                answer = None
            except BaseException:  # Ctrl-C: half an answer is of no use
                self.close()
                raise
            if answer is None:
                raise self._death(running)
            kind, content = answer
            if kind in (worker.TOO_LONG, worker.TOO_LARGE):  # it was interrupted at any point
                self.close()
        if kind == worker.BYTES:
            return content
        if kind == worker.TOO_LONG:
            raise errors.BadInput(
                f"{self._programs} took more than {self._limits.loading:g} seconds of CPU time: "
                f"{self._remedy}"
            )
        if kind == worker.TOO_LARGE:
            raise errors.BadInput(
                f"{self._programs} needed more than {self._limits.memory >> 20} MiB of memory: "
                f"{self._remedy}"
            )
        value = json.loads(content.decode("utf-8", "surrogatepass"))
        if kind == worker.SENTENCE:
            raise KINDS[value[0]](value[1])
        if kind == worker.BUG:
            raise Failed(value)
        return value

    def close(self) -> None:
        """Ends the process, also from another thread; the next call would start one."""
        end, self._end, self._running = self._end, None, None
        if end is not None:
            end()

    def _alive(self) -> "_Running":
        if self._running is not None and not self._running.is_usable():
            self.close()
        if self._running is None:
            self._running = _started(self._limits)
            self._end = weakref.finalize(self, self._running.end)
        return self._running

    def _death(self, running: "_Running") -> errors.UserError:
        status = running.process.wait()
        place = b""
        with contextlib.suppress(OSError, ValueError):  # another thread has closed it
            place = os.pread(running.place.fileno(), worker.WIDTH, 0).rstrip(b"\0")
        seconds, _, where = place.decode("utf-8", "replace").partition(" ")
        at = f"{where}: " if where else ""
        self.close()
        if status == -signal.SIGXCPU:
            return errors.BadInput(
                f"{at}{self._programs} took more than {seconds} seconds of CPU time in a "
                f"library, and was ended: {self._remedy}"
            )
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return errors.RunFailed(
            f"{at}the process that ran {self._programs} died ({how}): it may have needed more than "
            f"{self._limits.memory >> 20} MiB of memory, or more than is free here. "
            f"{self._remedy[:1].upper()}{self._remedy[1:]}"
        )


class _Running(NamedTuple):
    process: Any  # a Popen whose streams are there
    place: io.BufferedRandom  # a file: what it is at
    parent: int

    def is_usable(self) -> bool:
        """Is it this process's own, and alive?"""
        return self.parent == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        """Ends it, unless it is another process's, and waits for that."""
        if self.parent != os.getpid():
            return
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.place):
            with contextlib.suppress(OSError, RuntimeError):  # half of a request may be left
                file.close()


def _started(limits: Limits) -> _Running:
    place = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
    given = [limits.seconds, limits.loading, limits.memory, place.fileno(), os.getpid()]
    path = [folder or os.getcwd() for folder in [*sys.path, ROOT]]
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", BEGIN, *map(str, given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[place.fileno()],
        process_group=0,  # Ctrl-C is for the caller, who ends it
        env={
            **os.environ,
            **one_thread,
            "TOKENIZERS_PARALLELISM": "false",
            "RUST_BACKTRACE": "0",  # a panic of `tokenizers` becomes a sentence
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        },
    )
    return _Running(process, place, os.getpid())

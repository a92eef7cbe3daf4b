"""Runs untrusted code in worker processes: chat templates and tokenizer patterns.

A worker starts with limits on CPU time and memory. Requests and answers are JSON or bytes, which
are never executed. A template that escapes its sandbox, a pattern that backtracks without end and a
library that crashes affect only a process that holds nothing else.
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
    """The resource limits of a worker."""

    seconds: float = 5.0  # of CPU time in a `step`
    loading: float = 60.0  # of CPU time before a step, and after: files are read there
    memory: int = 2**32  # bytes, of address space, where the system knows such a limit


class Failed(Exception):
    """A bug in the code that a worker ran; the text is its traceback."""


class Worker:
    """A worker process that is started on the first call, and restarted after it has died.

    It imports neither the caller's `__main__` nor anything that the function's module does not,
    leaves the caller's streams alone, and ends with the caller, however that ends. A forked process
    gets its own worker.
    """

    def __init__(self, programs: str, remedy: str, limits: Limits | None = None):
        """In errors, `programs` names the code that runs, and `remedy` says what to do."""
        self._programs, self._remedy = programs, remedy
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._end: weakref.finalize | None = None

    def call(self, function: Callable[..., object], *given: object) -> Any:
        """Returns the result of `function(step, *given)` in the worker: bytes or JSON values.

        The function must be a module-level one. Within `with step(where, what):` it may use
        `Limits.seconds`; after that it gets an error that `what` took longer, which it can catch.
        If a library does not return even then, the worker is ended and the error names `where`.

        Raises:
          BadInput: it took too much time or memory.
          UserError: the function raised it; type and message are kept.
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
            except BaseException:  # Ctrl-C: half an answer is useless
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
        """Ends the process, also from another thread; the next call would start a new one."""
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
        """Whether it belongs to this process and is alive."""
        return self.parent == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        """Ends the worker and waits for its exit, unless it belongs to another process."""
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

"""The main loop of a worker process, which `confined` starts: answers calls within limits.

Limits are of CPU time, which a busy or paused machine does not use up. At the limit Python code is
interrupted; C code, which cannot be, is killed with the process by the system two seconds later.
What it was doing is written to a file, which the parent then reads.
"""

from collections.abc import Callable, Iterator
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from typing import BinaryIO

from checkpoints_io.errors import BadInput, UserError

WIDTH = 512  # bytes of what the process is at
Step = Callable[..., contextlib.AbstractContextManager[None]]  # as `_Bounds.step`
# The kinds of answers.
VALUE, BYTES, SENTENCE, TOO_LONG, TOO_LARGE, BUG = b"jbsctx"


class _TooLong(BaseException):
    """The time is used up; a BaseException, so that `except Exception` does not catch it."""


def serve() -> None:
    """Answers requests until there are no more; the command line gives the limits."""
    seconds, loading, memory, place, parent = sys.argv[1:]
    _bear(int(memory))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b", 0) as nothing:  # what a library writes there is no answer
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    bounds = _Bounds(float(seconds), float(loading), int(memory), int(place))
    while request := receive(requests):
        kind, answer = _answered(request, bounds)
        try:
            send(answers, kind, answer)
        except BrokenPipeError:
            return


def send(file: BinaryIO, kind: int, content: bytes) -> None:
    """Writes one message."""
    file.write(bytes([kind]) + len(content).to_bytes(8, "big"))
    file.write(content)
    file.flush()


def receive(file: BinaryIO) -> tuple[int, bytes] | None:
    """The next message; None if there is none or it is truncated."""
    head = file.read(9)
    size = int.from_bytes(head[1:], "big")
    if len(head) < 9 or len(content := file.read(size)) < size:
        return None
    return head[0], content


def _bear(memory: int) -> None:
    """Sets limits for the whole life of the process, as far as the system allows."""
    signal.signal(signal.SIGPROF, _ring)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # its words may go to the terminal of another
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = memory if hard < 0 else min(memory, hard)  # RLIM_INFINITY is below 0
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _ring(*_: object) -> None:
    raise _TooLong


def _end_with(parent: int) -> None:
    """Makes this process end when its parent does, even if that is killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Bounds:
    """Enforces the limits of successive calls."""

    def __init__(self, seconds: float, loading: float, memory: int, place: int):
        self.seconds, self.loading, self.memory, self._place = seconds, loading, memory, place
        _, self._hard = resource.getrlimit(resource.RLIMIT_CPU)

    @contextlib.contextmanager
    def step(self, where: str, what: str, more: float = 0.0) -> Iterator[None]:
        """Allows `seconds` plus `more` within the block, and records `where` for the parent.

        Raises:
          BadInput: `what` takes longer, or needs too much memory.
        """
        seconds = self.seconds + more
        self.begin(where, seconds)
        try:
            yield
        except _TooLong:
            raise BadInput(f"{what} takes more than {seconds:g} seconds of CPU time") from None
        except MemoryError:
            raise BadInput(f"{what} needs more than {self.memory >> 20} MiB of memory") from None
        finally:
            self.begin("", self.loading)

    def begin(self, where: str, seconds: float) -> None:
        """Allows this much CPU time from now on, and records it with `where` for the parent."""
        text = f"{seconds:g} {where}".encode("utf-8", "replace")[:WIDTH]
        os.pwrite(self._place, text.ljust(WIDTH, b"\0"), 0)
        signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # raised again if it is swallowed
        end = int(time.process_time() + seconds + 2)
        resource.setrlimit(
            resource.RLIMIT_CPU, (end if self._hard < 0 else min(end, self._hard), self._hard)
        )


def _answered(request: tuple[int, bytes], bounds: _Bounds) -> tuple[int, bytes]:
    try:
        bounds.begin("", bounds.loading)
        asked = json.loads(request[1].decode("utf-8", "surrogatepass"))
        function: Callable[..., object] = vars(importlib.import_module(asked["module"]))[
            asked["name"]
        ]
        found = function(bounds.step, *asked["given"])
        return (BYTES, found) if isinstance(found, bytes) else (VALUE, as_json(found))
    except UserError as error:
        kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == ERRORS)
        return SENTENCE, as_json([kind, str(error)])
    except _TooLong:
        return TOO_LONG, b""
    except MemoryError:
        return TOO_LARGE, b""
    except OSError as error:
        if error.filename and error.strerror:
            return SENTENCE, as_json(["StorageError", f"{error.filename}: {error.strerror}"])
        return BUG, as_json(traceback.format_exc())
    except Exception:
        return BUG, as_json(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


ERRORS = UserError.__module__


def as_json(value: object) -> bytes:
    """Encodes a value as a JSON message."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")

"""Lines and bars for the person at the terminal. Nothing that happens to a terminal ends a run."""

from collections.abc import Iterable
import contextlib
import errno
import functools
import os
import signal
import sys
from typing import Any, TextIO, TypeVar

import tqdm

Item = TypeVar("Item")
# After these a stream may take the next line; after any other error it is gone.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)


class Lasting:
    """A text stream that nobody has to read: after its pipe or terminal is gone it writes nowhere.

    So does everything else that writes to the same descriptor, in any language.
    """

    def __init__(self, stream: Any):
        self._wrapped = _nowhere() if stream is None else stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._wrapped, name)

    def __eq__(self, other: object) -> bool:
        """Equal to the stream within: tqdm asks which bars share a terminal with a line."""
        return self._wrapped == getattr(other, "_wrapped", other)

    def __hash__(self) -> int:
        return hash(self._wrapped)

    def write(self, text: str) -> int:
        """Writes what can be written; letters that the stream lacks become question marks."""
        try:
            self._wrapped.write(text)
        except UnicodeEncodeError:
            encoding = self._wrapped.encoding
            self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes lines one after the other."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flushes what can be flushed."""
        try:
            self._wrapped.flush()
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)

    def isatty(self) -> bool:
        """Is the stream still a terminal?"""
        try:
            return self._wrapped.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def _failed(self, error: Exception) -> None:
        # A RuntimeError: a signal handler writes in the midst of a line.
        if isinstance(error, RuntimeError) or getattr(error, "errno", None) in PASSING:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it may have no descriptor
            os.dup2(_nowhere().fileno(), self._wrapped.fileno())
        self._wrapped = _nowhere()


@functools.cache
def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


def lasting(stream: Any) -> Lasting:
    """The stream (None: the process was started without it), as one that raises nothing."""
    return stream if isinstance(stream, Lasting) else Lasting(stream)


def hold() -> None:
    """Lets the program outlive its terminal: neither printing nor a hang-up ends it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # `2>&-`: the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    # Ignored as `nohup` does it, so that processes started from here ignore it too.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def write(text: str) -> None:
    """A line, above the bar if there is one, that is read at once."""
    stream = lasting(sys.stdout)
    tqdm.tqdm.write(text, file=stream)
    stream.flush()


def bar(items: Iterable[Item], **how: Any) -> Iterable[Item]:
    """Iterates with a progress bar on stderr if that is a terminal."""
    return tqdm.tqdm(items, file=lasting(sys.stderr), disable=None, **how)

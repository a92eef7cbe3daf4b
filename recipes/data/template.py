"""A chat template, run as the stranger's program it is: sandboxed, with bounds on time and size."""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import re
import resource
import signal
import threading
import time
from typing import Any

import jinja2
import jinja2.meta

from checkpoints_io.errors import BadInput
from recipes.data import sandbox
from recipes.data.sandbox import CLOSE, OPEN

Span = tuple[int, int]  # characters, from .. to

# A rendering may take so many seconds of CPU time, and so many bytes beside those in use.
SECONDS, ROOM = 5.0, 2**31
_is_bounded = False  # is the main thread within `bounded`?


class TooLong(Exception):
    """A rendering has used up its time."""


def compiled(text: str, date: str | None) -> jinja2.Template:
    """The program of a template; `date` (2026-01-31) is today, for those that print it.

    Raises:
      ValueError: it is no template.
    """
    try:
        with bounded():
            return sandbox.environment(date).from_string(text)
    except Exception as error:  # also a recursion, or an overflow, in its parser
        raise BadInput(f"the chat template cannot be read: {str(error)[:300]}") from error


def render(template: jinja2.Template, given: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The text, and what of it stood in `{% generation %}` blocks.

    Raises:
      ValueError: the template refuses, fails, or outgrows its bounds.
    """
    try:
        with bounded():
            text = template.render(given)
    except MemoryError as error:
        raise BadInput("the chat template needs too much memory") from error
    except Exception as error:  # a template is a program, and may fail as one
        raise BadInput(f"the chat template refuses the messages: {str(error)[:300]}") from error
    return _unmarked(text) if OPEN in text or CLOSE in text else (text, [])


def names(text: str) -> set[str]:
    """What a template that `compiled` takes asks for by name: `tools`, `enable_thinking`."""
    return jinja2.meta.find_undeclared_variables(sandbox.environment(None).parse(text))


def marks_answers(text: str) -> bool:
    """Has the template `{% generation %}` blocks?"""
    return bool(re.search(r"\{%-?\s*generation\b", text))


def prints_the_date(text: str) -> bool:
    """Would it say something else tomorrow?"""
    return "strftime_now" in text


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """In CPU time, and in memory where the system can. Signals come to the main thread alone.

    A machine that is busy, or a process that is paused, takes no time from a rendering. In another
    thread nothing is bounded. Around several renderings it bounds them together, at the cost of
    one.

    Raises:
      ValueError: what is within it takes too long.
    """
    global _is_bounded
    if _is_bounded or threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = _in_use(int(time.monotonic()))
    limited = in_use > 0 and not 0 <= soft < in_use + ROOM  # RLIM_INFINITY is below 0
    most = time.thread_time() + SECONDS

    def ring(*_: Any) -> None:
        if time.thread_time() >= most:  # else it rings again, and is asked again
            raise TooLong(f"it takes longer than {SECONDS:.0f} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    _is_bounded = True
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, min(SECONDS, 1.0))
    try:
        yield
    except TooLong as error:
        raise BadInput(str(error)) from error
    finally:
        with contextlib.suppress(TooLong):  # it may ring now
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        _is_bounded = False


@functools.lru_cache(maxsize=1)
def _in_use(_second: int) -> int:
    """Bytes of address space, looked up once a second: it takes as long as a rendering."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 0


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Without the marks; of blocks within blocks, the outer one counts."""
    parts, spans, at, opened = [], [], 0, []
    for part in re.split(f"([{OPEN}{CLOSE}])", text):
        if part == OPEN:
            opened.append(at)
        elif part == CLOSE:
            since = opened.pop() if opened else at
            if since < at and not opened:
                spans.append((since, at))
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), spans

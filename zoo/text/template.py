"""Runs a chat template in a sandbox, as it is an untrusted program.

The sandbox bounds what the template can reach and how much it writes. The worker that it runs in
bounds time and memory (see `confined`); outside of a worker nothing bounds them.
"""

from collections.abc import Mapping
import re

import jinja2.meta

from checkpoints_io.errors import BadInput
from zoo.text import sandbox, traced
from zoo.text.sandbox import CLOSE, OPEN
from zoo.text.traced import Program

Span = tuple[int, int]  # character range: start, end


def compiled(text: str, date: str | None) -> Program:
    """Compiles a template; `date` (2026-01-31) is today's, for templates that print it.

    Raises:
      ValueError: the text is not a valid template.
    """
    try:
        return traced.program(text, date)
    except Exception as error:  # also a recursion, or an overflow, in its parser
        raise BadInput(f"the chat template cannot be read: {str(error)[:300]}") from error


def render(program: Program, given: Mapping[str, object]) -> tuple[str, list[Span]]:
    """Renders a conversation; also returns the spans of `{% generation %}` blocks.

    Raises:
      ValueError: the template refuses, fails, or outgrows its bounds.
    """
    try:
        text = traced.render(program, given)
    except MemoryError as error:
        raise BadInput("the chat template needs too much memory") from error
    except Exception as error:  # a template is a program, and may fail as one
        raise BadInput(f"the chat template refuses the messages: {str(error)[:300]}") from error
    return _unmarked(text) if OPEN in text or CLOSE in text else (text, [])


def names(text: str) -> set[str]:
    """The names that a template reads, `compiled` or not: `tools`, `enable_thinking`."""
    return jinja2.meta.find_undeclared_variables(sandbox.environment(None).parse(text))


def marks_answers(text: str) -> bool:
    """Whether the template has `{% generation %}` blocks."""
    return bool(re.search(r"\{%-?\s*generation\b", text))


def prints_the_date(text: str) -> bool:
    """Whether the template's output depends on today's date."""
    return "strftime_now" in text


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Removes the marks and returns the spans; for nested blocks the outer one counts."""
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

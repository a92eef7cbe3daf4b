"""A chat template, run as the stranger's program it is: sandboxed, with bounds on time and size."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import string
import threading
import time
from typing import Any

import jinja2
from jinja2 import compiler, filters, nodes, sandbox
from jinja2.ext import Extension
import jinja2.meta
from jinja2.runtime import LoopContext

Span = tuple[int, int]  # characters, from .. to

# A rendering may take so long, so much memory beside what is in use, and give so long a text.
SECONDS, ROOM, LONGEST = 5.0, 2**31, 2**24
# Around what a `{% generation %}` block says: characters that Unicode keeps out of texts.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_is_bounded = False  # is the main thread within `bounded`?


def compiled(text: str, date: str | None) -> jinja2.Template:
    """The program of a template; `date` (2026-01-31) is today, for those that print it.

    Raises:
      ValueError: it is no template.
    """
    try:
        with bounded():
            return _environment(date).from_string(text)
    except Exception as error:  # also a recursion, or an overflow, in its parser
        raise ValueError(f"the chat template cannot be read: {str(error)[:300]}") from error


def render(template: jinja2.Template, given: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The text, and what of it stood in `{% generation %}` blocks.

    Raises:
      ValueError: the template refuses, fails, or outgrows its bounds.
    """
    try:
        with bounded():
            text = template.render(given)
    except MemoryError as error:
        raise ValueError("the chat template needs too much memory") from error
    except Exception as error:  # a template is a program, and may fail as one
        raise ValueError(f"the chat template refuses the messages: {str(error)[:300]}") from error
    return _unmarked(text) if OPEN in text or CLOSE in text else (text, [])


def names(text: str) -> set[str]:
    """What a template that `compiled` takes asks for by name: `tools`, `enable_thinking`."""
    return jinja2.meta.find_undeclared_variables(_environment(None).parse(text))


def marks_answers(text: str) -> bool:
    """Has the template `{% generation %}` blocks?"""
    return bool(re.search(r"\{%-?\s*generation\b", text))


def prints_the_date(text: str) -> bool:
    """Would it say something else tomorrow?"""
    return "strftime_now" in text


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """In time, and in memory where the system can. Signals come to the main thread alone.

    In another thread nothing is bounded. Around several renderings it bounds them together, at the
    cost of one.
    """
    global _is_bounded
    if _is_bounded or threading.current_thread() is not threading.main_thread():
        yield
        return
    _is_bounded = True
    try:
        with _bounded_memory(), _bounded_time():
            yield
    finally:
        _is_bounded = False


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _in_use(int(time.monotonic())) + ROOM
    if most <= ROOM or (soft != resource.RLIM_INFINITY and soft < most):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@functools.lru_cache(maxsize=1)
def _in_use(_second: int) -> int:
    """Bytes of address space, looked up once a second: it takes as long as a rendering."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 0


@contextlib.contextmanager
def _bounded_time() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)  # and again, should the first be swallowed
    try:
        yield
    finally:
        with contextlib.suppress(TimeoutError):  # it may ring now
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"it takes longer than {SECONDS:.0f} seconds")


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


@functools.cache
def _environment(date: str | None) -> jinja2.Environment:
    """What chat templates expect to find: the spelling and functions of transformers."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    for name in UNBOUNDED:
        del environment.filters[name]
    environment.filters |= {
        "format": _format,
        "indent": _indent,
        "join": _join,
        "replace": _replace,
        "tojson": _to_json,
    }
    known: dict[str, Any] = environment.globals
    del known["lipsum"]
    known |= {"raise_exception": _refuse, "dict": _Dict(), "namespace": _Namespace}
    if date is not None:
        known["strftime_now"] = datetime.date.fromisoformat(date).strftime
    return environment


# Filters that write more than they are given, or something else each time; no chat template is
# known to use them.
UNBOUNDED = (
    "batch", "center", "filesizeformat", "pprint", "random", "slice", "sum", "urlize", "wordwrap",
    "xmlattr",
)  # fmt: skip
# Methods of texts and numbers, likewise.
UNBOUNDED_METHODS = frozenset(
    {"center", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"}
)
SIZED = (str, bytes, list, tuple)
# What hides a key of the same name, and what may be asked of any text.
OF_DICTS = frozenset(dir(dict))
OF_TEXT = type("".strip)
OF_TEXTS = frozenset(["startswith", "endswith", "strip", "lstrip", "rstrip", "split"])


def _short(length: int) -> None:
    if length > LONGEST:
        raise ValueError(f"the chat template writes a text of more than {LONGEST} characters")


def _joined(pieces: Iterable[str]) -> str:
    told, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > LONGEST:
            _short(length)
        told.append(piece)
    return "".join(told)


class _Code(compiler.CodeGenerator):
    """`a ~ b`, too, is joined by the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        """Called by jinja where it writes the program."""
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Texts, lists and numbers stay small: 'x' * 10**9 is one operation."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code
    concat = staticmethod(_joined)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Called for each of them."""
        if operator == "+":
            if isinstance(left, SIZED) and isinstance(right, SIZED):
                _short(len(left) + len(right))
            return left + right
        if operator == "%":
            if isinstance(left, str | bytes):
                _check_format(left)
        else:
            numbers = [abs(x) for x in (left, right) if isinstance(x, int | float)]
            longest = max((len(x) for x in (left, right) if hasattr(x, "__len__")), default=1)
            if any(x * longest > LONGEST for x in numbers) or (operator == "**" and right > 64):
                raise ValueError("a product of the chat template is too large")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Called for each `a.b`; what is asked most leads nowhere else, and is told at once."""
        kind = type(obj)
        if kind is dict and attribute in obj and attribute not in OF_DICTS:
            return obj[attribute]
        public = kind in (LoopContext, _Namespace) and not attribute.startswith("_")
        if (public or (kind is str and attribute in OF_TEXTS)) and hasattr(obj, attribute):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Called for each of them."""
        return attr not in UNBOUNDED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(*given: Any, **named: Any) -> Any:  # a template may name an argument `self`
        """Called for each call in a template."""
        self, context, function, *rest = given
        if type(function) is OF_TEXT and function.__name__ in OF_TEXTS:
            for name in ("_loop_vars", "_block_vars"):  # jinja's own
                named.pop(name, None)
            return function(*rest, **named)
        method = getattr(function, "__wrapped__", function)  # what formats, in jinja's wrapping
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str | bytes):
            if name == "join" and rest and isinstance(text, str):
                return _join(self, rest[0], text)
            if name == "replace" and len(rest) > 1:
                _check_replaced(text, *rest[:2])
            elif name in ("format", "format_map"):
                fields = string.Formatter().parse(str(text))
                if any(re.search(r"\d{5}|\{", spec or "") for *_, spec, _ in fields):
                    raise ValueError("a format of the chat template is too wide")
        return sandbox.ImmutableSandboxedEnvironment.call(self, context, function, *rest, **named)


def _check_format(form: str | bytes) -> None:
    if re.search(r"\*|\d{5}", str(form)):
        raise ValueError("a format of the chat template is too wide")


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    if len(text) * len(new) > LONGEST:
        _short(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _format(form: Any, *given: Any, **named: Any) -> str:
    _check_format(form)
    return filters.do_format(form, *given, **named)


def _indent(text: str, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    _short((width if isinstance(width, int) else len(width)) * (text.count("\n") + 1))
    return filters.do_indent(text, width, first, blank)


@jinja2.pass_environment
def _join(environment: Any, parts: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        parts = map(filters.make_attrgetter(environment, attribute), parts)
    between = str(d)
    pieces = (piece for part in parts for piece in (between, str(part)))
    next(pieces, None)
    return _joined(pieces)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_replaced(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


class _Generation(Extension):
    """Reads `{% generation %} … {% endgeneration %}`, and marks what stands between."""

    tags = {"generation"}  # noqa: RUF012, jinja's own way

    def parse(self, parser: Any) -> nodes.Node:
        """Called by jinja at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class _Dict:
    """`dict` without its attributes, which lead out of the sandbox."""

    def __call__(self, *given: Any, **named: Any) -> dict:
        return dict(*given, **named)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*given: Any, **named: Any) -> None:
        self, *rest = given
        if any(str(name).startswith("_") for name in dict(*rest, **named)):
            raise jinja2.exceptions.SecurityError("a namespace of the template has a private name")
        jinja2.utils.Namespace.__init__(self, dict(*rest, **named))

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace of the template has a private name")
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Without the escapes of HTML that jinja's own filter writes; piece by piece."""
    _short(1000 * (indent if isinstance(indent, int) else len(indent or "")))
    how = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
    return _joined(json.JSONEncoder(separators=separators, **how).iterencode(value))


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

"""The sandbox of chat templates: the functions they expect, and bounds on all they write."""

from collections.abc import Callable, Iterable
import datetime
import functools
import json
import re
import string
from typing import Any

import jinja2
from jinja2 import compiler, filters, nodes, sandbox
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext

from checkpoints_io.errors import BadInput

LONGEST = 2**24  # characters of a text, or items of a list
# Marks around the text of a `{% generation %}` block: Unicode noncharacters.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


@functools.cache
def environment(date: str | None, kind: "type[Sandbox] | None" = None) -> "Sandbox":
    """The environment that chat templates expect: the syntax and functions of transformers."""
    made = (kind or Sandbox)(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    for name in UNBOUNDED:
        del made.filters[name]
    made.filters |= {
        "format": _format,
        "indent": _indent,
        "join": _join,
        "replace": _replace,
        "tojson": _to_json,
    }
    known: dict[str, Any] = made.globals
    del known["lipsum"]
    known |= {"raise_exception": _refuse, "dict": _Dict(), "namespace": _Namespace}
    if date is not None:
        known["strftime_now"] = datetime.date.fromisoformat(date).strftime
    return made


# Filters that write more than they are given, or something else each time; no chat template is
# known to use them.
UNBOUNDED = (
    "batch", "center", "filesizeformat", "pprint", "random", "slice", "sum", "urlize", "wordwrap",
    "xmlattr",
)  # fmt: skip
# The same for methods of texts and numbers.
UNBOUNDED_METHODS = frozenset(
    {"center", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"}
)
SIZED = (str, bytes, list, tuple)
# Attributes that hide a key of the same name, and those that any text may give.
OF_DICTS = frozenset(dir(dict))
OF_TEXT = type("".strip)
OF_TEXTS = frozenset(["startswith", "endswith", "strip", "lstrip", "rstrip", "split"])


def check_length(length: int) -> None:
    """Raises ValueError if a template would write a text of this length."""
    if length > LONGEST:
        raise BadInput(f"the chat template writes a text of more than {LONGEST} characters")


def joined(pieces: Iterable[str]) -> str:
    """Joins pieces into one text of bounded length."""
    told, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > LONGEST:
            check_length(length)
        told.append(piece)
    return "".join(told)


class _Code(compiler.CodeGenerator):
    """A code generator by which `a ~ b`, too, is joined by the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: compiler.Frame) -> None:
        """Called by jinja where it writes the program."""
        self.write("environment.concat(map(environment.written, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that bounds texts, lists and numbers: 'x' * 10**9 is a single operation."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code
    concat: Any = staticmethod(joined)
    written: Any = str

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> object:
        """The result of `left operator right`, if it is not too large."""
        if operator == "+":
            if isinstance(left, SIZED) and isinstance(right, SIZED):
                check_length(len(left) + len(right))
            return left + right
        if operator == "%":
            if isinstance(left, str | bytes):
                _check_format(left)
        else:
            numbers = [abs(x) for x in (left, right) if isinstance(x, int | float)]
            longest = max((len(x) for x in (left, right) if hasattr(x, "__len__")), default=1)
            if any(x * longest > LONGEST for x in numbers) or (operator == "**" and right > 64):
                raise BadInput("a product of the chat template is too large")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> object:
        """Looks up each `a.b`; the usual ones are safe, and are answered at once."""
        kind = type(obj)
        if kind is dict and attribute in obj and attribute not in OF_DICTS:
            return obj[attribute]
        public = kind in (LoopContext, _Namespace) and not attribute.startswith("_")
        if (public or (kind is str and attribute in OF_TEXTS)) and hasattr(obj, attribute):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        """Refuses what jinja calls unsafe, and methods whose result could be too large."""
        return attr not in UNBOUNDED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(*given: Any, **named: object) -> object:  # a template may name an argument `self`
        """Calls a function for a template, if its arguments are within bounds."""
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
                    raise BadInput("a format of the chat template is too wide")
        return sandbox.ImmutableSandboxedEnvironment.call(self, context, function, *rest, **named)


def _check_format(form: str | bytes) -> None:
    if re.search(r"\*|\d{5}", str(form)):
        raise BadInput("a format of the chat template is too wide")


def _check_replaced(text: Any, old: object, new: Any) -> None:
    if len(text) * len(new) > LONGEST:
        check_length(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _format(form: Any, *given: object, **named: object) -> str:
    _check_format(form)
    return filters.do_format(form, *given, **named)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    check_length((width if isinstance(width, int) else len(width)) * (text.count("\n") + 1))
    return filters.do_indent(text, width, first, blank)


@jinja2.pass_environment
def _join(
    environment: "Sandbox",
    parts: Iterable[object],
    d: object = "",
    attribute: int | str | None = None,
) -> str:
    if attribute is not None:
        parts = map(filters.make_attrgetter(environment, attribute), parts)
    between = str(d)
    pieces = (piece for part in parts for piece in (between, environment.written(part)))
    next(pieces, None)
    return environment.concat(pieces)


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_replaced(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


class _Generation(Extension):
    """Parses `{% generation %} … {% endgeneration %}`, and marks the text between them."""

    tags = {"generation"}  # noqa: RUF012, jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by jinja at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class _Dict:
    """`dict` without its attributes, which lead out of the sandbox."""

    def __call__(self, *given: object, **named: object) -> dict:
        return dict(*given, **named)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*given: object, **named: object) -> None:
        self, *rest = given
        if any(str(name).startswith("_") for name in dict(*rest, **named)):
            raise jinja2.exceptions.SecurityError("a namespace of the template has a private name")
        jinja2.utils.Namespace.__init__(self, dict(*rest, **named))

    def __setitem__(self, name: str, value: object) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace of the template has a private name")
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _to_json(
    value: object, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """A JSON filter without the HTML escapes of jinja's own; writes piece by piece."""
    check_length(1000 * (indent if isinstance(indent, int) else len(indent or "")))
    how = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
    return joined(json.JSONEncoder(separators=separators, **how).iterencode(value))


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

"""Traces a chat template once and replays the trace for new messages, in a tenth of the time.

A template mostly copies message texts: what it writes around them depends on the roles and on a few
questions about the texts (does one contain `</think>`, is it empty). It is run once on objects that
record each question and its answer; texts that answer alike need no new run, as the output around
them is the same. A template that does anything else with texts is run normally.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import operator
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.runtime import Context

from zoo.text import sandbox

MOST_SHAPES = 256  # of conversations, for each program
MOST_TRACES = 8  # of one shape: what answers in yet another way is run
MOST_STEPS = 2_000  # of one trace
LONGEST = 2**18  # characters of a conversation: the time of longer ones is not the template's
MOST_PARTS = 1000  # of a text: then they are joined
PLAIN = {str, int, bool, type(None)}
METHODS = sandbox.OF_TEXTS | {"lower", "upper"}
TEXT = "a text, whatever it says"


class At(NamedTuple):
    """A text, by number: first those of the messages, then results in order."""

    number: int


class Step(NamedTuple):
    """One operation on texts: `do(*sides)`."""

    do: Callable[..., object]
    sides: tuple[object, ...]
    answer: object  # as `_told`


class Trace(NamedTuple):
    """All that a template does with the texts of a conversation."""

    steps: Sequence[Step]
    text: tuple[str | At, ...]  # what it writes in the end, in parts


class Program(NamedTuple):
    """A chat template, with its traces for conversations of each shape."""

    run: jinja2.Template
    followed: jinja2.Template  # the same, for `_Words`
    traces: dict[tuple, list[Trace] | None]  # None: it cannot be followed


def program(text: str, date: str | None) -> Program:
    """Raises what jinja raises of a text that is no template."""
    kinds = sandbox.Sandbox, _Following
    run, followed = (sandbox.environment(date, kind).from_string(text) for kind in kinds)
    return Program(run, followed, {})


def render(program: Program, given: Mapping[str, object]) -> str:
    """The text that a template writes. Raises what the template raises."""
    shape, texts = _shape(given)
    if shape is None:
        return program.run.render(given)
    traces = program.traces.get(shape, [])
    for trace in traces or ():
        if (text := _written(trace, texts)) is not None:
            return text
    text = program.run.render(given)
    room = shape in program.traces or len(program.traces) < MOST_SHAPES
    if traces is not None and len(traces) < MOST_TRACES and room:
        trace = _followed(program, given, texts)
        is_sound = trace is not None and _written(trace, texts) == text
        program.traces[shape] = [*traces, trace] if is_sound else None
    return text


def _shape(given: Mapping[str, object]) -> tuple[tuple | None, list[str]]:
    """All that is given but the messages' words, and these; None where there is more than words."""
    messages = given.get("messages")
    if type(messages) is not list or not set(map(type, messages)) <= {dict}:
        return None, []
    texts = [value for message in messages for key, value in message.items() if key != "role"]
    if not set(map(type, texts)) <= {str} or sum(map(len, texts)) > LONGEST:
        return None, []
    rest = [value for name, value in given.items() if name != "messages"]
    rest += [message.get("role") for message in messages]
    if not set(map(type, rest)) <= PLAIN:
        return None, []
    return (*given, *map(tuple, messages), *rest, *map(type, rest)), texts


def _written(trace: Trace, texts: Sequence[str]) -> str | None:
    """The output of a trace for these texts; None if one of its questions has another answer."""
    words = [*texts]
    for do, sides, answer in trace.steps:
        told, new = _told(do, [words[x.number] if type(x) is At else x for x in sides])
        if told != answer:
            return None
        words += new
    parts = [words[x.number] if isinstance(x, At) else x for x in trace.text]
    return "".join(parts) if sum(map(len, parts)) <= sandbox.LONGEST else None


def _told(do: Callable[..., object], sides: Iterable[object]) -> tuple[object, list[str]]:
    """What a template learns from a step, and the words that it gets, without their being known."""
    try:
        value = do(*sides)
    except Exception as error:
        return type(error), []
    if type(value) is str:
        return TEXT, [value]
    if type(value) is list:
        return len(value), value
    return (type(value), value), []


class _Untraceable(Exception):
    """A template does something with texts that cannot be traced."""


class _Run:
    """The trace of a run so far."""

    def __init__(self, texts: Sequence[str]):
        self.words = [*texts]
        self.steps: list[Step] = []
        self.lost = False

    def do(self, do: Callable[..., object], *sides: object) -> Any:
        """Does it for the template, and keeps it. Texts are words from then on."""
        kept = tuple(x._whole() if type(x) is _Words else x for x in sides)
        told, new = _told(do, [self.words[x.number] if type(x) is At else x for x in kept])
        self.steps.append(Step(do, kept, told))
        if len(self.steps) > MOST_STEPS:
            self.lose()
        first = len(self.words)
        self.words += new
        if isinstance(told, type):
            raise told
        if isinstance(told, tuple):
            return told[1]
        found = [_Words(self, (At(number),)) for number in range(first, len(self.words))]
        return found[0] if told == TEXT else found

    def lose(self) -> NoReturn:
        """Raises; what catches that, as some of jinja's tests do, changes nothing."""
        self.lost = True
        raise _Untraceable


class _Words:
    """A text in a run that is followed: what is asked of it is kept, or refused.

    It says that it is a `str`, for templates ask. It is none: what does not know of it fails, and
    does not take a text for known that will be another.
    """

    def __init__(self, run: _Run, parts: tuple[str | At, ...]):
        self._run, self._parts = run, parts  # out of the sandbox's reach

    @property
    def __class__(self) -> type:
        return str

    def _whole(self) -> At:
        """What is passed on stays in parts, until something is asked of all of it."""
        if len(self._parts) > 1:
            parts = [_Words(self._run, (x,)) if isinstance(x, At) else x for x in self._parts]
            self._parts = self._run.do(_join, *parts)._parts
        (words,) = [part for part in self._parts if isinstance(part, At)]
        return words

    def __getattr__(self, name: str) -> object:
        if name in METHODS:
            return lambda *given: self._run.do(getattr(str, name), self, *given)
        if hasattr(str, name):
            self._run.lose()
        raise AttributeError(name)

    def __bool__(self) -> bool:
        return self._run.do(bool, self)

    def __len__(self) -> int:
        return self._run.do(len, self)

    def __eq__(self, other: object) -> bool:
        return self._run.do(operator.eq, self, other)

    def __ne__(self, other: object) -> bool:
        return self._run.do(operator.ne, self, other)

    def __contains__(self, other: object) -> bool:
        return self._run.do(operator.contains, self, other)

    def __getitem__(self, at: object) -> object:
        return self._run.do(operator.getitem, self, at)

    def __iter__(self) -> Iterator[object]:
        yield from self._run.do(list, self)

    def __add__(self, other: object) -> object:
        return _in_a_row([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> object:
        return _in_a_row([other, self]) if isinstance(other, str) else NotImplemented

    def _refuse(self, *_: object) -> NoReturn:
        self._run.lose()

    # A list that is printed asks for `repr`; what counts words or reads numbers, for the others.
    __str__ = __repr__ = __format__ = __hash__ = __int__ = __float__ = __index__ = _refuse
    __mod__ = __mul__ = __rmul__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse


def _join(*parts: str) -> str:
    return sandbox.joined(parts)


def _in_a_row(pieces: Sequence[Any]) -> object:
    """Concatenates texts and traced texts."""
    runs = [piece._run for piece in pieces if type(piece) is _Words]
    if not runs:
        return sandbox.joined(pieces)
    of = lambda piece: piece._parts if type(piece) is _Words else (piece,)
    parts = tuple(part for piece in pieces for part in of(piece))
    return _Words(runs[0], parts) if len(parts) <= MOST_PARTS else runs[0].do(_join, *pieces)


class _Piece(str):
    """Stands for words among what a program writes, until that is joined."""

    words: _Words

    def __str__(self) -> str:  # which jinja calls, and which would give another
        return self


def _piece(value: object) -> object:
    if type(value) is not _Words:
        return value
    piece = _Piece()
    piece.words = value
    return piece


def _concat(pieces: Iterable[str]) -> object:
    """What jinja joins."""
    return _in_a_row([piece.words if type(piece) is _Piece else piece for piece in pieces])


class _Following(sandbox.Sandbox):
    """The sandbox in which traced texts stay traced."""

    concat: object = staticmethod(_concat)
    written: object = staticmethod(
        lambda value: _piece(value) if type(value) is _Words else str(value)
    )

    def __init__(self, **given: object):
        super().__init__(**given, finalize=_piece)

    def call_binop(self, context: Context, operator: str, left: object, right: Any) -> object:
        """As the sandbox, which looks at the length of what is added."""
        if operator == "+" and _Words in (type(left), type(right)):
            return left + right
        return super().call_binop(context, operator, left, right)


def _followed(program: Program, given: Mapping[str, Any], texts: Sequence[str]) -> Trace | None:
    """The trace of the program for these texts; None if it cannot be traced."""
    run = _Run(texts)
    words = iter(_Words(run, (At(number),)) for number in range(len(texts)))
    messages = [
        {key: value if key == "role" else next(words) for key, value in message.items()}
        for message in given["messages"]
    ]
    try:
        text = program.followed.render({**given, "messages": messages})
    except Exception:  # also those of what does not know words
        return None
    if run.lost:
        return None
    return Trace(run.steps, text._parts if type(text) is _Words else (text,))

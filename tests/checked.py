"""beartype, which checks annotations as the tests run: shapes by jaxtyping, all else by itself.

jaxtyping binds the arguments of each call and has them checked twice, so that the axes of arrays
agree with each other. Most functions take no arrays with axes: there one check is enough.
"""

from collections.abc import Callable
import functools
import inspect
import types
import typing
from typing import Any

import beartype
import jaxtyping

_known: dict[tuple[str, str, str], Any] = {}
_with_axes = jaxtyping.jaxtyped
_alone = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))


def checked(function: Callable) -> Any:
    """The same, with its annotations checked; jaxtyping gives an empty function of a signature.

    A function within a function is made anew at every call, and beartype would write a checker for
    each: of the slowest tests of packing, half of the time.
    """
    key = function.__module__, function.__qualname__, str(inspect.signature(function))
    if key not in _known:
        _known[key] = beartype.beartype(function)
    return _known[key]


def _jaxtyped(what: Any = None, *, typechecker: Any) -> Any:
    """What jaxtyping puts on everything in the packages that it is asked to check."""
    if what is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    is_function = isinstance(what, types.FunctionType) and "<locals>" not in what.__qualname__
    if is_function and not any(map(_names_axes, what.__annotations__.values())):
        return _alone(what)
    return _with_axes(what, typechecker=typechecker)


def _names_axes(annotation: Any) -> bool:
    if isinstance(annotation, list):  # of a Callable's arguments
        return any(map(_names_axes, annotation))
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return isinstance(annotation, str) or any(map(_names_axes, typing.get_args(annotation)))


jaxtyping.jaxtyped = _jaxtyped

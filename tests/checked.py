"""beartype, which checks annotations as the tests run, once for each signature.

A function within a function is made anew at every call, and beartype would write a checker for
each: of the slowest tests of packing, half of the time.
"""

from collections.abc import Callable
import inspect
from typing import Any

import beartype

_known: dict[tuple[str, str, str], Any] = {}


def checked(function: Callable) -> Any:
    """The same, with its annotations checked; jaxtyping gives an empty function of a signature."""
    key = function.__module__, function.__qualname__, str(inspect.signature(function))
    if key not in _known:
        _known[key] = beartype.beartype(function)
    return _known[key]

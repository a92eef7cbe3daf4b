"""Which cases of a test run by default, and which are its long form: `-m full`."""

from collections.abc import Iterable

import pytest


def full_but(cases: Iterable, *now) -> list:
    """The cases, of which those that are not among `now` run with `-m full` alone.

    A tuple is one value for each of several parameters.
    """
    as_values = lambda case: case if isinstance(case, tuple) else (case,)
    return [
        case if case in now else pytest.param(*as_values(case), marks=pytest.mark.full)
        for case in cases
    ]

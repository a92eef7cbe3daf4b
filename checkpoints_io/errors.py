"""Errors that are sentences for the user: what is wrong, where, its bound, and the remedy.

Each is also one of Python's own kinds, so that a notebook's `except ValueError` holds. A program
prints the sentence alone; any other error is a bug, and keeps its traceback.
"""


class UserError(Exception):
    """A sentence for the user."""


class BadInput(UserError, ValueError):
    """A setting, an argument or a file says something that cannot be used."""


class NotFound(UserError, FileNotFoundError):
    """There is no such file, folder, repository or checkpoint."""


class NoAccess(UserError, PermissionError):
    """It is there, and this user may not read it."""


class InTheWay(UserError, FileExistsError):
    """Something else is where a file or folder is to be written."""


class StorageError(UserError, OSError):
    """A disk or bucket cannot be used, or does not hold what will be written."""


class RunFailed(UserError, RuntimeError):
    """A run that had started cannot continue, or must not."""

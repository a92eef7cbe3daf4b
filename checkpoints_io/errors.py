"""Errors that are sentences for the user: what is wrong, where, the bound, and the remedy.

Each also derives from a built-in exception, so that `except ValueError` in a notebook works. A
program prints only the sentence; any other error is a bug, and keeps its traceback.
"""


class UserError(Exception):
    """An error whose message is a sentence for the user."""


class BadInput(UserError, ValueError):
    """A setting, an argument or a file has a value that cannot be used."""


class NotFound(UserError, FileNotFoundError):
    """There is no such file, folder, repository or checkpoint."""


class NoAccess(UserError, PermissionError):
    """A file or repository exists, but this user may not read it."""


class InTheWay(UserError, FileExistsError):
    """Something else occupies the path where a file or folder is to be written."""


class StorageError(UserError, OSError):
    """A disk or bucket cannot be used, or has no room for what will be written."""


class RunFailed(UserError, RuntimeError):
    """A run that had started cannot continue, or must not."""

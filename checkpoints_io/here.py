"""What of a bucket is on this machine: folders whose files go up as they change, and checkpoints.

The second are copies, for the kinds of buckets that Orbax does not write to itself.
"""

from collections.abc import Callable
import pathlib
import tempfile

_folders: dict[str, tempfile.TemporaryDirectory] = {}  # by address
_copies: dict[str, tempfile.TemporaryDirectory] = {}
_gone_up: dict[pathlib.Path, tuple[int, int]] = {}  # files, as they were then


def folder(url: str) -> str:
    """Where files are written that `take_in` puts up: one folder for each address."""
    return _of(_folders, url)


def copy(url: str) -> pathlib.Path:
    """A folder that holds what of a bucket's checkpoints was brought, and those written since."""
    return pathlib.Path(_of(_copies, url))


def _of(known: dict[str, tempfile.TemporaryDirectory], url: str) -> str:
    if url not in known:
        known[url] = tempfile.TemporaryDirectory(prefix="of-bucket-")
    return known[url].name


def take_in(url: str, put: Callable[[pathlib.Path, str], None]) -> None:
    """Puts up files of all folders in this address that have changed since, under their URLs."""
    for own, held in [*_folders.items()]:
        if not f"{own}/".startswith(f"{url}/"):
            continue
        for path in sorted(pathlib.Path(held.name).rglob("*")):
            if path.is_file():
                now = path.stat().st_mtime_ns, path.stat().st_size
                if _gone_up.get(path) != now:
                    put(path, f"{own}/{path.relative_to(held.name).as_posix()}")
                    _gone_up[path] = now

"""Local copies of parts of a bucket: folders uploaded as their files change, and checkpoints.

Checkpoints have local copies for the kinds of bucket that Orbax does not write to directly.
"""

from collections.abc import Callable
import pathlib
import tempfile

_folders: dict[str, tempfile.TemporaryDirectory] = {}  # by address
_copies: dict[str, tempfile.TemporaryDirectory] = {}
_gone_up: dict[pathlib.Path, tuple[int, int]] = {}  # uploaded files, as they were at the time


def folder(url: str) -> str:
    """The local folder whose files `take_in` uploads: one for each address."""
    return _of(_folders, url)


def copy(url: str) -> pathlib.Path:
    """The local folder of a bucket's checkpoints: those fetched, and those written since."""
    return pathlib.Path(_of(_copies, url))


def _of(known: dict[str, tempfile.TemporaryDirectory], url: str) -> str:
    if url not in known:
        known[url] = tempfile.TemporaryDirectory(prefix="of-bucket-")
    return known[url].name


def take_in(url: str, put: Callable[[pathlib.Path, str], None]) -> None:
    """Uploads, with `put`, the changed files of all local folders below this address."""
    for own, held in [*_folders.items()]:
        if not f"{own}/".startswith(f"{url}/"):
            continue
        for path in sorted(pathlib.Path(held.name).rglob("*")):
            if path.is_file():
                now = path.stat().st_mtime_ns, path.stat().st_size
                if _gone_up.get(path) != now:
                    put(path, f"{own}/{path.relative_to(held.name).as_posix()}")
                    _gone_up[path] = now

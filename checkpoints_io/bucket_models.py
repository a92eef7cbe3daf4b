"""Models in buckets: files are fetched to this machine, and fetched again when they change."""

from collections.abc import Sequence
import fnmatch
import hashlib
import json
import pathlib

from checkpoints_io import bucket, lock, whole
from checkpoints_io.errors import NotFound
from checkpoints_io.hf_folder import TEMPLATES

VERSIONS = ".versions.json"  # the versions of the objects that were fetched


def brought(url: str, files: Sequence[str], without: Sequence[str] = ()) -> pathlib.Path:
    """A local folder with the current version of those of `files` that the bucket has at `url`.

    Files that match `without` are not fetched. The folder is beside the hub's cache, in HF_HOME.

    Raises:
      FileNotFoundError: the bucket has none of the files there.
      OSError: the bucket, or the folder, cannot be used.
    """
    from huggingface_hub import constants

    place = bucket.at(url, url)
    among = lambda name, patterns: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    wanted = lambda name: among(name, files) and not among(name, without)
    inside = place.within(TEMPLATES).versions()
    every = place.versions() | {f"{TEMPLATES}/{name}": at for name, at in inside.items()}
    there = {name: version for name, version in every.items() if wanted(name)}
    if not there:
        raise NotFound(f"there is no model in {url}: none of its files are there")
    room = pathlib.Path(constants.HF_HOME, "buckets")
    room.mkdir(parents=True, exist_ok=True)
    *_, name = place.url.split("/")
    folder = room / f"{name}-{hashlib.sha256(place.url.encode()).hexdigest()[:16]}"
    with lock.held(room / f"{folder.name}.lock", otherwise=lambda: None):  # waits if held
        folder.mkdir(exist_ok=True)
        known = _known(folder)
        for name, version in there.items():
            if known.get(name) == version and (folder / name).is_file():
                continue
            to = folder / name
            to.parent.mkdir(exist_ok=True)
            part = to.with_name(f".{to.name}.part")
            place.fetch(name, part)
            part.replace(to)
            known[name] = version
            whole.write(folder / VERSIONS, json.dumps(known).encode())
        for name in filter(wanted, known.keys() - there.keys()):
            (folder / name).unlink(missing_ok=True)
    return folder


def _known(folder: pathlib.Path) -> dict[str, str]:
    try:
        return json.loads((folder / VERSIONS).read_text())
    except (FileNotFoundError, ValueError):
        return {}

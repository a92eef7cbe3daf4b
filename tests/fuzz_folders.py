"""Looks for model folders that break the reader, guided by the branches they take in it.

  pip install atheris
  python tests/fuzz_folders.py -max_total_time=1800 -timeout=60 -max_len=200000 CORPUS

An input is a byte that chooses a file, and what that file holds. Half of the mutations are those of
tests/checkpoints_io/test_strangers.py, half libFuzzer's own.
"""

import pathlib
import random
import shutil
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

with atheris.instrument_imports(include=["checkpoints_io", "zoo"]):
    from tests.checkpoints_io import test_strangers
    import zoo  # noqa: F401

ROOT = pathlib.Path(tempfile.mkdtemp(prefix="fuzzed-"))
ONE, TWO = test_strangers.folders(ROOT)
# (folder, name) of every file that may be another.
PLACES = [(folder, path.name) for folder in (ONE, TWO) for path in sorted(folder.iterdir())
          if path.name in test_strangers.FILES]  # fmt: skip
WATCHED = test_strangers.Watched(ROOT / "harmed")


def attempt(data: bytes) -> None:
    """Opens the folder that an input stands for; what is no model and no sentence is a finding."""
    folder, name = PLACES[data[0] % len(PLACES)] if data else PLACES[0]
    shutil.rmtree(WATCHED.folder, ignore_errors=True)
    shutil.copytree(folder, WATCHED.folder)
    (WATCHED.folder / name).write_bytes(data[1:])
    _, seconds, most = WATCHED.attempt()
    assert not WATCHED.elsewhere, WATCHED.elsewhere
    assert seconds < 5, seconds
    assert most < 2 * len(data) + test_strangers.OWN + (1 << 20), most


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Another input: of the same place, mostly."""
    draw = random.Random(seed)
    if not data or draw.random() < 0.1:
        place = draw.randrange(len(PLACES))
        folder, name = PLACES[place]
        return (bytes([place]) + (folder / name).read_bytes())[:most]
    if draw.random() < 0.5:
        return atheris.Mutate(data, most)
    try:
        made = test_strangers.mutated(draw, PLACES[data[0] % len(PLACES)][1], data[1:])
    except (ValueError, RecursionError, IndexError):  # it is no JSON any more
        made = test_strangers.odd_bytes(draw, data[1:] or b"{}")
    return (data[:1] + made)[:most]


if __name__ == "__main__":
    shutil.copytree(ONE, WATCHED.folder)
    WATCHED.attempt()  # what is imported once is imported
    atheris.Setup(sys.argv, attempt, custom_mutator=mutate)
    atheris.Fuzz()

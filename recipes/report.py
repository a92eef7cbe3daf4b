"""A page for one run, or for several overlaid: curves, samples, time, rows, settings.

  python recipes/report.py runs/tiny
  python recipes/report.py runs/one runs/two runs/three --page=compared.html

It is made from the files in the directories of the runs alone, of runs that are going on too, and
needs nothing else: no network, no script. A run writes its own page, report.html, at every
evaluation and at its end.
"""

from absl import flags

if __name__ == "__main__":  # a wrong flag is answered before the imports below
    from recipes.training import command

    flags.DEFINE_string(
        "page", None, "Where to write the page; unset: report.html in the directory of the run."
    )

from collections.abc import Sequence

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from recipes.pages import run_files, run_page, template
from recipes.training import command


def report(directories: Sequence[str], page: str | None) -> str:
    """Writes the page; returns where it is.

    Raises:
      FileNotFoundError, OSError: one is not the directory of a run, or the page cannot be written.
    """
    if not directories:
        raise BadInput("give the directory of a run, or of several: recipes/report.py runs/tiny")
    found = [places.at(name, "RUN") for name in directories]
    names = _apart([place.address.rstrip("/") for place in found])
    runs = [run_files.read(place, name) for place, name in zip(found, names, strict=True)]
    if page is None and len(found) == 1:
        room, name = found[0], run_page.FILE
    else:
        folder, _, name = (page or run_page.FILE).rpartition("/")
        room = places.at(folder or ".", "--page")
    if not template.is_page(room.read(name)):
        raise BadInput(f"{room}/{name} is not a page of this program: choose another --page")
    room.write_whole(name, run_page.page(runs).encode("utf-8", "replace"))
    return f"{room}/{name}"


def _apart(addresses: Sequence[str]) -> list[str]:
    """The last part of each path, or as much of it as tells them apart."""
    parts = [address.split("/") for address in addresses]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(some[-count:]) for some in parts]
        if len({*names}) == len(names):
            return names
    return [*addresses]


if __name__ == "__main__":
    command.main_with_words(lambda words: print(report(words, flags.FLAGS.page)))

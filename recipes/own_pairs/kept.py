"""Lines that a killed program can continue: JSON, one per prompt, in the order of the work."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
from typing import Any

from checkpoints_io import places
from checkpoints_io.errors import BadInput, InTheWay

Line = dict[str, Any]
MADE_WITH = "sampling.json"


def lines(directory: places.Place, name: str) -> list[Line]:
    """The lines of a file that were written completely."""
    content = directory.read(name) or b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


@contextlib.contextmanager
def adding(
    directory: places.Place, name: str, begin: list[Line]
) -> Iterator[Callable[[list[Line]], None]]:
    """A file of these lines, and a function that appends more, which are stored when it returns."""
    with directory.appending(name, written(begin)) as add:
        yield lambda some: add(written(some))


def written(some: list[Line]) -> bytes:
    """The objects as bytes, one line for each."""
    texts = (json.dumps(one, ensure_ascii=False) for one in some)
    return "".join(f"{text}\n" for text in texts).encode("utf-8", "replace")


def given(line: Line) -> dict[str, object]:
    """The chat template settings that a row asks for; older lines have none."""
    return line.get("chat_template_kwargs") or {}


def check(directory: places.Place, made_with: Mapping[str, object]) -> None:
    """Checks that the directory was made with the same settings, or records them in an empty one.

    Settings are by their flags; a dict is what identifies contents.

    Raises:
      FileExistsError: something else made the directory.
      ValueError: it was made with other settings.
    """
    found = directory.read(MADE_WITH)
    if found is None:
        if there := [name for name in directory.names() if name != "lock"]:
            raise InTheWay(
                f"--directory={directory} contains {there[0]} but no answers of this program: "
                "give another"
            )
        directory.write_whole(MADE_WITH, (json.dumps(made_with, indent=2) + "\n").encode())
        return
    before = json.loads(found)
    for name, value in made_with.items():
        if (was := before.get(name)) != json.loads(json.dumps(value)):
            told = "other contents" if isinstance(value, dict) else f"{was} before, {value} now"
            raise BadInput(
                f"--directory={directory} contains answers that were made with another --{name} "
                f"({told}): give another directory"
            )

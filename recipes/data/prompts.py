"""A file of the user's prompts, to see what a model answers to them."""

from typing import NamedTuple

from checkpoints_io.errors import BadInput
from recipes.data.ids import encode_prompts, parallel
from recipes.data.ids.encode_rows import How
from recipes.data.ids.parallel import Crew
from recipes.data.rows import sources

COLUMNS = frozenset({"prompt", "messages"})
MOST = 1024  # rows


class Prompt(NamedTuple):
    """A prompt as a model meets it."""

    row: int  # its number in the file
    ids: list[int]


def read(path: str, how: How, crew: Crew, *, plain: bool) -> list[Prompt]:
    """The prompts of a file, of any kind that data may have; `plain` texts know no chat template.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a row holds no prompt; or there are none, or too many.
    """
    rows = []
    for row in sources.read(path, COLUMNS):
        rows.append((row.where, row.fields, row.reason))
        if len(rows) > MOST:
            raise BadInput(
                f"--config.sample_prompts={path} has more than {MOST} rows: sample answers are "
                "meant to be read; keep a few prompts"
            )
    if not rows:
        raise BadInput(f"--config.sample_prompts={path} has no rows")
    found = crew.call(encode_prompts.encode, rows, how._asdict(), parallel.files_of(how), plain)
    return [Prompt(i, ids) for i, ids in enumerate(found)]

"""Look before you train: what becomes of the rows of a config, told here and on one page.

  python -m recipes.data --config=recipes/configs/tiny.py --page=data.html

Needs the tokenizer of the model and nothing else of it. Rows are packed as on one device. What is
tokenised here is kept, and the run that follows starts with it.
"""

import pathlib
import sys

from absl import flags
import ml_collections

from checkpoints_io import hf_folder
from checkpoints_io.errors import BadInput
from recipes import command, settings
from recipes.data import reading, report, shapes

PAGE = flags.DEFINE_string("page", "data.html", "Where to write the page.")
POSITIONS = 2**14  # of a micro-batch: what a GPU is given


def look(config: ml_collections.ConfigDict) -> None:
    """Reads the pairs as the run would, and tells of them.

    Raises:
      ValueError, OSError: a sentence about the settings or the data.
    """
    if config.directory is None:
        config.directory = "runs"  # nothing is written there
    settings.check(config)
    page = pathlib.Path(PAGE.value)
    if page.is_dir() or not page.parent.is_dir():
        raise BadInput(f"--page={page} cannot be written: it is a folder, or in none that exists")
    name = config.tokenizer or config.initialize_from_hf
    folder = hf_folder.find(name, files=hf_folder.TOKENIZER_FILES)
    data = reading.read(config, folder)
    shape = shapes.choose(
        [pair for part in data.train for pair in part.pairs],
        per_update=config.train_batch_size,
        shards=1,
        most=POSITIONS,
        row_length=config.row_length,
        rows=config.per_device_parallelism,
    )
    print(report.text(data.told, data.tokenizer, shape, color=sys.stdout.isatty()))
    page.write_text(report.page(data.told, data.tokenizer, shape), "utf-8")
    print(f"\nthe same as a page: {page}")


if __name__ == "__main__":
    command.main(look)

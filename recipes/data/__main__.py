"""Look before you train: what becomes of a config's rows, in the terminal and on one page.

  python -m recipes.data --config=recipes/configs/tiny.py --page=data.html
  python -m recipes.data --config=recipes/configs/tiny_sft.py

A config that names no loss and no reference is one of recipes/sft.py, and its rows hold single
answers; so do those of --config.loss=kto. Of the model it needs only the tokenizer. Rows are packed
as on one device. What is tokenised here is kept, and the run that follows starts with it.
"""

from absl import flags

if __name__ == "__main__":  # a wrong flag is answered before the imports below
    from recipes.training import command, settings

    flags.DEFINE_string("page", "data.html", "Where to write the page.")
    command.answer(None, writes=False)

import pathlib
import sys

import ml_collections

from checkpoints_io import hf_folder, places
from checkpoints_io.errors import BadInput
from recipes.data import run_data
from recipes.data.packed import shapes
from recipes.pages import data_page, template
from recipes.training import checks, command, settings, written

POSITIONS = 2**14  # of a micro-batch: what a GPU is given


def look(config: ml_collections.ConfigDict) -> None:
    """Reads the pairs, or single answers, as the run would, and reports on them.

    Raises:
      ValueError, OSError: a sentence about the settings or the data.
    """
    given = checks.checked(config, settings.table_of(settings.recipe_of(config)))
    page = pathlib.Path(flags.FLAGS.page)
    if page.is_dir() or not page.parent.is_dir():
        raise BadInput(
            f"--page={page} cannot be written: it is a folder, or its folder does not exist"
        )
    if not template.is_page(places.Disk(page.parent).read(page.name)):
        raise BadInput(f"--page={page} is not a page of this program: choose another name")
    name = given["tokenizer"] or given["initialize_from_hf"]
    folder = hf_folder.find(name, files=hf_folder.TOKENIZER_FILES)
    data = run_data.read(run_data.data_settings(given, folder, written.rows_of(given)))
    shape = shapes.choose(
        [example for part in data.train for example in part.examples],
        per_update=given["train_batch_size"],
        shards=1,
        most=POSITIONS,
        row_length=given["row_length"],
        rows=given["per_device_parallelism"],
    )
    print(data_page.text(data.sources, data.tokenizer, shape, color=sys.stdout.isatty()))
    page.write_text(data_page.page(data.sources, data.tokenizer, shape), "utf-8")
    print(f"\nalso written as a page: {page.absolute()}")


if __name__ == "__main__":
    command.main(look, None, writes=False)

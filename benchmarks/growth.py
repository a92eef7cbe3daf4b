"""Rows per CPU second and memory as data grows: 2,000, 20,000 and 200,000 rows made up here.

  python benchmarks/growth.py --rows=2000,20000,200000 --kinds=jsonl,parquet,csv

Each figure is of a process of its own: `read` is rows alone, `memory` is `pairs.read` without a
token cache, `kept` the same with an empty one, and `again` with what that left. CPU seconds are
those of reading, not of imports, with the processes it starts; memory is the peak of the first
process above what it held before, which for `kept` and `again` counts pages of files it mapped.
"""

import csv
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile

from absl import flags
import measure
import pyarrow
import pyarrow.parquet

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from recipes.data import source_pairs
from recipes.data.ids.encode_rows import How
from recipes.data.rows import sources
from recipes.data.rows.source import Source
from recipes.training import command

ROOT = pathlib.Path(__file__).parent.parent
TOKENIZER = flags.DEFINE_string("tokenizer", str(ROOT / "recipes/tiny/model"), "A folder.")
ROWS = flags.DEFINE_list("rows", ["2000", "20000", "200000"], "How many, in turn.")
MADE = ["jsonl", "json", "csv", "parquet", "arrow"]
READ = ["read", "memory", "kept", "again"]
KINDS = flags.DEFINE_list("kinds", MADE, "Of files.")
WAYS = flags.DEFINE_list("ways", READ, "Of reading them.")
WORDS = (
    "river", "bird", "metal", "colour", "planet", "tree", "is", "one", "of", "them", "and", "the",
    "other", "was", "not", "here",
)  # fmt: skip


def main() -> None:
    """Prints a table, a line for each kind of file and way.

    Raises:
      ValueError: there is no such kind of file or way, or no such number of rows.
    """
    for flag, known in ((KINDS, MADE), (WAYS, READ)):
        if odd := [word for word in flag.value if word not in known]:
            raise BadInput(f"--{flag.name}={odd[0]} is none of {', '.join(known)}")
    if odd := [word for word in ROWS.value if not word.isdecimal() or not int(word)]:
        raise BadInput(f"--rows={odd[0]} is not a number of rows")
    sizes = list(map(int, ROWS.value))
    columns = "".join(f"{size:>13,}: rows/CPU s   MiB" for size in sizes)
    print(f"{'kind':<10}{'way':<8}{columns}")
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS.value:
            paths = [pathlib.Path(scratch, f"{size}.{kind}") for size in sizes]
            for path, size in zip(paths, sizes, strict=True):
                written(path, size)
            for way in WAYS.value:
                told = [one(path, way) for path in paths]
                line = "".join(
                    f"{size / seconds:>26,.0f}{mib:>6.0f}"
                    for size, (seconds, mib) in zip(sizes, told, strict=True)
                )
                print(f"{kind:<10}{way:<8}{line}", flush=True)
            for path in paths:
                path.unlink()


def written(path: pathlib.Path, size: int) -> None:
    """Rows of about 700 bytes, no two alike."""
    draw = random.Random(0)
    said = lambda words: " ".join(draw.choices(WORDS, k=words))
    made = (
        {"prompt": f"{i}: {said(40)}?", "chosen": said(40), "rejected": said(30), "id": i}
        for i in range(size)
    )
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected", "id"])
            writer.writeheader()
            writer.writerows(made)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(made), indent=1))
    else:
        table = pyarrow.Table.from_pylist(list(made))
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table.combine_chunks())


def one(path: pathlib.Path, way: str) -> tuple[float, float]:
    """CPU seconds and MiB, of a process of its own."""
    given = [sys.executable, __file__, str(path), way, TOKENIZER.value]
    told = subprocess.run(given, cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, mib = told.stdout.split()
    return float(seconds), float(mib)


def child(path: str, way: str, tokenizer: str) -> None:
    """What `one` starts."""
    how = How(tokenizer, None, "assistant", None, 4096, "drop", 0.0)
    source = Source(path, "prompt_chosen_rejected")
    cache = places.at(f"{path}.kept") if way in ("kept", "again") else None
    next(iter(sources.read(path)))  # what is imported when it is needed
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before, since = measure.peak_mib(), cpu()
    if way == "read":
        held = sum(row.fields is not None for row in sources.read(path))
    else:
        held = source_pairs.read(source, how, cache)
    assert held
    print(cpu() - since, measure.peak_mib() - before)


def cpu() -> float:
    """Seconds of this process and of those that it started and that ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("-"):
        child(*sys.argv[1:])
    else:
        command.main_without_config(main)

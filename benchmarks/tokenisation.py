"""Pairs tokenised per CPU second, ours and the way TRL does it, on the same rows in turn; the fill.

  python benchmarks/tokenisation.py --tokenizer=Qwen3-8B --rows=dpo_en_demo.json,dpo_zh_demo.json

Ours is row -> `layouts` -> `tokens.encode`: ids, and which of them count. TRL's way is what
`DPOTrainer` asks of transformers for each pair: the chat template applied, and its text tokenised,
three times: for the prompt, and for the prompt with either answer. One thread; CPU seconds of this
process, both ways in turn on a few rows at a time; of several rounds the median. Each round begins
with new tokenizers, which have met no word: what was met before is looked up here. Its first rows
are not counted; the others are gone through twice, so that all words have been met the second time.
A long file lies between the two. The next two
columns are the whole way, from a JSONL file of messages to tokens on disk: ours `parallel.kept`,
with the workers that it starts; theirs `datasets`: a file loaded, and mapped row by row, as
`DPOTrainer` does. The file has the rows several times (`--times`), for few of them would measure
how long our workers take to start: a second each, of reading the tokenizer, which their process
has done before.

The second table is about packing: the share of the positions that is filled, and how many positions
there are for each token that a padded trainer would call real. Pairs that no row holds are left
out, and counted.
"""

import json
import os
import pathlib
import resource
import statistics
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from absl import flags
import datasets
import transformers

from checkpoints_io import places
from recipes.data.chats import chat, columns, layouts, trial
from recipes.data.chats.pair import Pair
from recipes.data.ids import encode_rows, pair_ids, parallel
from recipes.data.ids.examples import PairIds
from recipes.data.packed import packing, streams
from recipes.data.packed.packing import Shape
from recipes.training import command
from zoo.text import tokenizer

TOKENIZER = flags.DEFINE_string("tokenizer", None, "A folder.", required=True)
TEMPLATE = flags.DEFINE_string("template", None, "A file with another chat template.")
ROWS = flags.DEFINE_list("rows", None, "JSON files, a list of rows each.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each way is gone.", lower_bound=1)
DATE = flags.DEFINE_string("date", None, "The day, for a template that prints it.")
TIMES = flags.DEFINE_integer("times", 10, "Copies of the rows in a file.", lower_bound=1)
UPDATE = flags.DEFINE_integer("update", 128, "Pairs of an update.", lower_bound=1)
ROW_LENGTHS = (1024, 2048, 4096)
HEADER = f"{'ours':>8}{'theirs':>8}{'ratio':>8}"
TURN = 50  # rows of one way before the other


def main() -> None:
    """Prints two tables, a line for each file."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    (own, talk, other), pairs = fresh(), {}
    titles = "".join(f"{title:>24}{'':9}" for title in ("new words", "met words", "file to disk"))
    print(f"{'pairs per CPU second':<40} {'':>6}{titles}")
    print(f"{'':<40} {'pairs':>6}{f'{HEADER:<33}' * 3}")
    for path in map(pathlib.Path, ROWS.value):
        rows = json.loads(path.read_text())
        read = layouts.LAYOUTS[columns.recognised(rows[0])].read
        rows = [row for row in rows if row["chosen"] != row["rejected"]]
        asked = [read(row)[:3] for row in rows]
        pairs[path.name], rounds = [], []
        for _ in range(ROUNDS.value):
            ways, first = fresh(), min(TURN, len(rows) // 2)
            in_turn(rows[:first], asked[:first], *ways)
            twice = [in_turn(rows[first:], asked[first:], *ways) for _ in ("new", "met")]
            rounds.append([rates(spent, len(rows) - first) for spent in twice])
        pairs[path.name] = [encoded(read(row), own, talk) for row in rows]
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch, "rows.jsonl")
            file.write_text("".join(as_line(*pair) for pair in asked * TIMES.value))
            kept = [on_disk(file, other, number) for number in range(ROUNDS.value)]
        count = len(rows) * TIMES.value
        whole = [rates(spent, count) for spent in kept]
        told = "".join(
            "{:>8.0f}{:>8.0f}{:>8.2f}".format(*map(statistics.median, zip(*found, strict=True)))
            + " " * 9
            for found in (*zip(*rounds, strict=True), whole)
        )
        print(f"{path.name:<40} {len(rows):>6}{told}")
    print()
    lengths = "".join(f"{length:>10}: fill  per token  left out" for length in ROW_LENGTHS)
    print(f"{'rows of':<40}{lengths}")
    for name, ids in pairs.items():
        told = "".join(
            f"{share:>16.1%}{cost:>11.3f}{left_out:>10}"
            for share, cost, left_out in (packed(ids, length) for length in ROW_LENGTHS)
        )
        print(f"{name:<40}{told}")


def fresh() -> tuple:
    """Our tokenizer with its template, and transformers' own, that have met no word yet."""
    own = tokenizer.load(pathlib.Path(TOKENIZER.value), TEMPLATE.value)
    talk = trial.prepared(own, scored_turns="assistant", date=DATE.value)
    other = transformers.AutoTokenizer.from_pretrained(TOKENIZER.value)
    other.chat_template = own.chat_template
    return own, talk, other


def in_turn(rows, asked, own, talk, other) -> tuple[float, float]:
    """CPU seconds of either way."""
    read, ours, theirs = layouts.LAYOUTS[columns.recognised(rows[0])].read, 0.0, 0.0
    for start in range(0, len(rows), TURN):
        some = slice(start, start + TURN)
        since = time.process_time()
        _ = [encoded(read(row), own, talk) for row in rows[some]]
        between = time.process_time()
        _ = [as_trl(*pair, other) for pair in asked[some]]
        ours, theirs = ours + between - since, theirs + time.process_time() - between
    return ours, theirs


def rates(spent: tuple[float, float], count: int) -> tuple[float, float, float]:
    """Pairs per CPU second of either way, and how many times as many ours are."""
    ours, theirs = spent
    return count / ours, count / theirs, theirs / ours


def encoded(pair: Pair, own: tokenizer.Tokenizer, talk: chat.Chat) -> PairIds:
    """As the recipe does it."""
    return pair_ids.encode(pair, own, talk, row=0, max_length=10**6, over_length="drop")


def as_trl(prompt, chosen, rejected, other) -> tuple[list[int], ...]:
    """As `DPOTrainer` does it: ids of the prompt, and of all with either answer."""
    asked = other.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    whole = [other.apply_chat_template(prompt + x, return_dict=True) for x in (chosen, rejected)]
    return tuple(found["input_ids"] for found in (asked, *whole))


def as_line(prompt, chosen, rejected) -> str:
    """One row of a file."""
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n"


def on_disk(file: pathlib.Path, other, number: int) -> tuple[float, float]:
    """CPU seconds of either way from the file to tokens in a folder beside it, both new."""
    folder = file.with_name(str(number))
    source = encode_rows.Source(str(file), "prompt_chosen_rejected")
    how = encode_rows.How(
        TOKENIZER.value, TEMPLATE.value, "assistant", DATE.value, 10**6, "drop", 0.0
    )
    since = cpu()
    with parallel.Crew(how) as crew:
        parallel.kept(source, how, places.Disk(folder / "ours"), crew)
    between = cpu()
    rows = datasets.load_dataset("json", data_files=str(file), cache_dir=str(folder), split="train")
    rows.map(lambda row: mapped(row, other), new_fingerprint=str(number))
    return between - since, cpu() - between


def cpu() -> float:
    """Seconds of this process and of those that it started and that ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def mapped(row, other) -> dict[str, list[int]]:
    """What `DPOTrainer` makes of a row."""
    asked, *whole = as_trl(row["prompt"], row["chosen"], row["rejected"], other)
    chosen, rejected = (ids[len(asked) :] for ids in whole)
    return {"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected}


def packed(pairs: list[PairIds], row_length: int) -> tuple[float, float, int]:
    """The share of positions that is filled, positions per real token, and pairs left out."""
    shape = Shape(2, row_length, min(UPDATE.value, len(pairs)), 2, 1)
    fits = [pair for pair in pairs if streams.longest(pair) <= row_length]
    stored = positions = real = 0
    for start in range(0, len(fits), shape.examples):
        update = fits[start : start + shape.examples]
        items = [streams.item(pair, shape) for pair in update]
        rows = [row for batch in packing.pack_rows(items, shape) for row in batch]
        stored += sum(len(placed.stream.tokens) for row in rows for placed in row)
        positions += len(rows) * row_length
        real += sum(map(streams.real_tokens, update))
    return stored / positions, positions / real, len(pairs) - len(fits)


if __name__ == "__main__":
    command.main_without_config(main)

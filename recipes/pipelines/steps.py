"""The steps of a pipeline: what each runs, what its result depends on, and where that is kept."""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import json
import os
import re
import shlex
from typing import NamedTuple

from checkpoints_io import places
from checkpoints_io.errors import BadInput
from recipes.data.rows import sources
from recipes.training import by_name, overrides, records, settings

NAMES = re.compile(r"\{([\w-]+)(\.run)?\}")  # in a line: what an earlier step has made


# What a resume may change and an export depends on; the others, where a figure chooses it.
OF_EXPORTS = (
    "adapter.export", "hf_save_dtype", "hf_text_only", "keep_best", "stop_when", "stop_patience",
)  # fmt: skip
CHOOSING = ("steps_per_eval", "eval_at", "max_eval_pairs", "steps_per_checkpoint")


def last_export(directory: places.Place) -> str:
    """The last model folder that a run exported."""
    if (name := records.result(directory)) is None:
        raise BadInput(f"{directory} has no export for the next step to read")
    return directory.within(name).address


def own_pairs(directory: places.Place) -> str:
    """The file of pairs that sample_pairs.py wrote."""
    return f"{directory.address}/pairs.jsonl"


class Program(NamedTuple):
    """A program that may be a step."""

    writes: str  # the flag for its output, with the directory as {}
    makes: Callable[[places.Place], str] | None = None  # the result that later steps read
    has_settings: bool = False


PROGRAMS = {
    "recipes.data": Program("--page={}/data.html", has_settings=True),
    "recipes.sft": Program("--config.directory={}", last_export, has_settings=True),
    "recipes.dpo": Program("--config.directory={}", last_export, has_settings=True),
    "recipes.score": Program("--config.directory={}", has_settings=True),
    "recipes.sample_pairs": Program("--directory={}", own_pairs),
    "recipes.measure": Program("--output={}/results.json"),
    "recipes.report": Program("--page={}/report.html"),
}


class Step(NamedTuple):
    """A step whose command line has been parsed."""

    name: str
    program: str
    words: list[str]  # flags, with earlier steps still as {name}
    directory: places.Place
    given: Mapping[str, object]  # the settings, if the program has some


def read(path: str, directory: str) -> dict[str, Step]:
    """The steps in a file, by name, in order; all are checked before the first one is run.

    Raises:
      ValueError: it has none; or a line names an unknown program, step or setting.
    """
    if not os.path.isfile(path):
        raise BadInput(f"there is no file --config={path}")
    lines = overrides.called(path, "get_steps")
    if not isinstance(lines, dict) or not all(isinstance(one, str) for one in lines.values()):
        raise BadInput(
            f"--config={path} has no get_steps() that returns the command line of each step by name"
        )
    found: dict[str, Step] = {}
    for name, line in lines.items():
        found[name] = of_line(name, line, found, directory)
    return found


def of_line(name: str, line: str, before: Mapping[str, Step], directory: str) -> Step:
    """The step in a command line, which may name the steps before it.

    Raises:
      ValueError: as `read`.
    """
    program, *words = shlex.split(line) or [""]
    if program not in PROGRAMS:
        known = ", ".join(PROGRAMS)
        raise BadInput(f"the step {name} begins with {program!r}: give one of {known}")
    for other, run in NAMES.findall(" ".join(words)):
        if other not in before:
            raise BadInput(f"the step {name} names {{{other}}}, which is not an earlier step")
        if not run and PROGRAMS[before[other].program].makes is None:
            raise BadInput(
                f"the step {name} names {{{other}}}, but {before[other].program} produces nothing "
                f"that a program reads; {{{other}.run}} is its directory"
            )
    for word in words:
        _refuse_unread(name, word, before)
    # An earlier step's result depends on everything that determines its address.
    address = lambda found: f"<{_last(before[found[1]].directory)}>"
    said = [NAMES.sub(address, word) for word in words]
    given = _settings(program, said) if PROGRAMS[program].has_settings else {}
    depends_on = _facts(given) if given else _facts_of_words(said)
    digest = hashlib.sha256(json.dumps([program, depends_on], default=str).encode()).hexdigest()
    place = places.at(directory, "--directory").within(f"{name}-{digest[:8]}")
    return Step(name, program, words, place, given)


def _refuse_unread(name: str, word: str, before: Mapping[str, Step]) -> None:
    """Refuses a word that names a result that an earlier run does not make, or not readably."""
    flag = word.partition("=")[0]
    for other, is_directory in NAMES.findall(word):
        given = before[other].given
        if is_directory or "steps_per_hf_export" not in given:
            continue
        if given["steps_per_hf_export"] == -1:
            raise BadInput(
                f"the step {name} names {{{other}}}, which exports nothing: leave out "
                "--config.steps_per_hf_export=-1"
            )
        has_adapters = given["adapter.rank"] is not None or given["adapter.path"] is not None
        is_model = flag in ("--config.initialize_from_hf", "--config.reference_model_path")
        if has_adapters and given["adapter.export"] != "merged" and is_model:
            raise BadInput(
                f"the step {name} names {{{other}}} as {flag}, but that step exports adapters: "
                "set --config.adapter.export=merged there, or name it as --config.adapter.path"
            )


def words_of(step: Step, known: Mapping[str, Step]) -> list[str]:
    """The flags to start the step with, now that the steps before it are done."""

    def made(found: re.Match[str]) -> str:
        other = known[found[1]]
        makes = PROGRAMS[other.program].makes
        return other.directory.address if found[2] or not makes else makes(other.directory)

    words = [NAMES.sub(made, word) for word in step.words]
    return [*words, PROGRAMS[step.program].writes.format(step.directory)]


def _last(directory: places.Place) -> str:
    return directory.address.rpartition("/")[2]


def _settings(program: str, words: list[str]) -> Mapping[str, object]:
    """The settings that result from the flags."""
    opened = overrides.opened([program, *words], settings.table_of(settings.DPO))
    table = settings.table_of(settings.recipe_of(opened.names))
    return by_name.plain(overrides.changed(opened, table), table)


def _facts(given: Mapping[str, object]) -> list[object]:
    """The settings that affect a result, and the contents of the data that they name."""
    chosen = given["keep_best"] or given["stop_when"]
    also = {*OF_EXPORTS, *(CHOOSING if chosen else ())}
    shaping = sorted((k, x) for k, x in given.items() if k in also or not settings.ALL[k].free)
    return [shaping, _contents(_texts([given["train_data"], given["validation"]]))]


def _facts_of_words(words: list[str]) -> list[object]:
    """The flags, and the contents of the files that they name."""
    texts = [word.partition("=")[2] or word for word in words]
    return [words, _contents([text for text in texts if os.path.isfile(text)])]


def _texts(value: object) -> list[str]:
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _contents(texts: list[str]) -> list[dict[str, object]]:
    """What identifies the data; if it cannot be found now, its step will report that."""
    found = []
    for text in texts:
        with contextlib.suppress(BadInput, OSError):
            found.append(sources.identity(text))
    return found

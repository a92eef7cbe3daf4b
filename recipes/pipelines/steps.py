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
from recipes.training import by_name, overrides, settings

NAMES = re.compile(r"\{([\w-]+)(\.run)?\}")  # in a line: what an earlier step has made


def last_export(directory: places.Place) -> str:
    """The newest model folder of a run."""
    exports = directory.within("hf")
    steps = [name for name in exports.names() if re.fullmatch(r"step-\d+", name)]
    if not steps:
        raise BadInput(f"{directory} has no export, which the next step is to read")
    return exports.within(max(steps, key=lambda name: int(name.removeprefix("step-")))).address


def own_pairs(directory: places.Place) -> str:
    """The file of pairs."""
    return f"{directory.address}/pairs.jsonl"


class Program(NamedTuple):
    """A program that may be a step."""

    writes: str  # the flag that says where, with the directory as {}
    makes: Callable[[places.Place], str] | None = None  # what later steps read
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
    """A step whose line has been read."""

    name: str
    program: str
    words: list[str]  # flags, in which earlier steps are still named
    directory: places.Place


def read(path: str, directory: str) -> dict[str, Step]:
    """The steps that a file has, by name, in order; all are looked at before one is run.

    Raises:
      ValueError: it has none; or a line names no program, no earlier step, or no such setting.
    """
    if not os.path.isfile(path):
        raise BadInput(f"there is no file --config={path}")
    lines = overrides.called(path, "get_steps")
    if not isinstance(lines, dict) or not all(isinstance(one, str) for one in lines.values()):
        raise BadInput(
            f"--config={path} has no get_steps() that gives the line of each step by its name"
        )
    found: dict[str, Step] = {}
    for name, line in lines.items():
        found[name] = of_line(name, line, found, directory)
    return found


def of_line(name: str, line: str, before: Mapping[str, Step], directory: str) -> Step:
    """A step of a line, which may name those before it.

    Raises:
      ValueError: as `read`.
    """
    program, *words = shlex.split(line) or [""]
    if program not in PROGRAMS:
        known = ", ".join(PROGRAMS)
        raise BadInput(f"the step {name} begins with {program!r}: give one of {known}")
    for other, run in NAMES.findall(" ".join(words)):
        if other not in before:
            raise BadInput(f"the step {name} names {{{other}}}, which is no step before it")
        if not run and PROGRAMS[before[other].program].makes is None:
            raise BadInput(
                f"the step {name} names {{{other}}}, but {before[other].program} makes nothing "
                f"that a program reads; {{{other}.run}} is its directory"
            )
    # What an earlier step makes depends on all that its address does.
    address = lambda found: f"<{_last(before[found[1]].directory)}>"
    depends_on = _facts(program, [NAMES.sub(address, word) for word in words])
    digest = hashlib.sha256(json.dumps([program, depends_on], default=str).encode()).hexdigest()
    place = places.at(directory, "--directory").within(f"{name}-{digest[:8]}")
    return Step(name, program, words, place)


def words_of(step: Step, known: Mapping[str, Step]) -> list[str]:
    """The flags that the step is started with, now that those before it are done."""

    def made(found: re.Match[str]) -> str:
        other = known[found[1]]
        makes = PROGRAMS[other.program].makes
        return other.directory.address if found[2] or not makes else makes(other.directory)

    words = [NAMES.sub(made, word) for word in step.words]
    return [*words, PROGRAMS[step.program].writes.format(step.directory)]


def _last(directory: places.Place) -> str:
    return directory.address.rpartition("/")[2]


def _facts(program: str, words: list[str]) -> list[object]:
    """The flags, or the settings that they come to; and the contents of the data that they name."""
    if not PROGRAMS[program].has_settings:
        texts = [word.partition("=")[2] or word for word in words]
        return [words, _contents([text for text in texts if os.path.isfile(text)])]
    opened = overrides.opened([program, *words], settings.table_of(settings.DPO))
    table = settings.table_of(settings.recipe_of(opened.names))
    given = by_name.plain(overrides.changed(opened, table), table)
    shaping = sorted((name, x) for name, x in given.items() if not table[name].free)
    return [shaping, _contents(_texts([given["train_data"], given["validation"]]))]


def _texts(value: object) -> list[str]:
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _contents(texts: list[str]) -> list[dict[str, object]]:
    """What identifies the data; what cannot be found now, its step complains about."""
    found = []
    for text in texts:
        with contextlib.suppress(BadInput, OSError):
            found.append(sources.identity(text))
    return found

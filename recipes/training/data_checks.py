"""Checks of the settings that say what is read: sources, sets that are held out, rows."""

from collections.abc import Iterable
import datetime

from checkpoints_io.errors import BadInput
from recipes.data.chats import layouts
from recipes.data.rows import source
from recipes.training import written
from recipes.training.by_name import Values
from recipes.training.nearest import did_you_mean


def check(given: Values, *, pairs: bool) -> None:
    """Refuses what cannot be read, what contradicts another setting, and what has no effect.

    Raises:
      ValueError: with the flag to change.
    """
    _check_sources(given)
    _check_rows(given, pairs)
    if "validation_texts" in given:
        _check_texts(given)
        _check_tasks(given)


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Refuses a value that is not one of the known ones."""
    if value not in known:
        raise BadInput(
            f"--config.{name}={value!r} is not one of "
            f"{', '.join(known)}{did_you_mean(value, known)}"
        )


def _check_sources(given: Values) -> None:
    common = source.common(given, written.rows_of(given))
    if common.single and given["data.answers"] != 2:
        raise BadInput(
            f"--config.data.answers={given['data.answers']} has no effect: this run trains on "
            "single answers; leave it out"
        )
    read = {
        f"train_data.{name}.": one.source
        for name, one in source.training(given["train_data"], common).items()
    }
    for name, one in source.held_out(given["validation"]).items():
        read[f"validation.{name}."] = source.parsed(f"validation.{name}", one, common)
    known = layouts.columns_of(single=common.single)
    for where, one in read.items():
        if one.layout is not None:
            prefix = "data." if one.layout == given["data.layout"] else where
            one_of(f"{prefix}layout", one.layout, layouts.named(single=common.single))
        is_common = dict(one.columns) == common.columns
        columns = f"--config.{'data.' if is_common else where}columns"
        for column, theirs in one.columns:
            if column not in known:
                raise BadInput(f"{columns} has no column {column!r}{did_you_mean(column, known)}")
            if not isinstance(theirs, str):
                raise BadInput(f"{columns}.{column}={theirs!r} is not a column name")
    try:
        datetime.date.fromisoformat(given["data.date"] or "2026-01-31")
    except ValueError as error:
        raise BadInput(
            f"--config.data.date={given['data.date']!r} is not of the form 2026-01-31"
        ) from error
    if given["validation_split_fraction"] and "validation" in (given["validation"] or {}):
        raise BadInput(
            "--config.validation_split_fraction creates a held-out set named `validation`: "
            "rename the one in --config.validation"
        )
    held_out = given["validation"] or given["validation_split_fraction"]
    held_out = held_out or given.get("validation_texts") or given.get("tasks")
    if given.get("max_eval_pairs") and not held_out:
        raise BadInput("--config.max_eval_pairs has no effect: nothing is held out")


def _check_texts(given: Values) -> None:
    texts = given["validation_texts"]
    if texts is None:
        return
    if not isinstance(texts, dict):
        raise BadInput(
            f"--config.validation_texts={texts!r} has no name: write "
            f"--config.validation_texts.wiki={texts}, and metrics are logged under eval/wiki"
        )
    others = {
        *(given["validation"] or ()),
        *(["validation"] * bool(given["validation_split_fraction"])),
    }
    for name, path in texts.items():
        if not isinstance(path, str):
            raise BadInput(f"--config.validation_texts.{name}={path!r} is not a path")
        if name in others:
            raise BadInput(
                f"--config.validation_texts.{name} has the same name as a held-out set, so that "
                "their metrics could not be told apart: rename it"
            )


def _check_tasks(given: Values) -> None:
    if given["tasks_folder"] is not None and not given["tasks"]:
        raise BadInput(
            f"--config.tasks_folder={given['tasks_folder']} has no effect without --config.tasks"
        )
    named = given["validation_texts"] or {}, given["validation"] or {}
    for name in given["tasks"]:
        if any(name in some for some in named):
            raise BadInput(
                f"--config.tasks={name} has the same name as a held-out set, so that their "
                "metrics could not be told apart: rename the set"
            )


def _check_rows(given: Values, pairs: bool) -> None:
    row, longest = given["row_length"], given["train_seq_len"]
    if row is not None and longest > row:
        raise BadInput(
            f"--config.train_seq_len={longest} does not fit into rows of --config.row_length={row}"
        )
    if "train_batch_size" not in given:
        return
    rows, examples = given["per_device_parallelism"], given["train_batch_size"]
    most = given["data.answers"] if pairs else 1
    what, told = {1: ("answers", "one"), 2: ("pairs", "two")}.get(most, ("lists", most))
    if (rows or 0) > most * examples:
        raise BadInput(
            f"--config.per_device_parallelism={rows} is more rows than the {examples} {what} of "
            f"an update (--config.train_batch_size) can fill: each takes at most {told}"
        )

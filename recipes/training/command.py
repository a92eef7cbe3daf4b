"""The command line: flags that change a config, errors that are sentences, an exit status.

The status tells what starts runs how one ended: 0 finished; 1 an error; 2 a wrong command, which no
second try helps; 75 asked to stop, and the same command resumes it; 130 a second Ctrl-C.

Nothing here is slow to import: a program reads its flags before its other imports, so that a wrong
flag is answered at once.
"""

from collections.abc import Callable, Mapping
import contextlib
import errno
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging
import ml_collections

from checkpoints_io import compiled, errors
from checkpoints_io.errors import BadInput
from checkpoints_io.unseen import visible
from recipes import terminal
from recipes.training import by_name, checks, listing, overrides, wrong_flags
from recipes.training.settings import DPO, Groups, Table, recipe_of, table_of, trains

MORE_TO_DO = os.EX_TEMPFAIL  # 75
HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")
# What `answer` has read is kept for `main`: a config file is a program, which runs once.
_answered: list["Given"] = []
# The program as a shell is told it, and the words that started it, for `again`.
_started: list[str] = []


class Given(NamedTuple):
    """What a program was started with."""

    config: ml_collections.ConfigDict
    table: Table  # its settings
    rest: list[str]  # the remaining arguments
    note: str  # what else became of the config


def answer(groups: Groups | None, *, writes: bool = True) -> None:
    """Ends the program here if its flags ask for help (status 0) or are wrong (status 2).

    It takes `--config=FILE --config.NAME=VALUE …`, with the settings of the groups; of None, with
    those of the recipe that the config is for. A program that `writes` nothing needs no directory.
    One that trains, without a word, runs the small config that is shipped.
    """
    terminal.hold()
    _leave_when_asked()
    _take_the_shipped(groups, writes)
    _answered.append(_read(groups, sys.argv, writes=writes))


def main(
    program: Callable[[ml_collections.ConfigDict], bool | None],
    groups: Groups | None,
    *,
    joins: bool = False,
    writes: bool = True,
) -> None:
    """Reads the flags, unless `answer` has, and runs a program with its config.

    An error that the user can fix ends it with one sentence, status 1. A program that was asked to
    stop before its end returns False. `joins`: the processes that `config.distributed` describes
    work on it together.
    """
    terminal.hold()
    _leave_when_asked()
    _take_the_shipped(groups, writes)
    module = sys.modules["__main__"].__spec__  # as Python's -m has it
    begun = f"-m {module.name}" if module else shlex.quote(sys.argv[0])
    _started[:] = [begun, *sys.argv[1:]]
    given: list[Given] = []

    def parsed(argv: list[str]) -> list[str]:
        given.append(_answered.pop() if _answered else _read(groups, argv, writes=writes))
        return given[0].rest

    started = lambda _: _with_config(
        program, given[0].config, given[0].table, joins=joins, note=given[0].note
    )
    app.run(started, flags_parser=parsed)


def again(others: Mapping[str, str]) -> str:
    """A line for a shell: the command that started this program, with these settings instead.

    Where no command did, as in a notebook, the settings alone.
    """
    flags_of = [f"--config.{name}={shlex.quote(value)}" for name, value in others.items()]
    kept, words = [], iter(_started[1:])
    for word in words:
        name, equals, _ = word.removeprefix("--config.").partition("=")
        if word.startswith("--config.") and name in others:
            if not equals:  # its value is a word of its own
                next(words, None)
            continue
        kept.append(shlex.quote(word))
    begun = [python(), _started[0]] if _started else []
    return " ".join([*begun, *kept, *flags_of])


def python() -> str:
    """What a shell calls the Python that runs this."""
    return "python" if sys.executable == shutil.which("python") else shlex.quote(sys.executable)


def main_without_config(program: Callable[[], None]) -> None:
    """Reads the program's own flags and runs it."""
    terminal.hold()
    parsed = lambda argv: _parsed(argv, {}, lambda argv: argv, lambda: "")
    app.run(lambda _: _in_sentences(program, []), flags_parser=parsed)


def main_with_words(program: Callable[[list[str]], None]) -> None:
    """Reads the program's own flags, and runs it with the words beside them, like directories."""
    terminal.hold()
    parsed = lambda argv: _parsed(argv, {}, lambda argv: argv, lambda: "", words=True)
    app.run(lambda argv: _in_sentences(lambda: program(argv[1:]), []), flags_parser=parsed)


def _take_the_shipped(groups: Groups | None, writes: bool) -> None:
    """Gives a bare command that trains the small config that is shipped, and says so."""
    if len(sys.argv) == 1 and groups and writes and trains(table_of(groups)):
        shipped = by_name.example(table_of(groups))
        terminal.write(f"no --config given: using the small run of --config={shipped}")
        sys.argv.append(f"--config={shipped}")


def _read(groups: Groups | None, argv: list[str], *, writes: bool) -> Given:
    """The config with its flags, checked against the groups."""
    table = table_of(groups or DPO)  # which has the settings of every recipe
    given: list[tuple[ml_collections.ConfigDict, Table, str]] = []

    def without_settings(argv: list[str]) -> list[str]:
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        opened = overrides.opened(argv, table)
        own = table_of(groups or recipe_of(opened.names))
        if not writes:
            own["directory"] = own["directory"]._replace(default=None, unset="nothing is written")
        left = overrides.left_behind(opened)
        config = overrides.changed(opened, own)
        if left:
            overrides.leave(config, left, opened)
        if not writes and config.get("directory") is None:
            with config.unlocked(), config.ignore_type():
                config.directory = "runs"
        checks.checked(config, own)
        given.append((config, own, _left(left, config) if left else ""))
        return opened.others

    rest = _parsed(argv, table, without_settings, lambda: _listed(groups, argv))
    config, own, note = given[0]
    return Given(config, own, rest, note)


def _left(sets: list[str], config: ml_collections.ConfigDict) -> str:
    """The note about held-out sets that are left out."""
    told = f"--config.train_data={config.train_data}: the config's own held-out data "
    told += f"({', '.join(sets)}) belongs to other data and is left out"
    if not config.validation and config.validation_split_fraction is not None:
        told += f"; {config.validation_split_fraction:.0%} of the prompts are held out instead"
    return f"{told} (--config.validation.NAME=FILE sets a held-out file)"


def _with_config(
    program: Callable[[ml_collections.ConfigDict], bool | None],
    config: ml_collections.ConfigDict,
    table: Table,
    *,
    joins: bool = False,
    note: str = "",
) -> int:
    """Runs the program with its config; returns the exit status."""
    several = config.distributed.to_dict() if "distributed" in config else {}
    together = several.pop("enabled", False) and joins

    def started() -> bool | None:
        import jax  # late, so that wrong flags are answered before it

        if name := by_name.plain(config, table)["compile_cache"]:
            compiled.keep(name, "--config.compile_cache")
        if together:
            _join(several)
        taken = listing.taken(by_name.left_out(config, table), table)
        taken = "\n".join(filter(None, (note, taken)))
        if taken and (not together or jax.process_index() == 0):  # which starts the devices
            terminal.write(taken)
        return program(config)

    try:
        finished = _in_sentences(started, checks.less_memory(by_name.plain(config, table)))
    except BaseException as error:
        # A thread that still saves, or reads data, would delay an interrupted program for minutes.
        if together or isinstance(error, KeyboardInterrupt | Left):
            _end_at_once(error)
        raise
    return MORE_TO_DO if finished is False else 0


class Left(SystemExit):
    """Ends at a signal where there is nothing to save; the steps have `stop_on_signals` for it."""


def _leave_when_asked() -> None:
    """SIGTERM ends the program with the status of a run that has more to do."""

    def leave(*_: object) -> NoReturn:
        raise Left(MORE_TO_DO)

    if threading.current_thread() is threading.main_thread():  # where signals come
        signal.signal(signal.SIGTERM, leave)


def _in_sentences(program: Callable[[], bool | None], less_memory: list[str]) -> bool | None:
    """Prints an error that the user can fix as a sentence; `less_memory` are flags that help."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it writes
    try:
        return program()
    except errors.UserError as error:
        _stop(str(error), 1)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        # Orbax has the same word for a full disk, which `run_state` puts into a sentence.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            less = "".join(f"keep less in memory with {flag}; " for flag in less_memory)
            _stop(
                "the devices ran out of memory. On accelerators set --config.remat=full; lower "
                "--config.per_device_parallelism, then --config.row_length with "
                f"--config.train_seq_len; {less}or split the weights "
                f"over more devices with --config.mesh.fsdp. ({str(error).split(chr(10))[0]})",
                1,
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(
                f"the disk is full ({error.filename or error}): free some space; the same command "
                "resumes from the newest checkpoint",
                1,
            )
        if isinstance(error, OSError) and error.filename and error.strerror:
            _stop(f"{error.filename}: {error.strerror}", 1)
        raise


def _parsed(
    argv: list[str],
    table: Table,
    without_settings: Callable[[list[str]], list[str]],
    listed: Callable[[], str],
    *,
    words: bool = False,
) -> list[str]:
    """Answers `--help` and wrong flags; leaves the others to absl. `words` may stand beside."""
    if any(arg in HELP for arg in argv[1:]):
        print((sys.modules["__main__"].__doc__ or "").strip())
        if own := flags.FLAGS.main_module_help():
            print(f"\nFlags:\n{own}")
        print(listed())
        sys.exit(0)
    try:
        app.define_help_flags()
        rest = flags.FLAGS(without_settings(argv))
    except flags.UnrecognizedFlagError as error:
        _stop(wrong_flags.unknown(error.flagname, argv, table))
    except flags.Error as error:
        _stop(wrong_flags.of_absl(error))
    except errors.UserError as error:
        _stop(str(error))
    if len(rest) > 1 and not words:
        _stop(wrong_flags.no_flag(rest[1], table))
    return rest


def _listed(groups: Groups | None, argv: list[str]) -> str:
    """The settings, with their values in the config given with `--help`, if there is one."""
    shown, values = groups or DPO, {}
    with contextlib.suppress(errors.UserError):
        opened = overrides.opened([arg for arg in argv if arg not in HELP], table_of(shown))
        shown = groups or recipe_of(opened.names)
        values = by_name.plain(overrides.changed(opened, table_of(shown)), table_of(shown))
    return listing.text(shown, values)


def _end_at_once(error: BaseException) -> None:
    """Ends without waiting for threads or other processes; jax ends those waiting for this one."""
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    try:
        if isinstance(error, KeyboardInterrupt):
            status = 130  # as shells call it
            print("interrupted", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # its reader may be gone
        os._exit(status)


def _join(several: dict[str, Any]) -> None:
    import jax

    try:
        jax.distributed.initialize(**several)
    except Exception as error:  # jax raises another type for every cause
        raise BadInput(
            "the processes of this run could not connect with the given --config.distributed: "
            f"{str(error).strip()}"
        ) from error


def _stop(sentence: str, status: int = 2) -> NoReturn:
    print(f"error: {visible(sentence)}", file=sys.stderr)
    sys.exit(status)

"""The command line: flags that override a config, and errors that are sentences."""

from collections.abc import Callable
import errno
import os
import re
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
import jax
import ml_collections

from checkpoints_io import errors, places
from checkpoints_io.errors import BadInput
from recipes import overrides, settings, terminal
from recipes.data import messages

SETTINGS = "The settings of a run, and what they mean, stand in its config file; see docs/dpo.md."
HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")


def main(train: Callable[[ml_collections.ConfigDict], None], *, joins: bool = False) -> None:
    """Reads `--config=FILE --config.NAME=VALUE …` and runs `train`.

    `joins`: the processes that `config.distributed` tells of work on it together.
    """
    given: list[ml_collections.ConfigDict] = []

    def without_settings(argv: list[str]) -> list[str]:
        config, others = overrides.read(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
        given.append(config)
        return others

    about = f"{sys.modules[train.__module__].__doc__}\n{SETTINGS}"
    _start(lambda: _run(train, given[0], joins=joins), about, without_settings)


def main_without_config(program: Callable[[], None]) -> None:
    """Reads the program's own flags and runs it."""
    _start(lambda: _told(program), sys.modules[program.__module__].__doc__ or "")


def _start(
    program: Callable[[], None],
    about: str,
    without_settings: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """What a person can mend ends in one sentence and status 1, or 2 for the command itself."""
    terminal.hold()

    def parsed(argv: list[str]) -> list[str]:
        if any(arg in HELP for arg in argv[1:]):
            print(about.strip())
            if own := flags.FLAGS.main_module_help():
                print(f"\nFlags:\n{own}")
            sys.exit(0)
        try:
            rest = flags.FLAGS(without_settings(argv) if without_settings else argv)
        except flags.UnrecognizedFlagError as error:
            _stop(_unknown(error.flagname, argv, settings_too=bool(without_settings)))
        except flags.Error as error:
            _stop(_of_absl(error))
        except errors.UserError as error:
            _stop(str(error))
        if len(rest) > 1:
            _stop(_no_flag(rest[1], settings_too=bool(without_settings)))
        return rest

    app.run(lambda _: program(), flags_parser=parsed)


def _unknown(name: str, argv: list[str], *, settings_too: bool) -> str:
    """What to type in place of a flag that there is not."""
    value = next((a.partition("=")[2] for a in argv if a.lstrip("-").startswith(f"{name}=")), "…")
    if near := settings.nearest(name, [*flags.FLAGS]):
        return f"there is no flag --{name} (did you mean --{near}?)"
    if not settings_too:
        return f"there is no flag --{name}"
    if near := settings.nearest(name, settings.KINDS):
        return f"there is no flag --{name}: write --config.{near}={value}"
    return f"there is no flag --{name}; settings are given as --config.NAME=VALUE"


def _no_flag(word: str, *, settings_too: bool) -> str:
    """What to type in place of a word that is no flag."""
    bare = re.sub(r"^[-–—]+", "", word)  # documents make one long dash of two hyphens
    name, equals, value = bare.partition("=")
    if name in flags.FLAGS:
        return f"{word!r} is no flag: write --{bare}"
    if not settings_too:
        return f"{word!r} is no flag, and only flags are read"
    if equals and (near := settings.nearest(name.removeprefix("config."), settings.KINDS)):
        return f"{word!r} is no flag: write --config.{near}={value}"
    return f"{word!r} is no flag; settings are given as --config.NAME=VALUE"


def _of_absl(error: flags.Error) -> str:
    told = str(error).strip().partition("\n")[0]
    kinds = {"invalid literal for int": "a whole number", "could not convert string": "a number"}
    for reason, kind in kinds.items():
        if wrong := re.fullmatch(rf"flag (--\w+)=(.*): {reason}.*", told):
            return f"{wrong[1]}={wrong[2]!r} is not {kind}"
    missing = re.fullmatch(r"flag (--\w+)=None: Flag .* must have a value other than None\.", told)
    return f"give {missing[1]}=…" if missing else told.removeprefix("ERROR:: ")


def _run(
    train: Callable[[ml_collections.ConfigDict], None],
    config: ml_collections.ConfigDict,
    *,
    joins: bool = False,
) -> None:
    several = config.distributed.to_dict()
    together = several.pop("enabled") and joins

    def started() -> None:
        if config.compile_cache:
            cache = places.at(config.compile_cache, "--config.compile_cache")
            jax.config.update("jax_compilation_cache_dir", cache.address)
        if together:
            _join(several)
        train(config)

    try:
        _told(started)
    except BaseException as error:
        # A thread that still saves, or reads data, would keep an interrupted program for minutes.
        if together or isinstance(error, KeyboardInterrupt):
            _end_at_once(error)
        raise


def _end_at_once(error: BaseException) -> None:
    """Without waiting for threads or other processes; jax ends those that wait for this one."""
    status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    try:
        if isinstance(error, KeyboardInterrupt):
            status = 130  # as shells call it
            print("interrupted", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # whoever read it may be gone
        os._exit(status)


def _told(program: Callable[[], None]) -> None:
    """Runs it; an error that a person can mend becomes a sentence."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    try:
        program()
    except errors.UserError as error:
        _stop(str(error), 1)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        # Orbax has the same word for a full disk, which `run_state` puts into a sentence.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _stop(
                "the devices ran out of memory. Turn down --config.per_device_parallelism first, "
                "then --config.row_length with --config.train_seq_len; drop the reference with "
                "--config.reference_mode=cached; or split the weights over more devices with "
                f"--config.mesh.fsdp. ({str(error).split(chr(10))[0]})",
                1,
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(
                f"the disk is full ({error.filename or error}): make room, and the same command "
                "goes on from the newest checkpoint",
                1,
            )
        if isinstance(error, OSError) and error.filename and error.strerror:
            _stop(f"{error.filename}: {error.strerror}", 1)
        raise


def _join(several: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(**several)
    except Exception as error:  # jax raises a kind of its own for every cause
        raise BadInput(
            "the processes of this run could not join, with the settings of --config.distributed: "
            f"{str(error).strip()}"
        ) from error


def _stop(sentence: str, status: int = 2) -> NoReturn:
    print(f"error: {messages.visible(sentence)}", file=sys.stderr)
    sys.exit(status)

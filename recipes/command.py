"""The command line: flags that override a config, and errors that are sentences."""

from collections.abc import Callable
import errno
import functools
import linecache
import os
import pathlib
import re
import runpy
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from recipes import settings, terminal
from recipes.data import messages

OURS = ("zoo", "checkpoints_io", "recipes")


def main(train: Callable[[ml_collections.ConfigDict], None]) -> None:
    """Reads `--config=FILE --config.NAME=VALUE …` and runs `train`.

    What a person can mend ends in one sentence and exit status 1 (2: the command itself).
    """
    terminal.hold()
    holder = config_flags.DEFINE_config_file("config", None, "The run: a file in recipes/configs.")
    app.run(lambda argv: _run(train, holder.value, argv), flags_parser=_parsed)


def _parsed(argv: list[str]) -> list[str]:
    if any(arg in ("--help", "-h", "--helpfull", "--helpshort") for arg in argv):
        print(__doc__, "Settings and their meanings stand in the config file; see docs/dpo.md.")
        sys.exit(0)
    path = _path(argv)
    if path is None:
        _stop("give a config, for example --config=recipes/configs/tiny.py")
    if not pathlib.Path(path.partition(":")[0]).is_file():
        _stop(f"there is no config file {path!r}")
    # `--config.NAME=None` leaves a setting unset; ml_collections would read None as a number.
    unset = [m[1] for arg in argv if (m := re.fullmatch(r"--?config\.(\S+)=(?:None|none)", arg))]
    if wrong := [name for name in unset if name not in settings.OPTIONAL]:
        _stop(f"--config.{wrong[0]} cannot be unset")
    kept = [a for a in argv if not re.fullmatch(r"--?config\.\S+=(?:None|none)", a)]
    sys.argv = kept  # config_flags looks for its overrides there
    try:
        rest = flags.FLAGS(kept)
        config: Any = flags.FLAGS["config"].value
        for name in unset:
            *rooms, last = name.split(".")
            functools.reduce(lambda at, room: at[room], rooms, config)[last] = None
        return rest
    except (AttributeError, KeyError, flags.UnrecognizedFlagError) as error:
        _stop(_unknown(argv, path) or f"{path} or a flag cannot be understood: {error}")
    except flags.Error as error:
        _stop(str(error).strip().splitlines()[0])
    except Exception as error:  # a config file is a program, and may fail as one
        told = (str(error).strip().splitlines() or [""])[0]
        _stop(f"{path} or a flag cannot be understood: {type(error).__name__}: {told}")


def _path(argv: list[str]) -> str | None:
    for arg, following in zip(argv, [*argv[1:], None], strict=True):
        if arg in ("--config", "-config"):
            return following
        if found := re.match(r"--?config=(.*)", arg):
            return found[1]
    return None


def _unknown(argv: list[str], path: str) -> str | None:
    """Which of the flags names no setting, and which one is nearest."""
    try:
        known = [name for name, _ in settings.flat(runpy.run_path(path)["get_config"]())]
    except Exception:  # not a config at all
        return f"{path} is not a config: it has no get_config() that gives one"
    for arg in argv:
        name = re.match(r"--?(?:no)?config\.([^=]+)", arg)
        if name and name[1] not in known:
            near = settings.did_you_mean(name[1], known)
            return f"{path} has no setting {name[1]!r}{near}"
    return None


def _run(
    train: Callable[[ml_collections.ConfigDict], None],
    config: ml_collections.ConfigDict,
    argv: list[str],
) -> None:
    if len(argv) > 1:
        _stop(f"{argv[1]!r} is no flag; settings are given as --config.NAME=VALUE")
    try:
        _trained(train, config)
    except BaseException as error:
        # A thread that still saves, or reads data, would keep an interrupted program for minutes.
        if config.distributed.enabled or isinstance(error, KeyboardInterrupt):
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


def _trained(
    train: Callable[[ml_collections.ConfigDict], None], config: ml_collections.ConfigDict
) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    try:
        if config.compile_cache:
            cache = pathlib.Path(config.compile_cache).expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache))
        several = config.distributed.to_dict()
        if several.pop("enabled"):
            _join(several)
        train(config)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        # Orbax has the same word for a full disk, which `run_state` puts into a sentence.
        exhausted = "RESOURCE_EXHAUSTED" in str(error) and not _said_by_us(error)
        if isinstance(error, MemoryError) or exhausted:
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
        if not _said_by_us(error):
            raise
        _stop(str(error), 1)


def _join(several: dict[str, Any]) -> None:
    try:
        jax.distributed.initialize(**several)
    except Exception as error:  # jax raises a kind of its own for every cause
        raise ValueError(
            "the processes of this run could not join, with the settings of --config.distributed: "
            f"{str(error).strip()}"
        ) from error


def _said_by_us(error: BaseException) -> bool:
    """Is it the sentence of a `raise` of ours? Anything else is a bug and keeps its traceback."""
    frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
    path = pathlib.Path(frame.f_code.co_filename).resolve()
    root = pathlib.Path(__file__).resolve().parent.parent
    ours = any(path.is_relative_to(root / name) for name in OURS)
    return ours and linecache.getline(str(path), number).lstrip().startswith("raise ")


def _stop(sentence: str, status: int = 2) -> NoReturn:
    print(f"error: {messages.visible(sentence)}", file=sys.stderr)
    sys.exit(status)

"""The command line: flags that override a config, and errors that are sentences."""

from collections.abc import Callable
import pathlib
import re
import runpy
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from recipes import settings

OURS = ("zoo", "checkpoints_io", "recipes")


def main(train: Callable[[ml_collections.ConfigDict], None]) -> None:
    """Reads `--config=FILE --config.NAME=VALUE …` and runs `train`.

    What a person can mend ends in one sentence and exit status 1 (2: the command itself).
    """
    holder = config_flags.DEFINE_config_file("config", None, "The run: a file in recipes/configs.")
    app.run(lambda argv: _run(train, holder.value, argv), flags_parser=_parsed)


def _parsed(argv: list[str]) -> list[str]:
    path = next((a.partition("=")[2] for a in argv if re.match(r"--?config=", a)), None)
    if path is None:
        _stop("give a config, for example --config=recipes/configs/tiny.py")
    if not pathlib.Path(path).is_file():
        _stop(f"there is no config file {path!r}")
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, flags.UnrecognizedFlagError) as error:
        _stop(_unknown(argv, path) or str(error))
    except (flags.Error, TypeError, ValueError) as error:
        _stop(str(error))


def _unknown(argv: list[str], path: str) -> str | None:
    """Which of the flags names no setting, and which one is nearest."""
    known = [name for name, _ in settings.flat(runpy.run_path(path)["get_config"]())]
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
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    try:
        several = config.distributed.to_dict()
        if several.pop("enabled"):
            jax.distributed.initialize(**several)
        train(config)
    except (ValueError, OSError, RuntimeError) as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
            _stop(
                "the devices ran out of memory. Turn down --config.per_device_parallelism first, "
                "then --config.row_length with --config.train_seq_len; or split the weights over "
                f"more devices with --config.mesh.fsdp. ({str(error).splitlines()[0]})",
                1,
            )
        if not _said_by_us(error):
            raise
        _stop(str(error), 1)


def _said_by_us(error: BaseException) -> bool:
    """Was it raised by this program, to be read by a person? Anything else is a bug's traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    where = pathlib.Path(frames[-1][0].f_code.co_filename)
    root = pathlib.Path(__file__).resolve().parent.parent
    return any(where.resolve().is_relative_to(root / name) for name in OURS)


def _stop(sentence: str, status: int = 2) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(status)

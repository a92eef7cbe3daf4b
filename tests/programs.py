"""Starts programs of this project as a shell would, many in one process that has imported jax.

  python tests/programs.py < commands.json

`commands` is a list of lists: a path or a module's name, and its arguments. Each runs as `__main__`
in a fork, from the working directory; printed is a list of [exit status, stdout, stderr].
"""

import json
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent


def started(program: str, arguments: list[str]) -> int:
    """Runs it as Python would, and gives its exit status."""
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            sys.path[0] = str((ROOT / program).parent)
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def ran(program: str, arguments: list[str]) -> tuple[int, str, str]:
    """Its exit status, and what it wrote."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            signal.alarm(120)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = started(program, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        told = []
        for file in (out, err):
            file.seek(0)
            told.append(file.read().decode())
        return os.waitstatus_to_exitcode(status), *told


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import transformers  # noqa: F401

    import recipes.dpo  # noqa: F401  imported once for all

    commands = json.load(sys.stdin)
    print(json.dumps([ran(program, arguments) for program, *arguments in commands]))

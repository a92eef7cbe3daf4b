"""Runs a module of the tests in float64, in which no fault passes for rounding.

python -m tests.in_float64 MODULE ARGUMENTS
"""

import os
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp


def ran(module: str, *args: object, **environment: str) -> str:
    """What `tests.<module>` prints, in a process of its own."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.in_float64", f"tests.{module}", *map(str, args)],
        cwd=pathlib.Path(__file__).parent.parent, env=os.environ | environment,
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


if __name__ == "__main__":  # before the modules that name their dtypes
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__")

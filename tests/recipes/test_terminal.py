"""Nothing that happens to a terminal ends a run: closed pipes, hang-ups, streams that are shut."""

import ast
import errno
import io
import os
import pty
import subprocess
import sys
import termios
import warnings

import pytest

from recipes import terminal
from tests.conftest import ROOT

# Every way to print, then a file: opened first, it would be taken for a descriptor that is shut.
PROGRAM = """
import logging, os, pathlib, sys, warnings
from recipes import terminal

terminal.hold()
with open(sys.argv[1], "w") as file:
    for i in terminal.bar(range(200), desc="bar"):
        terminal.write("line " * 20)
        print("print " * 20)
        print("error " * 20, file=sys.stderr)
        warnings.warn(f"{i}")
        logging.warning("logged")
        try:
            os.write(2, b"from C\\n")  # whose writers look at no error
        except OSError:
            pass
    file.write("went on")
sys.exit(3)
"""


@pytest.mark.parametrize(
    "streams", ["2>&1 | head -1", "| head -1", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"]
)
def test_a_program_goes_on_without_its_streams(tmp_path, streams):
    command = f"set -o pipefail; '{sys.executable}' -c '{PROGRAM}' {tmp_path}/file {streams}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / "file").read_text() == "went on"
    assert done.returncode == 3
    assert not any(word in done.stderr for word in ("Traceback", "Exception", "\r"))
    assert ("line" in done.stdout) == (">&-" not in streams.split("2>&-")[0])


HUNG_UP = """
import fcntl, pathlib, signal, subprocess, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # as a shell's
from recipes import terminal
terminal.hold()
print("ready")
for i in terminal.bar(range(40)):
    time.sleep(0.02)
    terminal.write("line")
    print("error", file=sys.stderr)
# Nor those that it starts.
subprocess.run(["sh", "-c", "kill -HUP $$"], check=True)
pathlib.Path(sys.argv[1]).write_text("went on")
"""


def test_a_program_goes_on_without_its_terminal(tmp_path):
    """SIGHUP, and EIO for whatever it prints."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_UP, str(tmp_path / "file")],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while not (b"line" in shown and b"it/s" in shown):  # a terminal is given its bar
        shown += os.read(ours, 1000)
    os.close(ours)
    assert process.wait() == 0
    assert (tmp_path / "file").read_text() == "went on"


class Broken(io.StringIO):
    """Says once what is wrong, and is not to be asked again."""

    def __init__(self, error):
        super().__init__()
        self.error, self.asked = error, 0

    def write(self, text):
        self.asked += 1
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.EIO, "Input/output error"),
        ValueError("I/O operation on closed file"),
    ],
)
def test_a_stream_that_is_gone_is_left(error):
    broken = Broken(error)
    stream = terminal.lasting(broken)
    for _ in range(3):
        assert print("x", file=stream) is None
    stream.writelines(["y", "z"])
    assert broken.asked == 1
    assert not stream.isatty()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), BlockingIOError(errno.EAGAIN, "later"),
     RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")],
)  # fmt: skip
def test_what_passes_is_waited_for(error):
    """A full disk, a terminal that is busy, a signal in the midst of a line."""
    broken = Broken(error)
    stream = terminal.lasting(broken)
    stream.write("lost")
    broken.write = lambda text: io.StringIO.write(broken, text)
    stream.write("kept")
    assert broken.getvalue() == "kept"


def test_lines_and_bars_outlast_any_stream(monkeypatch):
    """In a program that did not call `hold`: a stream that fails, is shut, or was never there."""
    shut = io.StringIO()
    shut.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stream in (Broken(OSError(errno.EIO, "gone")), shut, None):
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", stream)
            for _ in terminal.bar(range(2)):
                terminal.write("x")


def test_letters_that_a_terminal_lacks(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    terminal.write("naïve")
    assert shown.getvalue() == b"na?ve\n"


def test_a_line_stands_above_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        isatty = staticmethod(lambda: True)

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    for _ in terminal.bar(range(1), ncols=20):
        terminal.write("line")
    assert "\rline\n" in shown.getvalue().replace(" ", "")


def test_all_bars_are_those_that_stay_out_of_files():
    for path in (ROOT / "recipes").rglob("*.py"):
        imported = [node for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, ast.Import)]  # fmt: skip
        names = {alias.name for node in imported for alias in node.names}
        assert "tqdm" not in names or path.name == "terminal.py", path

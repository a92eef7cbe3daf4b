"""A worker answers, or is ended, whatever runs in it; and nobody else notices."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from checkpoints_io import errors
from tests.conftest import ROOT, TINY
from tests.long_forms import full_but
from tests.zoo.text import jobs
from zoo.text import confined
from zoo.text.confined import Limits, Worker


@contextlib.contextmanager
def working(**limits):
    with contextlib.closing(Worker("the template", "use another", Limits(**limits))) as worker:
        yield worker


@pytest.fixture(scope="module")
def worker():
    with working(seconds=0.5, loading=5.0) as one:
        yield one


def gone(pid):
    """Is there no such process, not even as a zombie, within a few seconds?"""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_limits_are_those_that_docs_data_md_gives():
    assert Limits() == Limits(seconds=5, loading=60, memory=4 * 2**30)


def test_it_answers_what_json_can_say_and_bytes(worker):
    odd = ["é日本\ud800\0\n", 10**300, -0.0, 1e-320, float("inf"), None, True, {"a": [1]}, ""]
    assert worker.call(jobs.same, *odd) == odd
    assert worker.call(jobs.same) == []
    assert worker.call(jobs.some_bytes, 256) == bytes(range(256))
    large = "x" * 10**7
    assert worker.call(jobs.same, large) == [large]


def test_an_error_keeps_its_kind_and_its_words(worker):
    with pytest.raises(errors.BadInput) as error:
        worker.call(jobs.refuses, "BadInput", "a — sentence: b")
    assert str(error.value) == "a — sentence: b"
    with pytest.raises(FileNotFoundError, match="there is no x"):
        worker.call(jobs.refuses, "NotFound", "there is no x")


def test_a_bug_keeps_its_traceback(worker):
    with pytest.raises(confined.Failed, match=r"in refuses\n(.|\n)*KeyError: 'x'"):
        worker.call(jobs.refuses, "KeyError", "x")


def test_python_that_does_not_end_is_an_error_that_can_be_caught(worker):
    pid = worker.call(jobs.process)
    told = r"^to read it takes more than 0\.5 seconds of CPU time$"
    with pytest.raises(errors.BadInput, match=told):
        worker.call(jobs.loops, True)
    with pytest.raises(errors.BadInput, match=told):
        worker.call(jobs.loops_deaf)
    assert worker.call(jobs.process) == pid


def test_outside_of_a_step_it_ends_the_worker():
    with working(loading=0.5) as worker:
        pid = worker.call(jobs.process)
        with pytest.raises(errors.BadInput) as error:
            worker.call(jobs.loops, False)
        told = "the template took more than 0.5 seconds of CPU time: use another"
        assert str(error.value) == told
        assert worker.call(jobs.process) != pid
        assert gone(pid)


@pytest.mark.parametrize("where", ["a.jsonl:7", ""])
def test_a_library_that_does_not_end_is_ended_and_named(where):
    with working(seconds=0.5, loading=0.5) as worker:
        pid = worker.call(jobs.process)
        with pytest.raises(errors.BadInput) as error:
            worker.call(jobs.loops_in_c, where)
        assert str(error.value) == (
            f"{where and where + ': '}the template took more than 0.5 seconds of CPU time in a "
            "library, and was ended: use another"
        )
        assert gone(pid)
        assert worker.call(jobs.same, 1) == [1]


def catastrophic(folder):
    """The tiny model's tokenizer with a pattern that tries everything on many of one letter."""
    file = json.loads((TINY / "model" / "tokenizer.json").read_text())
    cut = {"type": "Split", "pattern": {"Regex": r"a.*a.*a.*a.*b|[\s\S]"},
           "behavior": "MergedWithPrevious", "invert": False}  # fmt: skip
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}  # fmt: skip
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, by_byte]}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TINY / "model" / name).read_bytes())
    return folder


def test_a_pattern_of_a_tokenizer_that_tries_everything_is_ended(tmp_path):
    folder = str(catastrophic(tmp_path))
    with working(seconds=0.5) as worker:
        assert worker.call(jobs.encoded, folder, "aab")
        with pytest.raises(errors.BadInput, match=r"^a.jsonl:7: the template took more than"):
            worker.call(jobs.encoded, folder, "a" * 200)


def test_memory_is_bounded_from_birth():
    with working(seconds=60, memory=2**29) as worker:
        (soft, hard), core = worker.call(jobs.limits)
        assert soft == hard == 2**29
        assert core == [0, 0]
        pid = worker.call(jobs.process)
        with pytest.raises(errors.BadInput, match=r"^to read it needs more than 512 MiB of mem"):
            worker.call(jobs.hoards, True)
        assert worker.call(jobs.process) == pid
        with pytest.raises(errors.BadInput, match=r"^the template needed more than 512 MiB of mem"):
            worker.call(jobs.hoards, False)
        assert worker.call(jobs.process) != pid


@pytest.mark.parametrize("name", ["SIGKILL", "SIGABRT", "SIGSEGV"])
def test_a_death_is_told_and_another_is_started(worker, name):
    pid = worker.call(jobs.process)
    with pytest.raises(errors.RunFailed) as error:
        worker.call(jobs.dies, name)
    assert str(error.value).startswith(
        f"a.jsonl:7: the process that ran the template died ({name}): it may have needed more than"
    )
    assert gone(pid)
    assert worker.call(jobs.same, 1) == [1]


def test_one_that_died_while_nobody_asked_is_started_again(worker):
    pid = worker.call(jobs.process)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert worker.call(jobs.process) != pid
    assert gone(pid)


def test_time_that_passes_costs_nothing(worker):
    """Ctrl-Z, a paused container and a busy machine stop the clock of nobody's template."""
    assert worker.call(jobs.sleeps, 1.2) == "slept"


def test_one_that_is_let_go_of_is_ended():
    worker = Worker("the template", "use another")
    pid = worker.call(jobs.process)
    del worker
    assert gone(pid)
    worker = Worker("the template", "use another")
    pid = worker.call(jobs.process)
    worker.close()
    worker.close()
    assert gone(pid)


def test_in_other_threads(worker):
    """One after the other, and each runs where signals come."""
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: worker.call(jobs.same, i), range(40))) == [
            [i] for i in range(40)
        ]
        assert threads.submit(worker.call, jobs.thread).result()
        with pytest.raises(errors.BadInput, match=r"more than 0.5 seconds"):
            threads.submit(worker.call, jobs.loops, True).result()


def test_closed_by_another_thread_a_call_comes_back():
    with working() as worker, concurrent.futures.ThreadPoolExecutor() as threads:
        pid = worker.call(jobs.process)
        running = threads.submit(worker.call, jobs.sleeps, 60)
        time.sleep(0.2)
        worker.close()
        with pytest.raises(errors.RunFailed):
            running.result(timeout=10)
        assert gone(pid)


BEGIN = """
import os, signal, sys, time
from tests.zoo.text import jobs
from zoo.text.confined import Worker
worker = Worker("the template", "use another")
"""


def program(text, **how):
    """A parent of its own, started as a shell would."""
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | how
    return subprocess.Popen([sys.executable, "-c", BEGIN + text], **how)


def test_the_parents_streams_are_its_own():
    """Given with `python -c`, which has no module `__main__` to import."""
    code = "print(worker.call(jobs.streams)); print(sys.stdin.read())"
    with program(code, stdin=subprocess.PIPE) as parent:
        out, err = parent.communicate("for the parent")
    assert out == "['', '']\nfor the parent\n"
    assert err == ""


def test_a_script_without_a_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BEGIN + "print('once'); print(worker.call(jobs.same, 1))")
    here = dict(os.environ, PYTHONPATH=str(ROOT))
    told = subprocess.run([sys.executable, script], env=here, capture_output=True, text=True)
    assert (told.stdout, told.stderr) == ("once\n[1]\n", "")


@pytest.mark.parametrize(
    ("how", "at"),
    full_but(
        itertools.product(["SIGKILL", "SIGTERM", "exit"], ["idle", "in a call"]),
        ("SIGKILL", "in a call"), ("SIGTERM", "in a call"), ("exit", "idle"),
    ),
)  # fmt: skip
def test_no_worker_outlives_its_parent(how, at):
    # Whoever started these tests may ignore SIGHUP, as nohup does.
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    code += "print(worker.call(jobs.process), flush=True)\n"
    code += "worker.call(jobs.sleeps, 60)" if at == "in a call" else "sys.stdin.read()"
    with program(code, stdin=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        if how == "exit" and at == "idle":
            parent.stdin.close()
        else:
            parent.send_signal(signal.Signals[how if how != "exit" else "SIGHUP"])
        parent.wait()
        assert gone(pid)


def test_ctrl_c_is_the_parents():
    code = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
print(worker.call(jobs.process), flush=True)
try:
    worker.call(jobs.sleeps, 60)
except KeyboardInterrupt:
    print("stopped", worker.call(jobs.same, 1))
"""
    with program(code, start_new_session=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        os.killpg(parent.pid, signal.SIGINT)
        out, err = parent.communicate(timeout=30)
    assert (out, err) == ("stopped [1]\n", "")
    assert gone(pid)


@contextlib.contextmanager
def killed_after(seconds, parent):
    """The processes of its session, if the block takes longer."""
    timer = threading.Timer(seconds, os.killpg, (parent.pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def test_a_fork_has_one_of_its_own():
    code = """
first = worker.call(jobs.process)
if os.fork() == 0:
    other = worker.call(jobs.process)
    print(first != other, worker.call(jobs.process) == other, flush=True)
    sys.exit()
os.wait()
print(first == worker.call(jobs.process))
"""
    with program(code, start_new_session=True) as parent, killed_after(60, parent):
        out, err = parent.communicate()
    assert out == "True True\nTrue\n", err


def test_it_imports_little(worker):
    """Fast to start, and with little in it to be reached by what escapes."""
    modules = {name.split(".")[0] for name in worker.call(jobs.imported)}
    assert not modules & {"torch", "transformers", "datasets", "pandas", "pyarrow", "pytest"}
    assert "tests.conftest" not in worker.call(jobs.imported)
    assert pathlib.Path(confined.ROOT) == ROOT

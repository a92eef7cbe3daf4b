"""What tests run in a worker. It imports little, as what a worker runs should."""

import os
import resource
import signal
import sys
import threading
import time

from checkpoints_io.errors import BadInput, NotFound
from zoo.text import template, tokenizer


def same(step, *given):
    return list(given)


def some_bytes(step, number):
    return bytes(range(number))


def process(step):
    return os.getpid()


def imported(step):
    return sorted(sys.modules)


def streams(step):
    """What is read and written there, and whether a write does any harm."""
    print("not an answer", flush=True)
    os.write(1, b"nor this")
    return sys.stdin.read(), os.read(0, 9).decode()


def refuses(step, kind, text):
    raise {"BadInput": BadInput, "NotFound": NotFound, "KeyError": KeyError}[kind](text)


def loop():
    """Python without an end, or with one that a test sees."""
    while time.process_time() < 30:
        pass


def loops(step, within):
    if not within:
        return loop()
    with step("a.jsonl:7", "to read it"):
        return loop()


def loops_deaf(step):
    """It swallows the first stop."""
    with step("a.jsonl:7", "to read it"):
        try:
            loop()
        except BaseException:
            loop()


def loops_in_c(step, where):
    with step(where, "to read it"):
        return sum(range(10**9))  # ten seconds or more


def sleeps(step, seconds):
    with step("", "to sleep"):
        time.sleep(seconds)
    return "slept"


def hoards(step, within):
    """Memory without an end, in small parts."""
    if not within:
        return len([bytes(2**20) for _ in range(10**6)])
    with step("a.jsonl:7", "to read it"):
        return len([bytes(2**20) for _ in range(10**6)])


def dies(step, name):
    with step("a.jsonl:7", "to read it"):
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(10)


def limits(step):
    return [resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CORE)]


def thread(step):
    return threading.current_thread() is threading.main_thread()


def rendered(step, text, given):
    with step("a.jsonl:7", "to render it"):
        return template.render(template.compiled(text, None), given)[0]


def rendered_many(step, seconds):
    """Renderings for so many seconds of CPU time, each within a step."""
    program = template.compiled("{% for i in range(n) %}{{ i }} {% endfor %}", None)
    n, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        n += 1
        with step("", "to render it"):
            text = template.render(program, {"n": n % 300})[0]
        assert len(text.split()) == n % 300
    return n


def encoded(step, folder, text):
    own = tokenizer.load(tokenizer.pathlib.Path(folder))
    with step("a.jsonl:7", "to tokenise it"):
        return own.encode(text)[0]

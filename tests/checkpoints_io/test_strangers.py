"""Model folders of strangers: whatever is in them, a model comes out of it or a sentence.

`-m full` opens 10,000 mutants; by default it is 500. `tests/fuzz_folders.py` looks for more, guided
by what the code does with them.
"""

import copy
import json
import os
import pathlib
import random
import re
import shutil
import sys
import threading
import time
import tracemalloc
from unittest import mock

from flax import nnx
import pytest
import safetensors

from checkpoints_io import errors, hf_export
from tests.conftest import large_weights, small_config
import zoo
from zoo import llama

FILES = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
         "model-00002-of-00002.safetensors", "model.safetensors")  # fmt: skip
ODD = (
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 200,
    -(1 << 63), 0.5, 1e308, float("nan"), float("inf"), "", "a", "é" * 9, "\0",
    "../secret.safetensors", "/etc/passwd",
    "x" * 5000, [], {}, [[]], [0], [1 << 40, 1 << 40], {"a": []}, ["sliding_attention"], "yarn",
    {"rope_type": "yarn", "factor": 0}, {"rope_type": "default", "rope_theta": 0}, "gemma3_text",
    "qwen3_moe", "gpt_oss", "phi3", "F16", "F64", "U8",
)  # fmt: skip


KEYS = (
    "auto_map", "model_file", "_attn_implementation_internal", "", "n_layer", "rope_scaling",
    "text_config", "weight_map", "../x", "__metadata__",
)  # fmt: skip


def folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The same small model as one file, and as two with an index."""
    model = large_weights(llama.Model(small_config(num_hidden_layers=2), nnx.Rngs(0)))
    zoo.save(model, root / "one")
    with pytest.MonkeyPatch.context() as patched:
        size = (root / "one" / "model.safetensors").stat().st_size
        patched.setattr(hf_export, "SHARD_BYTES", int(0.6 * size))
        zoo.save(model, root / "two")
    assert {path.name for path in (root / "two").glob("model*")} < set(FILES)
    shutil.copy(root / "one" / "model.safetensors", root / "secret.safetensors")
    return [root / "one", root / "two"]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if not isinstance(value, dict | list):
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(one, (*path, key))


def odd(draw: random.Random):
    """A fresh one: what is put somewhere may be changed there."""
    return copy.deepcopy(draw.choice(ODD))


def odd_json(draw: random.Random, text: str) -> str:
    """A JSON text with a few places changed."""
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        path = draw.choice(list(places(value)))
        if not path:
            continue
        *way, last = path
        at = value
        for key in way:
            at = at[key]
        kind = draw.randrange(5)
        if kind == 0:
            del at[last]
        elif kind == 1 and isinstance(at, dict):
            at[draw.choice(KEYS)] = at[last] if draw.random() < 0.5 else odd(draw)
        elif kind == 2 and isinstance(at[last], int):
            at[last] += draw.choice((-1, 1, 8, 1 << 20))
        else:
            at[last] = odd(draw)
    text = json.dumps(value)
    if draw.random() < 0.03:
        text = draw.choice(("[" * 100_000, '{"a":' * 100_000, text + "}", "﻿" + text, text * 2))
    return text


def odd_bytes(draw: random.Random, content: bytes) -> bytes:
    """Bytes with some changed, cut, doubled or put in."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 10))):
        at = draw.randrange(min(len(made), draw.choice((16, 500, len(made)))) or 1)
        kind = draw.randrange(5)
        if kind == 0 and made:
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[at : at + draw.choice((1, 8, 1000))]
        elif kind == 2:
            made[at:at] = draw.randbytes(draw.choice((1, 8, 100)))
        elif kind == 3:
            number = draw.choice((0, 1, 1 << 20, 1 << 62, (1 << 64) - 1))
            made[at : at + 8] = number.to_bytes(8, "little")
        else:
            made = made[:at] if draw.random() < 0.3 else made
    return bytes(made)


def mutated(draw: random.Random, name: str, content: bytes) -> bytes:
    if draw.random() < 0.3:
        return odd_bytes(draw, content)
    if name.endswith(".json"):
        return odd_json(draw, content.decode()).encode("utf-8", "surrogatepass")
    length = int.from_bytes(content[:8], "little")
    header = odd_json(draw, content[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
    told = len(header) if draw.random() < 0.9 else draw.choice((0, 1, length, 1 << 40))
    return told.to_bytes(8, "little") + header + content[8 + length :]


OWN = 24 << 20  # what the program itself may take in between, tracing a model of any size


class Watched:
    """A folder that is opened under the eyes of the interpreter."""

    now: "Watched | None" = None

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.elsewhere: set[str] = set()  # what was opened, or run, that is not in it

    def note(self, path) -> None:
        path = os.path.realpath(os.fsdecode(path))
        program = (sys.prefix, sys.base_prefix, str(pathlib.Path(zoo.__file__).parent.parent),
                   os.environ["TESTS_CACHE"], "/proc", "/sys", "/dev")  # fmt: skip
        if not path.startswith((str(self.folder), *map(os.path.realpath, program))):
            self.elsewhere.add(path)

    def attempt(self) -> tuple[str, float, int]:
        """What came of it ("" for a model), the CPU seconds and the bytes it took at most."""
        opened = safetensors.safe_open  # which opens in Rust, where no audit is

        def noting(path, *args, **kwargs):
            self.note(path)
            return opened(path, *args, **kwargs)

        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, start = memory("VmRSS"), time.process_time()
        Watched.now = self
        try:
            with mock.patch.object(safetensors, "safe_open", noting):
                zoo.check(self.folder)
                zoo.load(self.folder)
            told = ""
        except errors.UserError as error:
            told = str(error)
        finally:
            Watched.now = None
        return told, time.process_time() - start, memory("VmHWM") - before


def audit(event: str, args: tuple) -> None:
    if Watched.now is None or threading.current_thread() is not threading.main_thread():
        return  # what earlier tests left running has its own files
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        Watched.now.note(args[0])
    elif event in ("os.system", "subprocess.Popen", "socket.connect"):
        Watched.now.elsewhere.add(event)


sys.addaudithook(audit)


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s*(\d+) kB", status)[1]) << 10


@pytest.mark.parametrize("mutants", [100, pytest.param(10_000, marks=pytest.mark.full)])
def test_mutants_are_models_or_sentences(tmp_path, mutants, capsys):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    sound = folders(tmp_path)
    harmed = tmp_path / "harmed"
    watched = Watched(harmed)
    shutil.copytree(sound[0], harmed)
    assert watched.attempt()[0] == ""  # and what is imported once is imported
    models, slowest, largest, exactly, told_of = 0, 0.0, 0, 0, set()
    for i in range(mutants):
        shutil.rmtree(harmed)
        shutil.copytree(draw.choice(sound), harmed)
        name = draw.choice([name for name in FILES if (harmed / name).exists()])
        content = mutated(draw, name, (harmed / name).read_bytes())
        (harmed / name).write_bytes(content)
        if i % 5 == 0:  # Python's own to the byte; it takes three times as long
            tracemalloc.start(1)
        try:
            told, seconds, most = watched.attempt()
            counted = tracemalloc.get_traced_memory()[1]
        except BaseException as error:
            raise AssertionError((seed, i, name, content[:3000])) from error
        finally:
            tracemalloc.stop()
        assert not watched.elsewhere, (seed, i, name, watched.elsewhere)
        assert seconds < 5, (seed, i, name, seconds)
        size = sum(path.stat().st_size for path in harmed.iterdir())
        assert most < 2 * size + OWN, (seed, i, name, most, size)
        assert counted < 2 * size + (1 << 20), (seed, i, name, counted, size)
        models += not told
        told_of.add(told.replace(str(harmed), "")[:30])
        slowest, largest = max(slowest, seconds), max(largest, most)
        exactly = max(exactly, counted)
    assert models < mutants / 2 and len(told_of) > 5
    with capsys.disabled():
        print(
            f"\n{mutants} mutants (seed {seed}): {models} models, the others one of "
            f"{len(told_of)} sentences; {slowest:.2f} CPU s and {largest >> 10} KiB at most, "
            f"{exactly >> 10} KiB of them Python's"
        )


def test_what_is_opened_elsewhere_is_seen(tmp_path, monkeypatch):
    secret = folders(tmp_path)[0].parent / "secret.safetensors"
    for read in (pathlib.Path.read_bytes, lambda path: safetensors.safe_open(path, "numpy")):
        monkeypatch.setattr(zoo, "check", lambda _, read=read: read(secret))
        watched = Watched(tmp_path / "one")
        assert watched.attempt()[0] == ""
        assert watched.elsewhere == {str(secret)}
    monkeypatch.setattr(zoo, "check", lambda _: bytearray(64 << 20))
    assert watched.attempt()[2] > 60 << 20

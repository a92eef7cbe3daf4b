"""Judges, which score answers: a function, a program, a reward model, or the implicit reward.

A judge is given lines, each with a prompt and the answers that may become a pair, and returns a
number for each answer, where higher is better: line by line, so that finished scores are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import importlib
import json
import math
import re
import subprocess
import sys
import threading
from typing import Any

import jax

from checkpoints_io import places
from checkpoints_io.errors import BadInput, NotFound, RunFailed
from recipes import terminal
from recipes.own_pairs import answers, kept
from recipes.training import harness
import zoo
from zoo import chat, reward
from zoo.text.chat_tokenizer import ChatTokenizer

FILE = "scores.jsonl"
FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
AT_ONCE = 64  # lines that a model judges together

Scores = Iterable[Sequence[float]]
Judge = Callable[[Sequence[kept.Line]], Scores]


def judge(directory: places.Place, name: str, opened: Callable[[], Judge]) -> None:
    """Judges the answers that have no scores.

    A line of the file has `row`, `judge`, and `scores`: one per answer, null if it cannot become
    part of a pair (it was cut off, or repeats another).

    Raises:
      ValueError: the file has another judge's scores.
      RuntimeError: what this judge returns are not scores.
    """
    lines, done = kept.lines(directory, answers.FILE), kept.lines(directory, FILE)
    if other := next((one for one in done if one["judge"] != name), None):
        raise BadInput(
            f"{directory}/{FILE} has the scores of {other['judge']}, but this command asks for "
            f"{name}: remove that file to judge the answers again"
        )
    left = lines[len(done) :]
    if not left:
        return
    said = iter(opened()([_with_usable(line) for line in left]))
    with kept.adding(directory, FILE, done) as add:
        for line in terminal.bar(left, initial=len(done), total=len(lines)):
            one = next(said, None)
            scores = _checked(one, usable(line), name, line["row"])
            all_ = [scores.get(i) for i in range(len(line["answers"]))]
            add([{"row": line["row"], "judge": name, "scores": all_}])


def usable(line: kept.Line) -> list[int]:
    """The indices of a line's answers that ended and do not repeat an earlier one."""
    found: dict[str, int] = {}
    for i, (text, finished) in enumerate(zip(line["answers"], line["finished"], strict=True)):
        if finished and text.strip():
            found.setdefault(text, i)
    return [*found.values()]


def _with_usable(line: kept.Line) -> kept.Line:
    """The line with only its usable answers."""
    some = usable(line)
    return line | {name: [line[name][i] for i in some] for name in ("answers", "tokens")}


def _checked(said: Any, asked: Sequence[int], name: str, row: int) -> dict[int, float]:
    """The scores of these answers; NaN is for one that the judge does not score."""
    try:
        scores = [float(one) for one in said]
    except (TypeError, ValueError):
        scores = None
    if scores is None or len(scores) != len(asked):
        raise RunFailed(
            f"{name} returned {str(said)[:80]} for the {len(asked)} answers to row {row}: it must "
            "return a list of as many numbers, where higher is better"
        )
    return {i: one for i, one in zip(asked, scores, strict=True) if not math.isnan(one)}


def of_user(named: str) -> Judge:
    """A judge given as `module:function`, also found in the working directory, or shell command.

    A function is called with a prompt (messages) and its answers (texts). A command is started once
    and gets a line of JSON on stdin for each prompt, `{"row", "prompt", "answers"}`; it prints a
    line for each, a list of numbers.

    Raises:
      FileNotFoundError: there is no such function.
    """
    if not re.fullmatch(FUNCTION, named):
        return lambda lines: _of_command(named, lines)
    module, _, name = named.partition(":")
    if "" not in sys.path:  # the working directory
        sys.path.append("")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"--judge={named} cannot be found: {error}") from error
    return lambda lines: (function(line["prompt"], line["answers"]) for line in lines)


def _of_command(command: str, lines: Sequence[kept.Line]) -> Iterator[Any]:
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin and process.stdout
    put = process.stdin

    def ask() -> None:
        try:
            with put:
                for line in lines:
                    asked = {name: line[name] for name in ("row", "prompt", "answers")}
                    put.write(json.dumps(asked) + "\n")
        except BrokenPipeError:  # it has ended; missing scores are reported below
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    try:
        for said in process.stdout:
            try:
                yield json.loads(said)
            except ValueError as error:
                raise RunFailed(f"--judge={command} prints {said[:80]!r}: not JSON") from error
        if status := process.wait():
            raise RunFailed(f"--judge={command} ended with status {status}")
    finally:
        process.kill()
        process.wait()


def of_reward_model(path_or_id: str, dtype: str | None, mesh: jax.sharding.Mesh) -> Judge:
    """A judge that is a reward model: one of the zoo's families with one number for logits.

    Raises:
      FileNotFoundError, ValueError: as `reward.load`.
    """
    tokenizer = zoo.load_tokenizer(path_or_id)
    model = reward.load(path_or_id, chat.dtype_here(dtype), mesh)

    def judged(lines: Sequence[kept.Line]) -> Scores:
        for some in _at_once(lines):
            texts = [
                tokenizer.chat(
                    [*line["prompt"], _said(text)], tools=line["tools"], **kept.given(line)
                )
                for line in some
                for text in line["answers"]
            ]
            yield from _by_line(reward.rewards(model, texts), some)

    return judged


def of_implicit(policy: zoo.Model, reference: zoo.Model, tokenizer: ChatTokenizer) -> Judge:
    """A judge that gives an answer's log p under the policy minus that under the reference.

    It is in nats, summed over tokens; beta times it is the DPO reward (Rafailov et al. 2023,
    section 4).
    """

    def judged(lines: Sequence[kept.Line]) -> Scores:
        for some in _at_once(lines):
            asked = [
                (tokenizer.chat(line["prompt"], tools=line["tools"], **kept.given(line)), ids)
                for line in some
                for ids in line["tokens"]
            ]
            longest = max(len(before) + len(after) for before, after in asked) + 1
            ours, theirs = (
                [logp for logp, _ in harness.scored(model, asked, longest)]
                for model in (policy, reference)
            )
            yield from _by_line([a - b for a, b in zip(ours, theirs, strict=True)], some)

    return judged


def _at_once(lines: Sequence[kept.Line]) -> Iterator[Sequence[kept.Line]]:
    return (lines[i : i + AT_ONCE] for i in range(0, len(lines), AT_ONCE))


def _by_line(scores: Sequence[float], lines: Sequence[kept.Line]) -> Iterator[Sequence[float]]:
    given = iter(scores)
    return ([next(given) for _ in line["answers"]] for line in lines)


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}

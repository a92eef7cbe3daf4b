"""What a compiled program moves between devices, read from its text."""

import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}


class Collective(NamedTuple):
    """One exchange of a program."""

    kind: str
    bytes: int  # of its result, or, where each device keeps a part, of what was given
    shapes: tuple[str, ...]
    in_loop: bool
    times: int  # an exchange in a loop happens in every turn


def of(text: str, loops: int = 1) -> list[Collective]:
    """The exchanges of a compiled program; every loop is taken to have `loops` turns."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    kinds = "|".join(KINDS)
    found, computation = [], ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = opened[1]
        made = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if not made:
            continue
        results, kind, begun = made.groups()
        arrays = _arrays(results)
        if begun and kind == "all-gather":
            arrays = arrays[len(arrays) // 2 :]  # (what is given, what comes)
        elif begun and kind == "collective-permute":
            arrays = arrays[1:2]
        size = sum(width * int(np.prod(shape)) for width, shape, _ in arrays)
        if kind == "reduce-scatter":
            size *= _group(line)
        in_loop = computation in bodies
        names = tuple(name for *_, name in arrays)
        found.append(Collective(kind, size, names, in_loop, loops if in_loop else 1))
    return found


def _group(line: str) -> int:
    """Over how many devices an exchange goes."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(counted[1]) if counted else 1


def _arrays(text: str) -> list[tuple[int, list[int], str]]:
    arrays = []
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text):
        if dtype in WIDTHS:
            shape = [int(n) for n in sizes.split(",") if n]
            arrays.append((WIDTHS[dtype], shape, f"{dtype}[{sizes}]"))
    return arrays

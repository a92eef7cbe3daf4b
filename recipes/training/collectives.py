"""What a compiled program moves between devices, read from its text."""

import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
# What slices of a TPU pod exchange: each `send` has a `recv`, and groups are counted in a slice.
BETWEEN = "send"
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
        if begun and kind in ("all-gather", "all-to-all", "reduce-scatter"):
            arrays = arrays[len(arrays) // 2 :]  # (what is given, what comes)
        elif begun and kind == "collective-permute":
            arrays = arrays[1:2]
        elif kind == BETWEEN:
            arrays = arrays[:1]  # (what is sent, its context)
        size = sum(width * int(np.prod(shape)) for width, shape, _ in arrays)
        if kind == "reduce-scatter":
            size *= max(map(len, groups(line)), default=1)
        in_loop = computation in bodies
        names = tuple(name for *_, name in arrays)
        found.append(Collective(kind, size, names, in_loop, loops if in_loop else 1))
    return found


def groups(line: str) -> list[list[int]]:
    """Which devices, counted as in the program's mesh, exchange something with each other.

    A program writes them down one by one, as a count of all devices that is reshaped and
    transposed, or by the axes of a mesh that they go along. There are none in a `send`.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", line):
        return [_numbers(one) for one in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\]\S*)", line):
        return _counted(counted[2]).reshape(-1, int(counted[1])).tolist()
    along = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? *\{(.*?)\}", line
    )
    if not along:
        return []
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", along[1])}
    gone = re.findall(r"'(\w+)'", along[3])
    names = [name for name in sizes if name not in gone] + gone
    ids = _counted(along[2] or f"[{np.prod([*sizes.values()])}]").reshape([*sizes.values()])
    ids = ids.transpose([[*sizes].index(name) for name in names])
    return ids.reshape(-1, int(np.prod([sizes[name] for name in gone]))).tolist()


def _counted(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: numbers from 0 on in such an array, transposed so."""
    sizes, _, order = text.partition("T")
    ids = np.arange(np.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _arrays(text: str) -> list[tuple[int, list[int], str]]:
    arrays = []
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text):
        if dtype in WIDTHS:
            shape = [int(n) for n in sizes.split(",") if n]
            arrays.append((WIDTHS[dtype], shape, f"{dtype}[{sizes}]"))
    return arrays

"""Sums a trace by what the time was spent on.

  python benchmarks/where.py runs/traced/profile

Times are those of the threads or streams that did the work, added up.
"""

import collections
import pathlib
import re
import sys

import jax

# The first that matches an operation's name decides.
KINDS = {
    "collectives": r"^(all-|all_|reduce-scatter|reduce_scatter|collective)|ncclDevKernel",
    "attention kernels": r"flash|attention|splash|mosaic|sdpa",
    "matrix products": r"dot|gemm|matmul|cublas|convolution|nvjet|ynn_fusion",
    "copies": r"copy|transpose|memcpy|broadcast|bitcast",
    "loops, with all that is in them": r"^(while|conditional|call)",
    "elementwise and reductions": r"",
}


def summed(folder: pathlib.Path) -> collections.Counter:
    """Milliseconds by kind, over the newest trace in the folder."""
    paths = sorted(folder.rglob("*.xplane.pb"))
    if not paths:
        raise SystemExit(f"error: there is no trace in {folder}")
    total: collections.Counter = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(paths[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is None:
                    continue
                # GPUs replay many kernels as one operation: there only the kernel's name tells.
                name = f"{operation} {event.name}"
                kind = next(k for k, pattern in KINDS.items() if re.search(pattern, name))
                total[kind] += event.duration_ns / 1e6
    return total


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        sys.exit()
    if len(sys.argv) != 2:
        raise SystemExit("error: give the folder of a trace, as in runs/traced/profile")
    total = summed(pathlib.Path(sys.argv[1]))
    apart = {kind: ms for kind, ms in total.items() if not kind.startswith("loops")}
    for kind, ms in sorted(apart.items(), key=lambda item: -item[1]):
        print(f"{ms:10.1f} ms  {ms / sum(apart.values()):4.0%}  {kind}")

"""What every program in a comparison measures of itself, in the same way. Standard library only."""

import json
import pathlib
import time


class Clock:
    """CPU seconds (user and system, all threads) and wall seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.start()

    def start(self) -> None:
        """Begins a step."""
        self._since = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Ends it."""
        cpu, wall = self._since
        self.steps.append((time.process_time() - cpu, time.perf_counter() - wall))


def peak_mib() -> float:
    """The most memory this process has held (VmHWM)."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def report(clock: Clock, tokens: list[int], losses: list[float], first: int, **other) -> None:
    """One JSON line; the first `first` steps compile or warm up, and are told apart."""
    rates = [
        (cpu / n * 1e3, wall / n * 1e3) for (cpu, wall), n in zip(clock.steps, tokens, strict=True)
    ]
    print(json.dumps({
        "cpu_s_per_ktok": [cpu for cpu, _ in rates[first:]],
        "wall_s_per_ktok": [wall for _, wall in rates[first:]],
        "tokens": sum(tokens), "peak_mib": peak_mib(), "losses": losses, **other,
    }))  # fmt: skip

"""Two sides measured in turns: commands in processes of their own, wall time and peak memory, medians.

Place: under every measure. Each round prepares and times both sides, the odd rounds in the other order, so that
whatever the machine does at that moment does it to both.
Invariants: a command that fails ends the benchmark; nothing is left out of a time but what `prepare` does.

Example:
    sides = alternate({"ours": (prepare, command), "theirs": (prepare, other)}, rounds=5); sides["ours"].median
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One process: how long it took, also on the cores' clocks, the most memory it held, and what it printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


@dataclass
class Side:
    """All rounds of one side."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """The side as the results have it."""
        return {
            "median_s": round(self.median, 4),
            "min_s": round(min(self.seconds), 4),
            "all_s": [round(value, 4) for value in self.seconds],
            "median_cpu_s": round(statistics.median(self.cpu_seconds), 4),
            "peak_mib": round(max(self.peaks) / (1 << 20), 1),
        }


@dataclass(frozen=True)
class Command:
    """What is run: arguments, where, and with which variables besides the benchmark's own."""

    arguments: Sequence[str]
    cwd: Path
    environment: Mapping[str, str]

    def run(self, *, codes: Sequence[int] = (0,)) -> Run:
        """Run it to its end.

        Raises:  RuntimeError: another exit code, with what the command said.
        """
        log = self.cwd.parent / f".benchmark-{os.getpid()}"
        with log.open("w+b") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                list(self.arguments), cwd=self.cwd, env=dict(self.environment), stdout=output, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            text = output.read().decode(errors="replace")
        log.unlink()
        if process.returncode not in codes:
            raise RuntimeError(f"{' '.join(self.arguments)}: exit {process.returncode}\n{text[-3000:]}")
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


Prepare = Callable[[], None]


def alternate(sides: Mapping[str, tuple[Prepare, Command]], *, rounds: int) -> dict[str, Side]:
    """Time every side in every round."""
    found = {name: Side() for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            prepare, command = sides[name]
            prepare()
            run = command.run()
            found[name].seconds.append(run.seconds)
            found[name].cpu_seconds.append(run.cpu_seconds)
            found[name].peaks.append(run.peak_bytes)
    return found


def nothing() -> None:
    """A side that needs no preparation."""

"""What every bench prints: a table for people, then one line of JSON for programs. And how it measures itself."""

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """What a figure must reach. figure: its name; exactly one of at_least and at_most is given."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, figures: Mapping[str, float]) -> bool:
        value = figures[self.figure]
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Result:
    """Figures of one bench. full_size: measured at the size that the bars speak of; else no verdict is given."""

    bench: str
    figures: Mapping[str, float]
    """By snake_case name with the unit as suffix, in the order in which they are shown."""
    bars: Sequence[Bar]
    full_size: bool
    peer: str
    """What it was measured against, with version."""
    notes: Sequence[str] = ()

    @property
    def met(self) -> bool | None:
        return all(bar.is_met(self.figures) for bar in self.bars) if self.full_size else None

    def print(self) -> None:
        """Print the table, the notes and, as the last line, the JSON object."""
        bars = {bar.figure: bar for bar in self.bars}
        width = max(len(name) for name in self.figures)
        for name, value in self.figures.items():
            print(f"{name:{width}}  {value:>14,.3f}  {bars.get(name, '')}".rstrip())
        for note in self.notes:
            print(note)
        values = {
            "bench": self.bench,
            "figures": dict(self.figures),
            "bars": {bar.figure: str(bar) for bar in self.bars},
            "full_size": self.full_size,
            "met": self.met,
            "peer": self.peer,
            "machine": machine(),
        }
        print(json.dumps(values, ensure_ascii=False), flush=True)


def machine() -> str:
    """Return cores, memory, system and Python in one line."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {gigabytes:.0f} GB, {_cpu_name()}, {platform.system()}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def peak_gigabytes() -> float:
    """Return the largest memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9

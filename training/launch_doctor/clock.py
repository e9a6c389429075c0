"""Clocks of the nodes against rank 0's, measured by round trips: Cristian's method ("Probabilistic clock
synchronization", 1989): of many questions the one answered fastest, off by half its round trip at most.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.launch_doctor.report import Row
from training.launch_doctor.team import Team

_QUESTIONS = 20
_WARN_SECONDS, _FAIL_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class Skew:
    """How far a clock is ahead of rank 0's, and how far off that may be."""

    seconds: float
    uncertainty_seconds: float


def measure_skew(team: Team, scouts: Sequence[int], *, now: Callable[[], float] = time.time) -> dict[str, list[float]]:
    """Return, on rank 0, the skew of each scout as [seconds, uncertainty] by rank; nothing on the others.

    One scout after the other: rank 0 answers one at a time.
    """
    if team.rank not in scouts:
        return {}
    if not team.is_main:
        _ask(team, now)
        return {}
    found = {}
    for scout in (one for one in scouts if one != 0):
        for number in range(_QUESTIONS):
            team.wait_for(f"clock/ask/{scout}/{number}")
            team.post(f"clock/answer/{scout}/{number}", now())
        found[str(scout)] = team.read(f"clock/skew/{scout}", of=scout)
    return found


def clock_rows(skews: Mapping[int, Skew], nodes: Mapping[int, str], file_system: Skew | None) -> Iterator[Row]:
    """Yield rows. nodes: names by rank; file_system: its clock against rank 0's."""
    wanted = f"within {_WARN_SECONDS:g} s"
    if skews:
        worst = max(skews, key=lambda rank: abs(skews[rank].seconds))
        found = "; ".join(f"{nodes[rank]} {_text(skew)}" for rank, skew in skews.items() if rank == worst)
        advice = "logs of the nodes cannot be put in order, and munge refuses at 5 minutes: is chronyd running there?"
        yield _row("clocks", f"largest of {len(skews)}: {found}", wanted, skews[worst], advice)
    if file_system is not None:
        advice = "times of files lie; heartbeats are compared on the server's own clock, so a run's lock still works"
        yield _row("file clock", _text(file_system), wanted, file_system, advice, worst="warn")


def _row(what: str, found: str, wanted: str, skew: Skew, advice: str, *, worst: str = "fail") -> Row:
    surely = abs(skew.seconds) - skew.uncertainty_seconds
    if surely <= _WARN_SECONDS:
        return Row(what, found, wanted)
    return Row(what, found, wanted, "fail" if surely > _FAIL_SECONDS and worst == "fail" else "warn", advice)


def _text(skew: Skew) -> str:
    return f"{1000 * skew.seconds:+.1f} ms ± {1000 * skew.uncertainty_seconds:.1f} ms"


def _ask(team: Team, now: Callable[[], float]) -> None:
    best = Skew(0.0, float("inf"))
    for number in range(_QUESTIONS):
        asked = now()
        team.post(f"clock/ask/{team.rank}/{number}", True)
        team.wait_for(f"clock/answer/{team.rank}/{number}")
        answered = now()
        theirs = team.read(f"clock/answer/{team.rank}/{number}")
        half = (answered - asked) / 2
        if half < best.uncertainty_seconds:
            best = Skew(asked + half - theirs, half)
    team.post(f"clock/skew/{team.rank}", [best.seconds, best.uncertainty_seconds])

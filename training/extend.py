"""A run is extended: more epochs of each chunk, chunks appended, a longer schedule. What is new, and what it means.

Pure functions. The rule: chunks that are done are trained again, in the order of the run, in the epochs that are new,
each from the run's newest state; epoch numbers, counters and global steps go on. A chunk that is half trained takes the
new epochs in its turn, before the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharding.config import ConfigError
from training.frozen_config import Change
from training.schedules import NEEDS_HORIZON, rate_factor

_SHOWN_CHUNKS = 5


@dataclass(frozen=True)
class Extension:
    """What is new since the launch before. Falsy when nothing is."""

    chunks: tuple[str, ...]
    """Appended to the run."""
    grown: Mapping[str, Change]
    """Settings that have grown, by dotted key."""

    def __bool__(self) -> bool:
        return bool(self.chunks or self.grown)

    @property
    def reason(self) -> str:
        """Return all of it in one line."""
        parts = [f"{key} {change.was} -> {change.now}" for key, change in self.grown.items()]
        if self.chunks:
            shown = ", ".join(self.chunks[:_SHOWN_CHUNKS]) + ", …" * (len(self.chunks) > _SHOWN_CHUNKS)
            parts.append(f"{len(self.chunks):,} chunks appended: {shown}")
        return "; ".join(parts)


def extension_of(
    changes: Mapping[str, Change], *, known_chunks: Sequence[str] | None, chunks: Iterable[str]
) -> Extension:
    """Return what has grown. known_chunks: all that the run had at any launch before; None at its first."""
    known = set(known_chunks or ())
    appended = tuple(name for name in chunks if name not in known) if known_chunks is not None else ()
    return Extension(appended, {key: change for key, change in changes.items() if change.has_grown})


def rate_text(schedule: Mapping[str, Any], *, was_total_steps: int | None, global_step: int) -> str:
    """Return which share of the learning rate applies from global_step on, and why, in one line.

    schedule: the keywords of `rate_factor`. was_total_steps: the horizon before, None when it is the same.
    Raises ConfigError when the rate has fallen to 0 there for good.
    """
    name, total_steps = schedule["name"], schedule["total_steps"]
    now = rate_factor(**schedule, global_step=global_step)
    here = f"learning rate: {now:.3g} of its peak from global step {global_step:,} on"
    if name not in NEEDS_HORIZON:
        return f"{here} (schedule {name} has no horizon)"
    if now == 0.0 and global_step >= total_steps:
        raise ConfigError(
            f"schedule.total_steps {total_steps:,}: the run stands at global step {global_step:,}, where the learning "
            "rate has fallen to 0, so that nothing more would be learned; raise schedule.total_steps to the number of "
            "steps of the whole run, which `python -m training plan` prints"
        )
    if was_total_steps is None:
        horizon = f"its horizon stays {total_steps:,} steps; raise schedule.total_steps to move it"
        return f"{here} (schedule {name}: {horizon})"
    before = rate_factor(**{**schedule, "total_steps": was_total_steps}, global_step=global_step)
    return f"{here}, was {before:.3g} (schedule {name}: horizon {was_total_steps:,} -> {total_steps:,} steps)"

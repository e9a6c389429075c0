"""What `training status --verify` found, as a table of counts, a list of lost images and a list of problems."""

from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 20


@dataclass(frozen=True)
class LostImage:
    """A planned showing that was not trained."""

    chunk: str
    epoch: int
    global_step: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.chunk} epoch {self.epoch} global step {self.global_step:,}: {self.key} ({self.reason})"


@dataclass
class Proof:
    """What was found. Counts are showings: (key, concept, occurrence) of one epoch."""

    planned: int = 0
    """Of all epochs of the chunks that have started."""
    trained: int = 0
    """Exactly once each."""
    skipped: list[LostImage] = field(default_factory=list)
    broken: list[LostImage] = field(default_factory=list)
    left: int = 0
    """Planned in these chunks, and not yet in a state."""
    num_chunks: int = 0
    num_traced_steps: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What does not add up; empty: proved."""

    def text(self) -> str:
        """Return it for people; the lost images are listed up to a limit, JSON has all."""
        lines = [
            f"{self.planned:,} showings planned in {self.num_chunks:,} chunks: {self.trained:,} trained exactly once, "
            f"{len(self.skipped):,} skipped, {len(self.broken):,} broken, {self.left:,} not yet"
        ]
        for name, lost in (("skipped", self.skipped), ("broken", self.broken)):
            lines += [f"{name}: {one}" for one in lost[:_SHOWN]]
            if len(lost) > _SHOWN:
                lines.append(f"{name}: … and {len(lost) - _SHOWN:,} more (--json lists all)")
        compared = (
            f"{self.num_traced_steps:,} steps compared" if self.num_traced_steps else "none (trackers.trace is off)"
        )
        lines.append(f"trace.jsonl: {compared}")
        lines += [f"note: {note}" for note in self.notes] + [f"PROBLEM: {problem}" for problem in self.problems]
        lines.append(f"{len(self.problems)} problems" if self.problems else "everything adds up")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

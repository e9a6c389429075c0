"""What dedupe decided, in numbers and as people read it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sharding.duplicates.keepers import REASONS, Decision


@dataclass(frozen=True)
class DedupeReport:
    """What dedupe decided."""

    num_files: int
    """Kept by scan."""
    num_kept: int
    dropped: Mapping[str, int]
    """Files by drop reason."""
    num_groups: int
    num_relatives: int
    """Kept pictures that are like another kept one: beyond the diameter, variants, or so decided."""
    num_degenerate: int
    """Pictures whose hash says nothing (flat), never compared by it."""
    num_cut_off: int
    """Pictures of a component that are too far from its best member to be dropped for it (chains)."""
    largest_component: int
    """Pictures that pairs connect, at most."""
    num_searched: int
    """Pictures whose pairs were searched anew; those of the others were in the table."""
    parts_made: int
    """Parts of `kept` that were written; in a dry run: all, unless everything is current."""
    is_current: bool
    """Nothing had changed; nothing was decided anew."""
    is_dry_run: bool

    def summary(self) -> str:
        """Return the sum, the drops by reason and what was written."""
        num_dropped = sum(self.dropped.values())
        lines = [
            f"{self.num_files:,} files: {self.num_kept:,} kept, {num_dropped:,} dropped in {self.num_groups:,} groups"
        ]
        lines += [f"  {count:,} {reason}" for reason, count in self.dropped.items()]
        if self.num_cut_off:
            lines.append(
                f"{self.num_cut_off:,} pictures are connected with a keeper, but too far from it to be dropped for it; "
                f"the largest chain has {self.largest_component:,} pictures"
            )
        if self.num_relatives:
            lines.append(f"{self.num_relatives:,} kept pictures are like another kept one (dedupe/relatives)")
        if self.num_degenerate:
            lines.append(f"{self.num_degenerate:,} pictures are nearly flat and were not compared")
        if self.is_current:
            lines.append("everything is current")
        elif self.is_dry_run:
            lines.append("nothing was written (--dry-run)")
        else:
            lines.append(f"the pairs of {self.num_searched:,} new pictures were searched")
            lines.append(f"{self.parts_made:,} parts of dedupe/kept written, the others are current")
        return "\n".join(lines)


def make_report(decision: Decision, *, num_relatives: int, num_searched: int, dry_run: bool) -> DedupeReport:
    """Count what was decided; parts_made is not known yet."""
    counts = np.bincount(decision.reason, minlength=len(REASONS)).tolist()
    is_gone = decision.keeper != np.arange(len(decision.keeper))
    is_gone &= decision.reason != REASONS.index("dropped_by_decision")
    return DedupeReport(
        num_files=len(decision.keeper),
        num_kept=counts[0],
        dropped={reason: count for reason, count in zip(REASONS[1:], counts[1:], strict=True) if count},
        num_groups=len(np.unique(decision.keeper[is_gone])),
        num_relatives=num_relatives,
        num_degenerate=decision.num_degenerate,
        num_cut_off=decision.num_cut_off,
        largest_component=decision.largest_component,
        num_searched=num_searched,
        parts_made=0,
        is_current=False,
        is_dry_run=dry_run,
    )

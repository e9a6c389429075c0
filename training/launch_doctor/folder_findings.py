"""What was found of the run folder, and the rows that say it. `folder` looks at it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.launch_doctor.clock import Skew
from training.launch_doctor.report import Row, listing

_SLOW_SECONDS = 5.0
"""NFS caches folders for 3 to 60 seconds unless told otherwise."""


@dataclass(frozen=True)
class FolderFindings:
    """What rank 0 knows in the end. Seconds by rank; None: never seen."""

    there: Mapping[str, float | None] = field(default_factory=dict)
    """From the moment that rank 0 had written a file until a node's process saw it."""
    back: Mapping[str, float | None] = field(default_factory=dict)
    """The other way round."""
    num_reads: int = 0
    num_torn: int = 0
    num_gone: int = 0
    """Reads of a file that was being replaced: that saw a mixture, that found none."""
    winners: Sequence[int] = ()
    """Of each race for a claim: how many believe to have won."""
    num_racers: int = 0
    has_links: bool = True
    flock: str = "held"
    """held · shared (two held it at once) · none (there are no such locks here)."""
    file_clock: tuple[float, float] = (0.0, 0.0)


def folder_rows(found: FolderFindings, root: Path, nodes: Mapping[int, str]) -> Iterator[Row]:
    """Yield rows. nodes: names by rank."""
    yield _shared_row(found, root, nodes)
    reads = f"{found.num_reads:,} reads of a file while it was replaced"
    text = f"{reads}: {found.num_torn} torn, {found.num_gone} found no file"
    if found.num_torn:
        advice = "states would be read half-written: put the run folder on another file system (local, NFS 4, Lustre)"
        yield Row("renames", text, "whole files only", "fail", advice)
    else:
        advice = "a reader may miss a file for a moment; runs read again, scripts of your own should" * (
            found.num_gone > 0
        )
        yield Row("renames", text, "whole files only", "warn" if found.num_gone else "ok", advice)
    yield _lock_row(found)
    if found.flock != "held":
        text = "there are no such locks" if found.flock == "none" else "two processes held it at once"
        advice = "training does not need it; let no two data tasks (scan, pack, …) work on the same parts"
        yield Row("flock", text, "held by one", "warn", advice)
    else:
        yield Row("flock", "the second one is refused", "held by one")


def file_clock(found: FolderFindings) -> Skew:
    """Return the file system's clock against rank 0's."""
    return Skew(*found.file_clock)


def _shared_row(found: FolderFindings, root: Path, nodes: Mapping[int, str]) -> Row:
    both = {int(rank): (found.there[rank], found.back.get(rank)) for rank in found.there}
    if lost := [rank for rank, seconds in both.items() if None in seconds]:
        names = ", ".join(nodes[rank] for rank in lost)
        advice = f"is {root.absolute()} on a disk that {names} mounts, at the same path? Name another --run-dir"
        return Row("run folder", f"not the same folder on {names}", "one folder for all nodes", "fail", advice)
    delays = [second for seconds in both.values() for second in seconds if second is not None]
    if not delays:
        return Row("run folder", "one node; it can be written", "one folder for all nodes")
    text, is_slow = f"{len(both) + 1} nodes see it, after {max(delays):.2f} s at most", max(delays) > _SLOW_SECONDS
    advice = "a stop request and a new state are noticed late: mount with a shorter acdirmax (NFS)" * is_slow
    return Row("run folder", text, "seen by all nodes, in 5 s", "warn" if is_slow else "ok", advice)


def _lock_row(found: FolderFindings) -> Row:
    how = "link()" if found.has_links else "exclusive creation, no hard links here"
    if not found.winners:
        return Row("lock", "not looked at: the folder is not shared", "one winner", "fail", "see the run folder above")
    if wrong := [number for number, wins in enumerate(found.winners, 1) if wins != 1]:
        text = f"race {listing(wrong)} of {len(found.winners)} had {found.winners[wrong[0] - 1]} winners, by {how}"
        advice = "two launches could train one run at once: put the run folder on another file system"
        return Row("lock", text, "one winner", "fail", advice)
    text = f"{len(found.winners)} races of {found.num_racers}: one winner each, by {how}"
    return Row("lock", text, "one winner")

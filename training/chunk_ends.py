"""The ends of finished chunks: where in the ledger each is, and whether its final state is kept.

Where a run can go back to (`training.rewind`) and where another can branch off (`training.fork`). Reads only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.config import ConfigError
from training.chunk_history import History, histories
from training.ledger import Line
from training.run_dir import RunDir
from training.state_manifest import StateError, read_manifest


@dataclass(frozen=True)
class ChunkEnd:
    """The end of a finished chunk. line: its last `chunk_done` line that still counts; state: its final state."""

    chunk: str
    line: Line
    state: Path

    @property
    def global_step(self) -> int:
        """The last step that its state holds."""
        step: int = self.line.fields["global_step"]
        return step

    @property
    def is_kept(self) -> bool:
        """Whether the state is there as it was saved; its files are not read."""
        try:
            return read_manifest(self.state).digest == str(self.line.fields["manifest_digest"])
        except StateError:
            return False


def chunk_ends(run_dir: RunDir, lines: Sequence[Line]) -> dict[str, ChunkEnd]:
    """Return the ends that still count, by chunk, in the order in which they were reached."""
    live = histories(lines)
    ends: dict[str, ChunkEnd] = {}
    for line in lines:
        if line.event == "chunk_done" and _counts(line, live[line.fields["chunk"]]):
            chunk = line.fields["chunk"]
            ends.pop(chunk, None)
            ends[chunk] = ChunkEnd(chunk, line, run_dir.root / line.fields["path"])
    return ends


def _counts(line: Line, history: History) -> bool:
    return history.status != "superseded" and any(fields is line.fields for fields in history.saved)


def kept_end(run_dir: RunDir, lines: Sequence[Line], chunk: str) -> ChunkEnd:
    """Return the end of a chunk whose final state is kept.

    Raises ConfigError when the chunk is not done, or its state is gone; the message names those that are kept.
    """
    ends = chunk_ends(run_dir, lines)
    kept = [name for name, end in ends.items() if end.is_kept]
    if chunk in kept:
        return ends[chunk]
    what = "its final state is gone (save.keep_chunks, save.keep_every_chunks)" if chunk in ends else "it is not done"
    shown = ", ".join(kept) if kept else "of no chunk"
    raise ConfigError(f"chunk {chunk}: {what} in {run_dir.root}; final states are kept of: {shown}")

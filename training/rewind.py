"""Go back to the end of a finished chunk: the later chunks count as never trained and can be trained anew.

Only the ledger's line is decided here; what is moved, and how a kill in between is made good, is in
`training.set_aside`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.chunk_ends import ChunkEnd, kept_end
from training.chunk_history import History, histories
from training.ledger import Line
from training.lock import RunLock
from training.run_dir import RunDir
from training.set_aside import finish_rewind
from training.state_manifest import verify_state


def plan_rewind(root: Path, chunk: str) -> str:
    """Say what `rewind` would do, in one sentence; reads only. Raises ConfigError as it."""
    run_dir = RunDir(root)
    lines = run_dir.read_ledger()
    end = kept_end(run_dir, lines, chunk)
    return f"{root}: would go {_what(end, chunks_after(end, lines))}."


def rewind(root: Path, chunk: str, *, reason: str) -> list[str]:
    """Take a run back to the end of `chunk`; return what was done, for people. reason: who asked, for the ledger.

    Does nothing when nothing was trained after it. A rewind that was killed is finished first.
    Raises ConfigError when the chunk's final state is not kept, StateError when it is damaged, LockHeldError.
    """
    run_dir = RunDir(root)
    with RunLock.acquire(run_dir.lock_path) as lock:
        ledger = run_dir.open_ledger(guard=lock.check)
        told = finish_rewind(run_dir, ledger)
        end = kept_end(run_dir, ledger.lines, chunk)
        verify_state(end.state)
        chunks = chunks_after(end, ledger.lines)
        if chunks:
            ledger.append(
                "superseded", chunks=chunks, reason=reason, chunk=chunk, after_line=end.line.number,
                global_step=end.global_step, moved_to=_folder_name(len(ledger.lines)),
            )  # fmt: skip
        return [*told, f"{root}: {_what(end, chunks)}", *finish_rewind(run_dir, ledger)]


def _what(end: ChunkEnd, chunks: Sequence[str]) -> str:
    undone = f"superseded: {', '.join(chunks)}" if chunks else "nothing was trained after it"
    return f"back to the end of chunk {end.chunk}, global step {end.global_step:,}; {undone}"


def _folder_name(number: int) -> str:
    return f"superseded/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{number}"


def chunks_after(end: ChunkEnd, lines: Sequence[Line]) -> list[str]:
    """Return the chunks that were trained after `end` and still count, in order."""
    live = histories(lines)
    later = [line.fields for line in lines[end.line.number + 1 :] if line.event == "started"]
    counting = [fields["chunk"] for fields in later if _counts(fields, live[fields["chunk"]])]
    return list(dict.fromkeys(counting))


def _counts(started: Mapping[str, Any], history: History) -> bool:
    return history.status != "superseded" and any(fields is started for fields in history.starts)

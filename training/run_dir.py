"""A run's folder: what lies where, and the small files in it.

    run.toml  run.json  ledger.jsonl  metrics.jsonl  last_exit.json  lock  fence/  stop
    chunks/newest/0005/  index.parquet  source.json  chunk.json     the chunk as it was when the run started it
                         state-00041216/  final/  weights/  previews/  complete.json
    tensorboard/  wandb/
    superseded/<time>/                                              what a rewind moved out of the way

No torch: status commands and submit scripts use this too. States are written by `state`, lines by `ledger`.
"""

import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from sharding.chunk import Chunk, seal
from sharding.files import TEMPORARY_MARK, write_json
from training.ledger import Ledger, LedgerError, Line, read_ledger
from training.started_chunk import StartedChunk, copy_chunk, read_copy

logger = logging.getLogger(__name__)

EXIT_FAILED = 1


class RunDir:
    """Names and small files of the run in `root`. Making one touches nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_path = root / "run.toml"
        self.run_json_path = root / "run.json"
        self.ledger_path = root / "ledger.jsonl"
        self.metrics_path = root / "metrics.jsonl"
        self.trace_path = root / "trace.jsonl"
        self.trackers_path = root / "trackers.json"
        self.last_exit_path = root / "last_exit.json"
        self.lock_path = root / "lock"
        self.stop_path = root / "stop"
        self.chunks_folder = root / "chunks"
        self.imported_folder = root / "imported"
        self.superseded_folder = root / "superseded"
        self.tensorboard_folder = root / "tensorboard"
        self.wandb_folder = root / "wandb"

    # --- a chunk's folders ---

    def chunk_folder(self, chunk: str) -> Path:
        """Return the folder of a chunk in this run. Raises ValueError for a name that would lead out of it."""
        parts = PurePosixPath(chunk).parts
        if not parts or chunk.startswith("/") or ".." in parts or "\\" in chunk:
            raise ValueError(f"chunk name {chunk!r}: must look like newest/0005")
        return self.chunks_folder.joinpath(*parts)

    def state_folder(self, chunk: str, global_step: int) -> Path:
        return self.chunk_folder(chunk) / f"state-{global_step:08d}"

    def final_folder(self, chunk: str) -> Path:
        return self.chunk_folder(chunk) / "final"

    def weights_folder(self, chunk: str) -> Path:
        return self.chunk_folder(chunk) / "weights"

    def previews_folder(self, chunk: str) -> Path:
        return self.chunk_folder(chunk) / "previews"

    def complete_path(self, chunk: str) -> Path:
        return self.chunk_folder(chunk) / "complete.json"

    def state_folders(self, chunk: str | None = None) -> list[Path]:
        """Return the states of a chunk, or of all, by name; partial ones are none. What verifies is `state`'s matter.

        `state-00000040.replaced-7` is one too: the older state of that step, for the moment of the exchange.
        """
        if chunk is not None:
            folders = [self.chunk_folder(chunk)]
        else:
            folders = [*self.chunks_folder.glob("*"), *self.chunks_folder.glob("*/*")]
        return sorted(
            path
            for folder in folders
            if folder.is_dir()
            for path in folder.iterdir()
            if path.name.startswith(("state-", "final")) and TEMPORARY_MARK not in path.name and path.is_dir()
        )

    def relative(self, path: Path) -> str:
        """Return a path below the run folder as ledger lines hold it: relative, "/" separated."""
        return path.absolute().relative_to(self.root.absolute()).as_posix()

    # --- the ledger ---

    def read_ledger(self) -> list[Line]:
        """Read and verify the ledger without changing it. Raises LedgerError."""
        return read_ledger(self.ledger_path)

    def open_ledger(self, *, guard: Callable[[], None]) -> Ledger:
        """Open the ledger for writing. Raises LedgerError when it is damaged, or missing although there are states."""
        if not self.ledger_path.exists() and (states := self.state_folders()):
            raise LedgerError(
                f"{self.ledger_path}: missing, but there are {len(states)} states, first {states[0]}: "
                "restore the ledger from a copy, or start a new run folder"
            )
        return Ledger.open(self.ledger_path, guard=guard)

    # --- run.json ---

    def read_run_json(self) -> dict[str, Any]:
        """Return the facts about the run; empty before the first launch."""
        return _read_json(self.run_json_path) or {}

    def update_run_json(self, **facts: Any) -> dict[str, Any]:
        """Merge facts into run.json and return all. The first call makes the `run_id`; W&B's id is the same."""
        known = self.read_run_json()
        if "run_id" not in known:
            known = new_ids(self.root)
        known.update(facts)
        write_json(self.run_json_path, known)
        return known

    # --- the exit code ---

    def write_last_exit(self, code: int, **facts: Any) -> None:
        """Record the exit code of this launch with its Slurm job; `accelerate launch` turns any code into 1."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        whose = {"time": now, "host": socket.gethostname(), "pid": os.getpid(), **_slurm_job()}
        write_json(self.last_exit_path, {"code": code, **whose, **facts})

    def read_last_exit(self) -> dict[str, Any] | None:
        """Return what the last launch wrote; None when it wrote nothing."""
        return _read_json(self.last_exit_path)

    def clear_last_exit(self) -> None:
        """Forget the last launch's exit code. A launcher does this before it launches, for `last_exit_code`."""
        self.last_exit_path.unlink(missing_ok=True)

    def own_exit_code(self) -> int | None:
        """Return the code that the launch just ended in this Slurm job (or shell) wrote; None when it wrote none."""
        last = self.read_last_exit()
        if last is None or any(last.get(name) != value for name, value in _slurm_job().items()):
            return None
        return int(last["code"])

    def last_exit_code(self) -> int:
        """Return the code of the launch just ended in this Slurm job (or shell); 1 when missing or another job's."""
        code = self.own_exit_code()
        return EXIT_FAILED if code is None else code

    # --- stopping ---

    def request_stop(self, reason: str = "asked for") -> None:
        """Ask the running launch to save and stop. Cheap enough for a signal handler or a shell's trap."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.stop_path.write_text(reason + "\n", encoding="utf-8")

    def stop_requested(self) -> bool:
        """Tell whether a stop was asked for. Lists the folder, which network file systems answer freshly."""
        return any(path.name == self.stop_path.name for path in self.root.iterdir())

    def clear_stop(self) -> None:
        """Remove the request; done by the launch that honoured it, and at the start of the next."""
        self.stop_path.unlink(missing_ok=True)

    # --- the run's copy of a chunk ---

    def start_chunk(self, chunk: Chunk) -> StartedChunk:
        """Return the chunk as this run trains it: copied at the first start, the copy ever after.

        A chunk that was packed anew since keeps the copy's samples and digest, with a warning. `chunk.folder` says
        where the shards are now, so a moved workspace is followed. Seals the chunk against replanning.
        Raises ChunkError when the copy's shards are missing or have another size.
        """
        if self.started_chunk(chunk.name, check_shards=False) is None:
            copy_chunk(chunk, self.chunk_folder(chunk.name))
        started = self.started_chunk(chunk.name, chunk_folder=chunk.folder)
        assert started is not None
        if started.info.digest != chunk.info.digest:
            logger.warning(
                "chunk %s was packed anew since this run started it (%s…, was %s…); going on with the run's copy",
                chunk.name, chunk.info.digest[:12], started.info.digest[:12],
            )  # fmt: skip
        seal(started, self.update_run_json()["run_id"])
        return started

    def started_chunk(
        self, name: str, *, chunk_folder: Path | None = None, check_shards: bool = True
    ) -> StartedChunk | None:
        """Return the run's copy of a chunk; None when the run has not started it.

        chunk_folder: where the chunk lies now; where it was at the start when None. A chunk that moved is noted.
        Raises ChunkError when the copy is damaged or its shards are missing or have another size.
        """
        chunk = read_copy(self.chunk_folder(name), chunk_folder=chunk_folder)
        if chunk is not None and check_shards:
            chunk.require_shards()
        return chunk

    # --- the end of a chunk ---

    def write_complete(self, chunk: str, **facts: Any) -> None:
        """Write complete.json, the last file of a chunk. Only after its final state was drained."""
        write_json(self.complete_path(chunk), facts)

    def read_complete(self, chunk: str) -> dict[str, Any] | None:
        """Return what complete.json says; None when the chunk is not complete."""
        return _read_json(self.complete_path(chunk))


def new_ids(root: Path) -> dict[str, Any]:
    """Return a run's ids, made from the name of its folder."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", root.absolute().name).strip("-")
    run_id = f"{name}-{secrets.token_hex(4)}"
    return {"run_id": run_id, "wandb_id": run_id}


def _slurm_job() -> dict[str, Any]:
    return {
        "slurm_job_id": os.environ.get("SLURM_JOB_ID") or None,
        "slurm_restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore or remove it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; restore or remove it")
    return value

"""One launch: train one chunk of a run, from wherever it stands, and leave the run folder consistent.

    lock → freeze run.toml → ledger → the run's copy of the chunk → newest verified state → loop → final state →
    previews → weights → complete.json → chunk_done

Every rank runs this; only rank 0 writes. To resume, run the same command again.
"""

import logging
import os
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from sharding.chunk import Chunk
from training.campaign import campaign_chunks, is_done, next_chunk, require_parent_done
from training.config import FREE_KEYS, RunConfig
from training.ledger import Ledger, chunk_records
from training.lock import LockLostError, RunLock
from training.run_dir import RunDir, freeze_config

logger = logging.getLogger(__name__)

DONE = 0
_REASON_LENGTH = 500


def launch(
    config: RunConfig,
    root: Path,
    *,
    chunk_name: str | None = None,
    num_processes: int | None = None,
    dry_run: bool = False,
) -> int:
    """Train a chunk; return 0 when it is done, 75 when the launch was asked to stop and a state is saved.

    chunk_name: default: the first chunk that is not done. num_processes: refuse to start with another number.
    A chunk that is done returns 0 at once, without loading anything.

    Raises ConfigError, ConfigChangedError, LockHeldError, ChunkError, StateError, BrokenDataError, NonFiniteError.
    """
    run_dir = RunDir(root)
    records = chunk_records(run_dir.read_ledger())
    chunks = {chunk.name: chunk for chunk in campaign_chunks(config.data.workspace, config.data.chunks)}
    chunk_name = chunk_name or next_chunk(list(chunks), records)
    if chunk_name is None:
        logger.info("all %d chunks of %s are done; nothing to do", len(chunks), root)
        return DONE
    if is_done(chunk_name, records):
        logger.info("chunk %s is done already; nothing to do", chunk_name)
        return DONE
    require_parent_done(chunk_name, list(chunks), records)
    if dry_run:
        from training.inspect_run import plan_text

        print(plan_text(config, root, chunk_name=chunk_name))
        return DONE
    return _train(config, run_dir, chunks[chunk_name], list(chunks).index(chunk_name), num_processes)


def _train(config: RunConfig, run_dir: RunDir, chunk: Chunk, number: int, num_processes: int | None) -> int:
    if int(os.environ.get("RANK", "0")) != 0:
        return _run_session(config, run_dir, chunk, number, ledger=None, guard=_no_guard, num_processes=num_processes)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with RunLock.acquire(run_dir.lock_path) as lock:
        code, ledger = 1, None
        try:
            ledger = _open_run(config, run_dir, guard=lock.check)
            code = _run_session(
                config, run_dir, chunk, number, ledger=ledger, guard=lock.check, num_processes=num_processes
            )
        except BaseException as error:
            from training.exit_codes import code_of

            code = code_of(error)
            if ledger is not None and not isinstance(error, LockLostError):
                reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
                ledger.append("failed", chunk=chunk.name, global_step=None, reason=reason)
            raise
        finally:
            with suppress(LockLostError):  # then the file is another launch's
                lock.check()
                run_dir.write_last_exit(code, chunk=chunk.name)
    return code


def _open_run(config: RunConfig, run_dir: RunDir, *, guard: Callable[[], None]) -> Ledger:
    """Freeze the config, or compare with the frozen one; open the ledger; forget an old request to stop."""
    changes = freeze_config(run_dir.config_path, config.model_dump(mode="json"), free=FREE_KEYS)
    for key, change in changes.items():
        logger.info("%s: %s at the first launch, now %s (free to change)", key, change.was, change.now)
    run_dir.clear_stop()
    return run_dir.open_ledger(guard=guard)


def _run_session(
    config: RunConfig,
    run_dir: RunDir,
    chunk: Chunk,
    number: int,
    *,
    ledger: Ledger | None,
    guard: Callable[[], None],
    num_processes: int | None,
) -> int:
    from training.session import Session  # torch is imported only now: a refused launch answers in a moment

    session = Session(config, run_dir, chunk, number, ledger=ledger, guard=guard, num_processes=num_processes)
    with closing(session):
        return session.run()


def _no_guard() -> None:
    """Stand for the lock on ranks that write nothing."""

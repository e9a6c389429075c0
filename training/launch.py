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
from typing import TYPE_CHECKING

from sharding.chunk import Chunk
from training.campaign import Campaign, is_done, read_campaign, require_parent_done
from training.config import FREE_KEYS, RunConfig
from training.exit_codes import DONE, FAILED, code_of
from training.frozen_config import freeze_config
from training.ledger import Ledger, LedgerError
from training.lock import LockLostError, RunLock
from training.run_dir import RunDir

if TYPE_CHECKING:
    from training.session import Session

logger = logging.getLogger(__name__)

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
    A chunk that is done returns 0 at once, without loading anything. On rank 0 the code, also of an error, is written
    to last_exit.json, except that a launch refused because another holds the run leaves that one's file alone.

    Raises ConfigError, ConfigChangedError, LockHeldError, ChunkError, StateError, BrokenDataError, NonFiniteError.
    """
    run_dir = RunDir(root)
    code, chunk, number = DONE, None, 0
    try:
        campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir)
        if (name := _chunk_to_train(campaign, root, chunk_name)) is not None:
            chunk, number = campaign.chunk(name), campaign.names.index(name)
    except Exception as error:
        code = code_of(error)
        raise
    finally:
        is_answered = code != DONE or chunk is None
        if is_answered and _is_main() and root.is_dir() and run_dir.last_exit_code() != code:
            _write_last_exit(run_dir, code, chunk_name)
    if chunk is None:
        return DONE
    if dry_run:
        from training.inspect_run import plan_text

        print(plan_text(config, root, chunk_name=chunk.name))
        return DONE
    return _train(config, run_dir, chunk, number, num_processes)


def _chunk_to_train(campaign: Campaign, root: Path, asked_for: str | None) -> str | None:
    """Return the chunk that this launch trains; None when there is nothing to do."""
    name = asked_for or campaign.next
    if name is None:
        logger.info("all %d chunks of %s are done; nothing to do", len(campaign.names), root)
        return None
    if is_done(name, campaign.records):
        logger.info("chunk %s is done already; nothing to do", name)
        return None
    require_parent_done(name, campaign.names, campaign.records)
    return name


def _train(config: RunConfig, run_dir: RunDir, chunk: Chunk, number: int, num_processes: int | None) -> int:
    def run_session(ledger: Ledger | None, guard: Callable[[], None]) -> int:
        from training.session import Session  # torch is imported only now: a refused launch answers in a moment

        session: Session | None = None
        try:
            session = Session(config, run_dir, chunk, number, ledger=ledger, guard=guard, num_processes=num_processes)
            with closing(session):
                return session.run()
        except BaseException as error:
            if ledger is not None:
                _append_failed(ledger, chunk.name, session, error)
            raise

    if not _is_main():
        return run_session(None, _no_guard)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with RunLock.acquire(run_dir.lock_path) as lock:
        code = FAILED
        try:
            code = run_session(_open_run(config, run_dir, guard=lock.check), lock.check)
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            with suppress(LockLostError):  # then the file is another launch's
                lock.check()
                _write_last_exit(run_dir, code, chunk.name)
    return code


def _open_run(config: RunConfig, run_dir: RunDir, *, guard: Callable[[], None]) -> Ledger:
    """Freeze the config, or compare with the frozen one; open the ledger; forget an old request to stop."""
    changes = freeze_config(run_dir.config_path, config.model_dump(mode="json"), free=FREE_KEYS)
    for key, change in changes.items():
        logger.info("%s: %s at the first launch, now %s (free to change)", key, change.was, change.now)
    run_dir.clear_stop()
    return run_dir.open_ledger(guard=guard)


def _append_failed(ledger: Ledger, chunk: str, session: "Session | None", error: BaseException) -> None:
    reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
    global_step = session.position.global_step if session is not None else None
    try:
        ledger.append("failed", chunk=chunk, global_step=global_step, reason=reason)
    except (LockLostError, LedgerError, OSError) as second:  # the first error is the one to show
        logger.error("the ledger has no line about this failure: %s", second)


def _write_last_exit(run_dir: RunDir, code: int, chunk_name: str | None) -> None:
    try:
        run_dir.write_last_exit(code, chunk=chunk_name)
    except OSError as error:
        logger.error("%s could not be written: %s", run_dir.last_exit_path, error)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _no_guard() -> None:
    """Stand for the lock on ranks that write nothing."""

"""One launch: train a chunk of a run, or several, from wherever it stands, and leave the run folder consistent.

    lock → freeze run.toml → ledger → the run's copy of the chunk → newest verified state → loop → final state →
    previews → weights → complete.json → chunk_done

Every rank runs this; only rank 0 writes. To resume, run the same command again.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from sharding.chunk import Chunk
from sharding.config import ConfigError
from training.alerts import Alerts
from training.campaign import Campaign, chunk_range, in_turn, read_campaign
from training.chunk_records import totals
from training.config import FREE_KEYS, GROWING_KEYS, RunConfig
from training.exit_codes import DONE, FAILED, code_of
from training.extend import extension_of, rate_text
from training.frozen_config import Change, freeze_config, write_grown
from training.ledger import Ledger, LedgerError
from training.loading.remote import mirror_remote
from training.lock import LockLostError, RunLock
from training.packages import require_packages
from training.position import Position
from training.run_dir import RunDir
from training.set_aside import finish_rewind
from training.stages import epochs_of, require_packed
from training.stop import StopRequest

logger = logging.getLogger(__name__)

_REASON_LENGTH = 500


def launch(
    config: RunConfig,
    root: Path,
    *,
    chunk_name: str | None = None,
    chunks: str | None = None,
    num_processes: int | None = None,
    dry_run: bool = False,
) -> int:
    """Train a chunk, or several in a row; return 0 when done, 75 when asked to stop and a state is saved.

    chunk_name: default: the first chunk that is not done. chunks: `A:B`, see `training.campaign.chunk_range`.
    num_processes: refuse to start with another number. Chunks that are done are left out; where all are, 0 is returned
    at once, without loading anything. On rank 0 the code, also of an error, is written to last_exit.json, except that a
    launch refused because another holds the run leaves that one's file alone.

    Raises ConfigError, ConfigChangedError, LockHeldError, ChunkError, StateError, BrokenDataError, NonFiniteError.
    """
    is_told = _is_main() and not dry_run
    with closing(Alerts(config.trackers, run=config.name, is_main=is_told)) as alerts:
        return _launch(config, RunDir(root), chunk_name, chunks, num_processes, dry_run=dry_run, alerts=alerts)


def _launch(
    config: RunConfig,
    run_dir: RunDir,
    chunk_name: str | None,
    chunks: str | None,
    num_processes: int | None,
    *,
    dry_run: bool,
    alerts: Alerts,
) -> int:
    root = run_dir.root
    code, coming = DONE, list[tuple[int, Chunk]]()
    try:
        mirror_remote(config.data, held_out=config.validation.chunk)
        campaign = _campaign(config, run_dir)
        names = _chunks_to_train(campaign, root, chunk_name, chunks)
        coming = [(campaign.names.index(name), campaign.chunk(name)) for name in names]
        if coming:
            require_packages(config)
    except Exception as error:
        code = code_of(error)
        alerts.failed(error, chunk=chunk_name)
        raise
    finally:
        is_answered = code != DONE or not coming
        if is_answered and _is_main() and root.is_dir() and run_dir.last_exit_code() != code:
            _write_last_exit(run_dir, code, chunk_name)
    if not coming:
        return DONE
    if dry_run:
        from training.inspect_run import plan_text

        for _, chunk in coming:
            print(plan_text(config, root, chunk_name=chunk.name))
        return DONE
    with StopRequest(run_dir.stop_requested) as stop:  # from here on: loading networks may take minutes
        return _train(config, run_dir, coming, num_processes, stop=stop, alerts=alerts)


def _chunks_to_train(campaign: Campaign, root: Path, name: str | None, span: str | None) -> list[str]:
    """Return the chunks that this launch trains, in order; none when there is nothing to do."""
    if name is not None and span is not None:
        raise ConfigError("--chunk and --chunks exclude each other")
    if span is not None:
        asked_for = chunk_range(campaign.names, span)
    else:
        asked_for = [name] if name is not None else [campaign.next] if campaign.next is not None else []
    names = in_turn([one for one in asked_for if not campaign.is_done(one)], campaign.records)
    if names:
        campaign.require_turn_of(names[0])
    elif asked_for:
        logger.info("%s done already; nothing to do", _listing(asked_for))
    else:
        logger.info("all %d chunks of %s are done; nothing to do", len(campaign.names), root)
    return names


def _listing(names: Sequence[str]) -> str:
    return f"chunk {names[0]} is" if len(names) == 1 else f"chunks {names[0]} to {names[-1]} are"


def _train(
    config: RunConfig,
    run_dir: RunDir,
    chunks: Sequence[tuple[int, Chunk]],
    num_processes: int | None,
    *,
    stop: StopRequest,
    alerts: Alerts,
) -> int:
    reached = chunks[0][1].name

    def run_session(ledger: Ledger | None, guard: Callable[[], None]) -> int:
        nonlocal reached
        from training.session import Session  # torch is imported only now: a refused launch answers in a moment

        session: Session | None = None
        try:
            session = Session(
                config, run_dir, ledger=ledger, guard=guard, num_processes=num_processes, stop=stop, alerts=alerts
            )
            with closing(session), alerts.on_failure(lambda: session.position if session is not None else None):
                return session.run(chunks)
        except BaseException as error:
            if ledger is not None:
                position = session.position if session is not None else None
                _append_failed(ledger, chunks[0][1].name, position, error)
            raise
        finally:
            if session is not None and session.position is not None:
                reached = session.position.chunk

    if not _is_main():
        return run_session(None, _no_guard)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    with RunLock.acquire(run_dir.lock_path) as lock:
        code = FAILED
        try:
            code = run_session(_open_run(config, run_dir, guard=lock.check), lock.check)
        except BaseException as error:
            code = code_of(error)
            alerts.failed(error, chunk=reached)
            raise
        finally:
            with suppress(LockLostError):  # then the file is another launch's
                lock.check()
                _write_last_exit(run_dir, code, reached)
    return code


def _campaign(config: RunConfig, run_dir: RunDir) -> Campaign:
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    require_packed(config, campaign.names)
    return campaign


def _open_run(config: RunConfig, run_dir: RunDir, *, guard: Callable[[], None]) -> Ledger:
    """Freeze the config, or compare with the frozen one; open the ledger; forget an old request to stop."""
    resolved = config.model_dump(mode="json")
    changes = freeze_config(run_dir.config_path, resolved, free=FREE_KEYS, growing=GROWING_KEYS)
    for key, change in changes.items():
        if key == "trackers.webhook":
            logger.info("%s: not that of the first launch (free to change)", key)  # its address may hold a secret
        elif not change.has_grown:
            logger.info("%s: %s at the first launch, now %s (free to change)", key, change.was, change.now)
    if run_dir.stop_requested():
        logger.warning("%s: written before this launch; removed, training goes on", run_dir.stop_path)
    run_dir.clear_stop()
    ledger = run_dir.open_ledger(guard=guard)
    for told in finish_rewind(run_dir, ledger):
        logger.warning("a rewind was killed half-way and is finished now: %s", told)
    run_dir.update_run_json(folder=str(run_dir.root.resolve()))
    _extend(config, run_dir, ledger, changes)
    return ledger


def _extend(config: RunConfig, run_dir: RunDir, ledger: Ledger, changes: Mapping[str, Change]) -> None:
    """Where the run has grown since its last launch, say so aloud and in the ledger. Raises as `rate_text`."""
    known, names = run_dir.read_run_json().get("chunks"), _campaign(config, run_dir).names
    extension = extension_of(changes, known_chunks=known, chunks=names)
    if extension:
        global_step = totals(ledger.lines).global_step
        horizon = extension.grown.get("schedule.total_steps")
        was_total_steps = horizon.was if horizon is not None else None
        rate = rate_text(config.schedule.model_dump(), was_total_steps=was_total_steps, global_step=global_step)
        reason = f"{extension.reason}; {rate}"
        logger.info("the run is extended: %s", reason)
        chunks = list(extension.chunks)
        ledger.append("extended", epochs=config.data.epochs, chunks=chunks, global_step=global_step, reason=reason)
        write_grown(run_dir.config_path, extension.grown)
    if known is None or extension.chunks:
        run_dir.update_run_json(chunks=[*known, *extension.chunks] if known is not None else list(names))


def _append_failed(ledger: Ledger, chunk: str, position: Position | None, error: BaseException) -> None:
    reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
    if position is not None:
        chunk = position.chunk
    global_step = position.global_step if position is not None else None
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

"""What the next launch of a run does, and what it finds: one sentence, before anything is started. Reads only.

The launch itself decides by the same functions (`training.campaign`, `training.start_state`); nothing here is handed to
it but the chunk's name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.campaign import Campaign, read_campaign
from training.chunk_records import imported_state, parent_of
from training.config import FREE_KEYS, GROWING_KEYS, RunConfig
from training.extend import extension_of
from training.frozen_config import freeze_config
from training.ledger import Line
from training.lock import HolderState, LockHeldError, holder_state
from training.run_dir import RunDir
from training.set_aside import pending_rewind
from training.stages import epochs_of

_REASON_LENGTH = 160


@dataclass(frozen=True)
class NextLaunch:
    """What is next. chunk: None when all is done; sentence: what was found and what is done about it."""

    chunk: str | None
    sentence: str


def next_launch(config: RunConfig, root: Path, *, is_verifying: bool = False) -> NextLaunch:
    """Look into ledger, run folder and workspace.

    is_verifying: read the states that the launch could start from and say which are damaged; otherwise the ledger is
    believed. Raises LockHeldError when a launch is at work, ConfigChangedError, ConfigError, ChunkError, LedgerError,
    StateError when no state verifies.
    """
    run_dir = RunDir(root)
    holder = holder_state(run_dir.lock_path)
    if holder is not None and holder.is_live:
        raise LockHeldError(
            f"{root}: a launch is at work ({holder}); nothing was started. One on another machine counts as dead after "
            f"{2 * holder.holder.heartbeat_seconds:.0f} s without a heartbeat"
        )
    campaign = read_campaign(config.data.workspace, config.data.chunks, run_dir, epochs=epochs_of(config))
    found = [
        *_where(run_dir),
        *_last_words(campaign.lines, holder),
        *_changes(campaign, config, run_dir),
    ]
    chunk = campaign.next
    if chunk is None:
        return NextLaunch(None, _sentence(root, [*found, f"all {len(campaign.names)} chunks are done; nothing to do"]))
    chosen = _choose(campaign, run_dir, chunk) if is_verifying else Chosen(None, ())
    return NextLaunch(chunk, _sentence(root, [*found, *_doing(campaign, chunk, chosen)]))


def _sentence(root: Path, parts: Sequence[str]) -> str:
    return f"{root}: {'; '.join(parts)}."


# --- what was found ---


def _where(run_dir: RunDir) -> list[str]:
    before = run_dir.read_run_json().get("folder")
    here = str(run_dir.root.resolve())
    return [f"the run folder was moved here from {before}"] if before not in (None, here) else []


def _last_words(lines: Sequence[Line], holder: HolderState | None) -> list[str]:
    """Return how the last launch ended, unless well, and what was done to the run since."""
    if (pending := pending_rewind(lines)) is not None:
        return [f"a rewind to {pending.fields['chunk']} was killed half-way and is finished first"]
    last = next((line for line in reversed(lines) if line.event in _WORDS), None)
    if holder is not None and (last is None or last.event not in ("failed", "stopped")):
        return [f"the last launch was killed ({holder.reason})"]
    say = _WORDS[last.event] if last is not None else None
    return [say(last)] if last is not None and say is not None else []


def _short(reason: object) -> str:
    text = " ".join(str(reason).split())
    return text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 1]}…"


def _superseded(line: Line) -> str:
    chunks = line.fields["chunks"]
    span = chunks[0] if len(chunks) == 1 else f"{chunks[0]} to {chunks[-1]} ({len(chunks):,} chunks)"
    return f"{span} {'was' if len(chunks) == 1 else 'were'} superseded ({_short(line.fields['reason'])})"


_WORDS: Mapping[str, Callable[[Line], str] | None] = {
    "failed": lambda line: f"the last launch failed ({_short(line.fields['reason'])})",
    "stopped": lambda line: f"the last launch was stopped ({_short(line.fields['reason'])})",
    "superseded": _superseded,
    "forked": lambda line: f"a branch of {line.fields['source']} from the end of {line.fields['chunk']}",
    "imported": lambda line: f"the state of another trainer is its first ({line.fields['source']})",
    "started": None,
    "chunk_done": None,
}
"""What the last of these lines says; None: nothing that the rest of the sentence does not."""


def _changes(campaign: Campaign, config: RunConfig, run_dir: RunDir) -> list[str]:
    """Return how the run has grown since its last launch. Raises ConfigChangedError for what may not change."""
    if not run_dir.config_path.exists():
        return []
    resolved = config.model_dump(mode="json")
    changes = freeze_config(run_dir.config_path, resolved, free=FREE_KEYS, growing=GROWING_KEYS)
    known = run_dir.read_run_json().get("chunks")
    extension = extension_of(changes, known_chunks=known, chunks=campaign.names)
    return [f"the run is extended ({extension.reason})"] if extension else []


# --- what is done ---


class Chosen(NamedTuple):
    """The newest state that verifies, if that was looked at, and damaged ones that are newer."""

    global_step: int | None
    passed_over: tuple[str, ...]


def _doing(campaign: Campaign, chunk: str, chosen: Chosen) -> list[str]:
    names, record = campaign.names, campaign.records.get(chunk)
    place = f"chunk {chunk} ({names.index(chunk) + 1} of {len(names)})"
    damaged = [f"damaged and passed over: {', '.join(chosen.passed_over)}"] if chosen.passed_over else []
    if record is None or record.status != "running":
        done = [name for name in names if campaign.is_done(name)]
        again = f" again, from epoch {record.epochs} on," if record is not None and record.status == "done" else ""
        return [f"{len(done)} chunks are done", *damaged, f"starting {place}{again} {_origin(campaign, chunk)}"]
    last = record.last_state
    if last is None or last.global_step <= record.visits[-1].global_step:
        return [f"{place} was started but has no state yet", *damaged, "starting it again"]
    step = last.global_step if chosen.global_step is None else chosen.global_step
    state = "the newest verified one" if damaged else "its state"
    return [f"{place} is half trained", *damaged, f"going on from {state} at global step {step:,}"]


def _origin(campaign: Campaign, chunk: str) -> str:
    if parent := parent_of(campaign.lines, chunk):
        return f"from the state of {parent}"
    if imported := imported_state(campaign.lines):
        return f"from the imported state {imported.path}"
    return "from the weights that run.toml names"


def _choose(campaign: Campaign, run_dir: RunDir, chunk: str) -> Chosen:
    """Verify the states that the launch could start from. Raises StateError, saying what to do, when none verifies."""
    from training.start_state import states_to_start_from  # these read states: torch
    from training.state_folder import newest_verified
    from training.state_manifest import StateError, read_manifest

    try:
        folders = states_to_start_from(run_dir, campaign.lines, chunk)
        if folders is None:
            return Chosen(None, ())
        newest, problems = newest_verified(folders)
    except StateError as error:
        where = "" if str(error).startswith("chunk ") else f"chunk {chunk}: "
        raise StateError(f"{where}{error}; {_way_back(campaign, run_dir)}") from error
    return Chosen(read_manifest(newest).global_step, tuple(f"{one.name} ({_short(why)})" for one, why in problems))


def _way_back(campaign: Campaign, run_dir: RunDir) -> str:
    """Say from which finished chunk the run can go on, when the states of the newest are damaged."""
    from training.chunk_ends import chunk_ends
    from training.state_manifest import StateError, verify_state

    for end in reversed(chunk_ends(run_dir, campaign.lines).values()):
        try:
            verify_state(end.state)
        except StateError:
            continue
        return f"or go back to the end of chunk {end.chunk}, whose state is whole, with `--rewind {end.chunk}`"
    return "restore one from a copy: no chunk's final state is whole"

"""Begin another run from the end of a chunk of this one: the new run folder is this one as it was then.

Its ledger begins with this run's lines up to the chunk's `chunk_done`, byte for byte, then a line `forked` that says
where they are from; so counters, status, charts and the proof go on as in one run. What is big is hard-linked where the
disk can: states, indexes and pictures are never changed in place. Nothing of the parent is written.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.chunk import CHUNK_JSON
from sharding.config import ConfigError, load_config
from sharding.files import TEMPORARY_MARK, fsync_folder, write_bytes, write_json
from training.chunk_ends import ChunkEnd, kept_end
from training.chunk_history import histories
from training.config import RunConfig
from training.frozen_config import Change, changes_between, to_toml
from training.ledger import Line
from training.metrics_file import copy_metrics
from training.preview import read_pictures
from training.run_dir import RunDir, new_ids
from training.set_aside import completed
from training.started_chunk import INDEX, SOURCE
from training.state_manifest import MANIFEST, read_manifest, verify_state


@dataclass(frozen=True)
class Fork:
    """What a fork is to be. changes: of settings, by dotted key."""

    parent: RunDir
    root: Path
    end: ChunkEnd
    lines: Sequence[Line]
    """The parent's, up to the chunk's end."""
    was: RunConfig
    config: RunConfig
    changes: Mapping[str, Change]

    def text(self) -> list[str]:
        """Return it for people, a line each."""
        chunks = [name for name, one in histories(self.lines).items() if one.status == "done"]
        return [
            f"{self.root}: a branch of {self.parent.root} from the end of chunk {self.end.chunk}, global step "
            f"{self.end.global_step:,}; {len(chunks):,} chunks are trained",
            *(f"  {key}: {change.was} there, {change.now} here" for key, change in self.changes.items()),
            *(() if self.changes else ("  with the same settings",)),
        ]


def plan_fork(parent_root: Path, chunk: str, root: Path, *, overrides: Sequence[str] = ()) -> Fork:
    """Return what `fork` would make; writes nothing.

    overrides: `key=value`; any key of run.toml. Raises ConfigError when `root` is in use, or the chunk's final state is
    not kept, FileNotFoundError without a run in `parent_root`.
    """
    parent = RunDir(parent_root)
    if not parent.config_path.exists():
        raise FileNotFoundError(f"{parent.config_path}: not there, so no run was started in {parent_root}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"--fork {root}: is there already and not empty; a branch needs a new run folder")
    lines = parent.read_ledger()
    end = kept_end(parent, lines, chunk)
    was = load_config(parent.config_path, RunConfig, [])
    config = load_config(parent.config_path, RunConfig, list(overrides))
    changes = changes_between(was.shown(), config.shown())
    return Fork(parent, root, end, lines[: end.line.number + 1], was, config, changes)


def make_fork(fork: Fork) -> None:
    """Make the run folder, whole or not at all. Raises StateError when the parent's state is damaged."""
    partial = fork.root.with_name(f"{fork.root.name}{TEMPORARY_MARK}fork")
    shutil.rmtree(partial, ignore_errors=True)
    run_dir = RunDir(partial)
    run_dir.chunks_folder.mkdir(parents=True)
    write_bytes(run_dir.config_path, to_toml(fork.config.model_dump(mode="json")).encode())
    parent_id = fork.parent.read_run_json().get("run_id", "")
    source = str(fork.parent.root.absolute())
    write_json(
        run_dir.run_json_path,
        {**new_ids(fork.root), "forked_from": {"run_id": parent_id, "run_dir": source, "chunk": fork.end.chunk}},
    )
    for name in ("metrics_path", "trace_path"):
        copy_metrics(getattr(fork.parent, name), getattr(run_dir, name), up_to_step=fork.end.global_step)
    _take_chunks(fork, run_dir)
    _take_state(fork.end.state, run_dir.final_folder(fork.end.chunk))
    _begin_ledger(fork, run_dir, parent_id, source)
    os.replace(partial, fork.root)
    fsync_folder(fork.root.parent)


def _take_chunks(fork: Fork, run_dir: RunDir) -> None:
    """Take what the run keeps of every chunk that was trained: its index, its pictures, complete.json."""
    for chunk, history in histories(fork.lines).items():
        if history.status == "superseded":
            continue
        there, here = fork.parent.chunk_folder(chunk), run_dir.chunk_folder(chunk)
        here.mkdir(parents=True)
        for name in (INDEX, SOURCE, CHUNK_JSON):
            _link(there / name, here / name)
        for step, named in read_pictures(there / "previews").items():
            for path in named.values() if step <= fork.end.global_step else ():
                _link(path, here / "previews" / path.name)
        if complete := fork.parent.read_complete(chunk):
            run_dir.write_complete(chunk, **completed(history, counts=complete["counts"]))
    for path in (fork.parent.root / "verdict").glob("*.*"):
        _link(path, run_dir.root / "verdict" / path.name)


def _take_state(there: Path, here: Path) -> None:
    for name in [*read_manifest(there).files, MANIFEST]:
        _link(there / name, here / name)
    verify_state(here)


def _begin_ledger(fork: Fork, run_dir: RunDir, parent_id: str, source: str) -> None:
    raw = fork.parent.ledger_path.read_bytes().splitlines(keepends=True)[: len(fork.lines)]
    write_bytes(run_dir.ledger_path, b"".join(raw))
    ledger = run_dir.open_ledger(guard=_no_guard)
    ledger.append(
        "forked", run_id=parent_id, source=source, chunk=fork.end.chunk,
        path=run_dir.relative(run_dir.final_folder(fork.end.chunk)),
        manifest_digest=fork.end.line.fields["manifest_digest"], global_step=fork.end.global_step,
        settings=fork.was.shown(),
        changed={key: [change.was, change.now] for key, change in fork.changes.items()},
    )  # fmt: skip


def _link(there: Path, here: Path) -> None:
    """Give a file a second name, or copy it where that cannot be."""
    here.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(there, here)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(there, here)


def _no_guard() -> None:
    """Stand for the lock: nobody knows the new run folder yet."""


def settings_of(lines: Sequence[Line], config: RunConfig, chunk: str, epoch: int) -> RunConfig:
    """Return the settings that an epoch of a chunk was, or is to be, trained with: those of the run, or, if it was
    trained before a fork, those of the run that it was trained in."""
    for line in lines:
        if line.event == "forked":
            history = histories(lines[: line.number]).get(chunk)
            if history is not None and history.status != "superseded" and epoch < history.latest["epochs"]:
                return RunConfig.model_validate(line.fields["settings"])
    return config

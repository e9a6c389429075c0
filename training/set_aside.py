"""Move what a rewind undid out of the way: nothing is lost, and the run folder is as it was at the step gone back to.

    superseded/<time>/  chunks/…  metrics.jsonl  trace.jsonl  tensorboard/  wandb/  verdict.json

The ledger's `superseded` line comes first and says what is to be moved, its `rewound` line last. Each step in between
may be done twice, so whoever opens the run next finishes what a kill interrupted (`finish_rewind`). For the holder of
the run's lock; no torch, except where chunks were trained in several turns.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sharding.files import fsync_folder, size_text, write_json
from training.chunk_history import History, histories
from training.ledger import Ledger, Line
from training.metrics_file import copy_metrics, trim_metrics
from training.preview import read_pictures
from training.run_dir import RunDir

logger = logging.getLogger(__name__)

_OF_A_VISIT = ("weights", "best")
"""Beside the final state: what the end of a turn leaves in a chunk's folder."""


def pending_rewind(lines: Sequence[Line]) -> Line | None:
    """Return the `superseded` line of a rewind that was killed before it had moved everything; None normally."""
    pending = None
    for line in lines:
        if line.event == "superseded" and "moved_to" in line.fields:
            pending = line
        elif line.event == "rewound":
            pending = None
    return pending


def finish_rewind(run_dir: RunDir, ledger: Ledger) -> list[str]:
    """Move what the pending rewind undid; return what people should know of it, nothing when none is pending."""
    line = pending_rewind(ledger.lines)
    if line is None:
        return []
    aside, step = run_dir.root / line.fields["moved_to"], line.fields["global_step"]
    live = histories(ledger.lines)
    for chunk in line.fields["chunks"]:
        if live[chunk].status == "superseded":
            _move(run_dir.chunk_folder(chunk), aside / "chunks" / chunk)
        else:
            _move_last_turn(run_dir, live[chunk], aside / "chunks" / chunk, step=step)
    for path in (run_dir.metrics_path, run_dir.trace_path):
        copy_metrics(path, aside / path.name, after_step=step)
        trim_metrics(path, after_step=step)
    if _global_step_in(run_dir.root / "verdict.json") > step:
        _move(run_dir.root / "verdict.json", aside / "verdict.json")
    told = [
        f"moved to {aside} ({size_text(_num_bytes(aside))}): delete it when it is not needed any more",
        *_move_charts(run_dir, aside, step=step, mark=line.number),
    ]
    ledger.append("rewound", path=line.fields["moved_to"], global_step=step)
    return told


def _move(source: Path, target: Path) -> None:
    """Rename; nothing to do when that has been done."""
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        fsync_folder(target.parent)
        fsync_folder(source.parent)


# --- a chunk that was trained before the step gone back to, and again after it ---


def _move_last_turn(run_dir: RunDir, history: History, aside: Path, *, step: int) -> None:
    """Move what was saved after `step`. What the chunk is, and its pictures up to there, stay."""
    chunk = history.first["chunk"]
    folder, complete = run_dir.chunk_folder(chunk), run_dir.read_complete(chunk)
    for state in run_dir.state_folders(chunk):
        if _is_after(state, step):
            _move(state, aside / state.name)
    for pictures_of, named in read_pictures(run_dir.previews_folder(chunk)).items():
        for path in named.values() if pictures_of > step else ():
            _move(path, aside / "previews" / path.name)
    if complete is not None and complete["global_step"] > step:
        for name in _OF_A_VISIT:
            _move(folder / name, aside / name)
        write_json(aside / "complete.json", complete)
        run_dir.write_complete(chunk, **completed(history, counts=complete["counts"]))


def _is_after(state: Path, step: int) -> bool:
    from training.state_manifest import StateError, read_manifest

    try:
        return read_manifest(state).global_step > step
    except StateError as error:
        logger.warning("%s", error)
        return True


def completed(history: History, *, counts: Any) -> dict[str, Any]:
    """Return what complete.json says of a chunk that is done. counts: of its images."""
    facts = {name: value for name, value in history.saved[-1].items() if name != "chunk"}
    digests = {"chunk_digest": history.first["chunk_digest"], "plan_digests": history.latest["plan_digests"]}
    return {"counts": counts, **digests, **facts}


# --- charts ---


def _move_charts(run_dir: RunDir, aside: Path, *, step: int, mark: int) -> Iterator[str]:
    """Move the series that went beyond `step`: the next launch feeds them again from metrics.jsonl, up to there.

    mark: of this rewind; the same at each call.
    """
    path = run_dir.trackers_path
    positions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    beyond = [name for name, one in positions.items() if max(one["asked"], one["fed"]) > step]
    for name in beyond:
        _move(run_dir.root / name, aside / name)
    if "wandb" in beyond:
        yield _begin_wandb_run(run_dir, mark=mark)
    if beyond:
        write_json(path, {name: one for name, one in positions.items() if name not in beyond})
        yield f"charts of {' and '.join(beyond)} are drawn again from metrics.jsonl by the next launch"


def _begin_wandb_run(run_dir: RunDir, *, mark: int) -> str:
    """Give the run another W&B id: W&B takes no step back."""
    known = run_dir.read_run_json()
    was, now = known["wandb_id"], f"{known['run_id']}-{mark}"
    before = [*known.get("wandb_ids_before", []), *([was] if was != now else [])]
    run_dir.update_run_json(wandb_id=now, wandb_ids_before=before)
    return (
        f"W&B cannot forget steps: the run goes on there under a new id, {now}, which names {before[-1]} in its config"
    )


# --- small facts ---


def _global_step_in(path: Path) -> int:
    return int(json.loads(path.read_text(encoding="utf-8"))["global_step"]) if path.exists() else -1


def _num_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())

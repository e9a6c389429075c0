"""dedupe: of files that show the same picture one stays, and the tables say why.

Reads the manifest and people's decisions, keeps `dedupe/pairs` up to date, and writes `dedupe/groups`,
`dedupe/relatives`, `dedupe/drops` and, for each part of the manifest, the part of the same name in `dedupe/kept`. Which
pictures are alike is found by `pairs`; which one stays is decided by `keepers`; what the keeper inherits by `inherit`;
the tables are made by `verdicts`. This file reads, writes and knows when all is current.

    python -m sharding dedupe configs/datasets/X.toml --workspace W
"""

import hashlib
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sharding.config import DatasetConfig
from sharding.decisions import Decisions, read_decisions
from sharding.duplicates.candidates import Places, content_digests, read_candidates
from sharding.duplicates.cut import Candidates
from sharding.duplicates.inherit import Inheritances, with_inheritances
from sharding.duplicates.keepers import Decision, decide
from sharding.duplicates.pairs import Pairs, Pictures, update_pairs
from sharding.duplicates.report import DedupeReport, make_report
from sharding.duplicates.second_look import pair_rules, variant_check
from sharding.duplicates.verdicts import make_drops, make_groups, make_relatives
from sharding.files import digest_of, locked, remove_temporaries
from sharding.keys import is_in, key_numbers
from sharding.runlog import EventLog
from sharding.schema import MANIFEST, PLAN, Workspace
from sharding.tables import (
    DamagedPartError,
    is_current,
    list_parts,
    part_metadata,
    part_name,
    read_part,
    read_parts,
    schema_mismatch,
    write_part,
)

logger = logging.getLogger(__name__)

DEDUPE_VERSION = 2
"""Raised when the code would decide otherwise on the same manifest."""

TABLES = ("pairs", "groups", "relatives", "drops")


def dedupe(config: DatasetConfig, workspace: Workspace, *, dry_run: bool = False) -> DedupeReport:
    """Decide which pictures stay, across all sources, and write it down.

    Groups are connected by pairs within config.dedupe.radius; a member farther than max_diameter from its keeper forms
    a group of its own with others left over. Planned keys (workspace.plan) stay, unless a reference or people say no.

    Raises FileNotFoundError without a manifest, ValueError when a part of it is missing or was made with another hash,
    DuplicateKeyError.
    """
    with locked(workspace.dedupe, dry_run=dry_run):
        return _dedupe(config, workspace, dry_run=dry_run)


def _dedupe(config: DatasetConfig, workspace: Workspace, *, dry_run: bool) -> DedupeReport:
    parts = _manifest_parts(workspace)
    planned = _planned_keys(workspace)
    decisions = read_decisions(workspace)
    made_from = _made_from(config, parts, decisions)
    if report := _current_report(workspace, parts, made_from, planned, dry_run=dry_run):
        return report
    candidates, places = read_candidates(config, parts, planned, decisions)
    if not dry_run:
        for name in (*TABLES, "kept"):
            remove_temporaries(workspace.dedupe / name)
    started = time.monotonic()
    pairs, num_searched = _find_pairs(config, workspace, candidates, places, dry_run=dry_run)
    search_seconds = time.monotonic() - started
    decision = decide(
        candidates,
        pairs,
        max_diameter=config.dedupe.max_diameter,
        order=config.dedupe.keeper,
        are_variants=variant_check(places) if config.dedupe.keep_variants else None,
    )
    relatives = make_relatives(candidates, decision)
    report = make_report(decision, num_relatives=len(relatives), num_searched=num_searched, dry_run=dry_run)
    if dry_run:
        return replace(report, parts_made=len(parts))
    parts_made, kept_digest = _write_kept(workspace, places, decision, merge_tags=config.dedupe.merge_tags)
    for name, table in (
        ("relatives", relatives),
        ("drops", make_drops(candidates, places, decision, decisions, config.dedupe.turns)),
    ):
        write_part(workspace.dedupe / name / part_name(0), table, made_from=made_from)
    # The groups come last: their digest says that everything else is in place.
    facts = {"kept_digest": kept_digest, "planned_elsewhere": _planned_elsewhere(workspace, planned)}
    counts = {name: value for name, value in vars(report).items() if name not in ("parts_made", "num_searched")}
    write_part(
        workspace.dedupe / "groups" / part_name(0),
        make_groups(candidates, decision),
        made_from=made_from,
        metadata={**facts, "report": json.dumps(counts)},
    )
    _remove_stale(workspace, parts)
    events = {name: value for name, value in vars(report).items() if name.startswith("num_")}
    EventLog(workspace.events, stage="dedupe").write(
        "done", **events, dropped=dict(report.dropped), search_seconds=round(search_seconds, 1)
    )
    return replace(report, parts_made=parts_made)


def is_dedupe_current(config: DatasetConfig, workspace: Workspace) -> bool:
    """Tell whether the tables are those of today's manifest, settings, plan and decisions.

    Raises as `dedupe` does.
    """
    parts = _manifest_parts(workspace)
    made_from = _made_from(config, parts, read_decisions(workspace))
    return _current_report(workspace, parts, made_from, _planned_keys(workspace), dry_run=True) is not None


def _find_pairs(
    config: DatasetConfig, workspace: Workspace, candidates: Candidates, places: Places, *, dry_run: bool
) -> tuple[Pairs, int]:
    key, first = np.unique(candidates.key, return_index=True)
    pictures = Pictures(key, candidates.phash[first], candidates.turned[first], candidates.is_comparable[first])
    digests = content_digests(candidates, places)
    keys = [candidates.key[places.of_part(number)] for number in range(len(places.parts))]
    return update_pairs(
        workspace.dedupe / "pairs" / part_name(0),
        pictures,
        pair_rules(config.dedupe, places, first),
        parts=list(zip(digests, keys, strict=True)),
        dry_run=dry_run,
    )


# --- what there is ---


def _manifest_parts(workspace: Workspace) -> list[Path]:
    parts = list_parts(workspace.manifest)
    if not parts:
        raise FileNotFoundError(f"{workspace.manifest}: no parts; run `python -m sharding scan` first")
    missing = sorted({part.name for part in list_parts(workspace.listing)} - {part.name for part in parts})
    if missing:
        raise ValueError(
            f"{workspace.manifest}: {len(missing):,} of the listed parts are missing, first {missing[0]}; "
            "run `python -m sharding scan` for them first"
        )
    return parts


def _planned_keys(workspace: Workspace) -> npt.NDArray[np.uint64]:
    """Return the keys of the plan, sorted."""
    keys: npt.NDArray[np.uint64] = np.unique(
        key_numbers(read_parts(workspace.plan, ["key"], schema=PLAN).column("key"))
    )
    return keys


def _made_from(config: DatasetConfig, parts: list[Path], decisions: Decisions) -> str:
    return digest_of(
        {
            "version": DEDUPE_VERSION,
            "parts": [[part.name, part_metadata(part).get("made_from")] for part in parts],
            "dedupe": config.dedupe.model_dump(mode="json"),
            "sources": {name: [source.priority, source.is_reference] for name, source in config.sources.items()},
            "decisions": decisions.digest(),
        }
    )


def _planned_elsewhere(workspace: Workspace, planned: npt.NDArray[np.uint64]) -> str:
    """Return a digest of the planned keys that are not kept.

    Those that are kept change nothing when they are asked first: who was kept stays kept.
    """
    kept = key_numbers(read_parts(workspace.kept, ["key"], schema=MANIFEST).column("key"))
    return hashlib.sha256(planned[~is_in(planned, kept)].tobytes()).hexdigest()


def _kept_digest(workspace: Workspace, parts: list[Path]) -> str:
    """Return a digest of which kept parts there are and what each was made from; a part that changed is noticed."""
    folder = workspace.kept
    return digest_of([[part.name, part_metadata(folder / part.name).get("made_from")] for part in parts])


def _current_report(
    workspace: Workspace, parts: list[Path], made_from: str, planned: npt.NDArray[np.uint64], *, dry_run: bool
) -> DedupeReport | None:  # fmt: skip
    """Return the report on disk if what it was made from, and all that was written with it, is still the same."""
    groups = workspace.dedupe / "groups" / part_name(0)
    if not all(is_current(workspace.dedupe / name / part_name(0), made_from) for name in TABLES if name != "pairs"):
        return None
    if [part.name for part in list_parts(workspace.kept)] != [part.name for part in parts]:
        return None
    facts = part_metadata(groups)
    try:
        if facts.get("kept_digest") != _kept_digest(workspace, parts):
            return None
    except DamagedPartError:
        return None
    if facts.get("planned_elsewhere") != _planned_elsewhere(workspace, planned):
        return None
    counts: dict[str, Any] = json.loads(facts["report"])
    return DedupeReport(**counts | {"num_searched": 0, "parts_made": 0, "is_current": True, "is_dry_run": dry_run})


# --- what is written ---


def _write_kept(workspace: Workspace, places: Places, decision: Decision, *, merge_tags: bool) -> tuple[int, str]:
    """Write the parts of `kept` that are not current; return their number and a digest of all."""
    gone = np.flatnonzero((decision.keeper != np.arange(len(decision.keeper))) & decision.is_kept[decision.keeper])
    if not merge_tags:
        gone = gone[:0]
    inheritances = Inheritances(places, decision.keeper[gone], gone)
    num_made = 0
    for number, part in enumerate(places.parts):
        candidates = np.arange(len(decision.keeper))[places.of_part(number)]
        kept = candidates[decision.is_kept[candidates]]
        rows = places.row[kept]
        inherited = inheritances.of_part(number)
        changes = {place: inherited[row] for place, row in enumerate(kept.tolist()) if row in inherited}
        made_from = digest_of(
            {
                "version": DEDUPE_VERSION,
                "manifest": part_metadata(part).get("made_from"),
                "rows": rows.tolist(),
                "changes": [[place, change.digestible()] for place, change in changes.items()],
            }
        )
        target = workspace.kept / part.name
        if is_current(target, made_from):
            continue
        manifest = _without_second_look(read_part(part))
        if difference := schema_mismatch(manifest, MANIFEST):
            raise ValueError(f"{part}: {difference}; run `python -m sharding scan` again")
        write_part(target, with_inheritances(manifest.take(pa.array(rows)), changes), made_from=made_from)
        num_made += 1
    return num_made, _kept_digest(workspace, list(places.parts))


def _without_second_look(manifest: pa.Table) -> pa.Table:
    """Return rows without sketches and local features: 5 kB a picture that no later stage reads."""
    for name in ("sketch", "local_features"):
        if name in manifest.column_names:
            empty = pa.repeat(pa.scalar(b"", pa.binary()), len(manifest))
            manifest = manifest.set_column(manifest.column_names.index(name), name, empty)
    return manifest


def _remove_stale(workspace: Workspace, parts: list[Path]) -> None:
    """Remove kept parts that the manifest no longer has: later stages read whatever lies there."""
    names = {part.name for part in parts}
    tables = [(workspace.dedupe / name, {part_name(0)}) for name in TABLES]
    for folder, allowed in [(workspace.kept, names), *tables]:
        for part in list_parts(folder):
            if part.name not in allowed:
                logger.warning("%s: no such part in the manifest any more, removed", part)
                part.unlink()

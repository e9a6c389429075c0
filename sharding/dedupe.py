"""dedupe: of files that show the same picture one stays, and the tables say why.

Reads the manifest, writes `dedupe/groups`, `dedupe/drops` and, for each part of the manifest, the part of the same name
in `dedupe/kept`. Which hashes are near is found by `neighbours`; which picture stays is decided by `keepers`; what the
keeper inherits by `inherit`. This file reads, writes and knows when all is current.

    python -m sharding dedupe configs/datasets/X.toml --workspace W
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.config import DatasetConfig
from sharding.files import digest_of, remove_temporaries
from sharding.images import LOSSLESS_FORMATS
from sharding.inherit import Inheritance, collect_inheritances, with_inheritances
from sharding.keepers import RULES, Candidates, Decision, decide
from sharding.keys import is_in, key_array
from sharding.runlog import EventLog
from sharding.schema import DROPS, GROUPS, MANIFEST, PLAN, Workspace, drop_row
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

DEDUPE_VERSION = 1
"""Raised when the code would decide otherwise on the same manifest."""

_COLUMNS = ("key", "sha256", "source", "path", "num_bytes", "format", "width", "height", "created_at", "phash")
_NO_DATE = np.iinfo(np.int64).max


class DuplicateKeyError(ValueError):
    """Two different SHA-256 begin with the same 16 hex digits, so they would be one sample."""


@dataclass(frozen=True)
class DedupeReport:
    """What dedupe decided."""

    num_files: int
    """Kept by scan."""
    num_kept: int
    num_identical: int
    """Dropped: byte for byte the same as a kept file."""
    num_near: int
    """Dropped: near-duplicates of a kept picture."""
    num_planned_over_better: int
    """Of these, better copies of a picture that is in the plan already and stays."""
    num_groups: int
    num_degenerate: int
    """Pictures whose hash says nothing (flat), never compared."""
    parts_made: int
    """Parts of `kept` that were written; in a dry run: all, unless everything is current."""
    is_current: bool
    """Nothing had changed; nothing was decided anew."""
    is_dry_run: bool

    def summary(self) -> str:
        """Return the sum, the drops by reason and what was written."""
        num_dropped = self.num_identical + self.num_near
        lines = [
            f"{self.num_files:,} files: {self.num_kept:,} kept, {num_dropped:,} dropped in {self.num_groups:,} groups"
        ]
        reasons = {
            "identical_bytes": self.num_identical,
            "near_duplicate": self.num_near - self.num_planned_over_better,
            "better_copy_of_planned": self.num_planned_over_better,
        }
        lines += [f"  {count:,} {reason}" for reason, count in reasons.items() if count]
        if self.num_degenerate:
            lines.append(f"{self.num_degenerate:,} pictures are nearly flat and were not compared")
        if self.is_current:
            lines.append("everything is current")
        elif self.is_dry_run:
            lines.append("nothing was written (--dry-run)")
        else:
            lines.append(f"{self.parts_made:,} parts of dedupe/kept written, the others are current")
        return "\n".join(lines)


def dedupe(config: DatasetConfig, workspace: Workspace, *, dry_run: bool = False) -> DedupeReport:
    """Decide which pictures stay, across all sources, and write it down.

    Groups are connected by pairs within config.dedupe.radius; a member farther than max_diameter from its keeper forms
    a group of its own with others left over. Planned keys (workspace.plan) always stay.

    Raises FileNotFoundError without a manifest, ValueError when a part of it is missing or was made with another hash,
    DuplicateKeyError.
    """
    parts = _manifest_parts(workspace)
    planned = _planned_keys(workspace)
    made_from = _made_from(config, parts)
    if report := _current_report(workspace, parts, made_from, planned, dry_run=dry_run):
        return report
    table, part_of_row, row_in_part = _read_candidates(config, parts)
    candidates = _candidates(config, table, planned)
    decision = decide(
        candidates,
        radius=config.dedupe.radius,
        max_diameter=config.dedupe.max_diameter,
        order=config.dedupe.keeper,
    )
    report = _report(candidates, decision, parts_made=len(parts), dry_run=dry_run)
    if dry_run:
        return report
    for folder in (workspace.kept, workspace.dedupe / "groups", workspace.dedupe / "drops"):
        remove_temporaries(folder)
    inheritances: dict[int, Inheritance] = {}
    if config.dedupe.merge_tags:
        inheritances = collect_inheritances(parts, part_of_row, row_in_part, decision.keeper)
    parts_made, kept_digest = _write_kept(workspace, parts, part_of_row, row_in_part, decision, inheritances)
    drops = _drops_table(table, candidates, decision)
    groups = _groups_table(table, decision)
    write_part(workspace.dedupe / "drops" / part_name(0), drops, made_from=made_from)
    counts = {name: str(value) for name, value in vars(report).items() if name.startswith("num_")}
    # The groups come last: their digest says that everything else is in place.
    write_part(
        workspace.dedupe / "groups" / part_name(0),
        groups,
        made_from=made_from,
        metadata={"kept_digest": kept_digest, "planned_elsewhere": _planned_elsewhere(workspace, planned), **counts},
    )
    _remove_stale(workspace, parts)
    EventLog(workspace.events, stage="dedupe").write("done", **{name: int(value) for name, value in counts.items()})
    return DedupeReport(**{**vars(report), "parts_made": parts_made})


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


def _planned_keys(workspace: Workspace) -> Any:
    """Return the keys of the plan, sorted, as `key_array` does."""
    return np.unique(key_array(read_parts(workspace.plan, ["key"], schema=PLAN).column("key")))


def _made_from(config: DatasetConfig, parts: list[Path]) -> str:
    return digest_of(
        {
            "version": DEDUPE_VERSION,
            "parts": [[part.name, part_metadata(part).get("made_from")] for part in parts],
            "dedupe": config.dedupe.model_dump(mode="json"),
            "priorities": {name: source.priority for name, source in config.sources.items()},
        }
    )


def _planned_elsewhere(workspace: Workspace, planned: Any) -> str:
    """Return a digest of the planned keys that are not kept.

    Those that are kept change nothing when they are asked first: who was kept stays kept.
    """
    kept = key_array(read_parts(workspace.kept, ["key"], schema=MANIFEST).column("key"))
    return hashlib.sha256(planned[~is_in(planned, kept)].tobytes()).hexdigest()


def _kept_digest(workspace: Workspace, parts: list[Path]) -> str:
    """Return a digest of which kept parts there are and what each was made from; a part that changed is noticed."""
    folder = workspace.kept
    return digest_of([[part.name, part_metadata(folder / part.name).get("made_from")] for part in parts])


def _current_report(
    workspace: Workspace, parts: list[Path], made_from: str, planned: Any, *, dry_run: bool
) -> DedupeReport | None:  # fmt: skip
    """Return the report on disk if what it was made from, and all that was written with it, is still the same."""
    groups = workspace.dedupe / "groups" / part_name(0)
    if not is_current(groups, made_from) or not is_current(workspace.dedupe / "drops" / part_name(0), made_from):
        return None
    names = [part.name for part in parts]
    if [part.name for part in list_parts(workspace.kept)] != names:
        return None
    facts = part_metadata(groups)
    try:
        if facts.get("kept_digest") != _kept_digest(workspace, parts):
            return None
    except DamagedPartError:
        return None
    if facts.get("planned_elsewhere") != _planned_elsewhere(workspace, planned):
        return None
    counts = {name: int(value) for name, value in facts.items() if name.startswith("num_")}
    return DedupeReport(**counts, parts_made=0, is_current=True, is_dry_run=dry_run)


def _read_candidates(config: DatasetConfig, parts: list[Path]) -> tuple[pa.Table, Any, Any]:
    """Return the kept rows of all parts, and for each its part's number and its row there."""
    tables, part_numbers, rows = [], [], []
    hash_bytes = config.dedupe.hash_size**2 // 8
    for number, part in enumerate(parts):
        table = read_part(part, [*_COLUMNS, "status"])
        is_kept = pc.equal(table.column("status"), "kept").to_numpy()
        table = table.filter(pa.array(is_kept)).drop_columns(["status"])
        lengths = pc.unique(pc.binary_length(table.column("phash"))).to_pylist()
        if wrong := [length for length in lengths if length != hash_bytes]:
            raise ValueError(
                f"{part}: hashes of {8 * wrong[0]} bits, dedupe.hash_size = {config.dedupe.hash_size} means "
                f"{8 * hash_bytes}; run `python -m sharding scan` again"
            )
        tables.append(table)
        part_numbers.append(np.full(len(table), number, dtype=np.int32))
        rows.append(np.nonzero(is_kept)[0].astype(np.int32))
    return pa.concat_tables(tables).combine_chunks(), np.concatenate(part_numbers), np.concatenate(rows)


def _candidates(config: DatasetConfig, table: pa.Table, planned: Any) -> Candidates:
    keys = table.column("key")
    priorities = {name: source.priority for name, source in config.sources.items()}
    sources = table.column("source").combine_chunks().dictionary_encode()
    by_code = np.array([priorities.get(name, 0) for name in sources.dictionary.to_pylist()], dtype=np.int64)
    dates = pc.fill_null(table.column("created_at").cast(pa.int64()), int(_NO_DATE)).to_numpy()
    order = ("key", "sha256")
    unequal = table.select(order).group_by("key").aggregate([("sha256", "count_distinct")])
    clash = unequal.filter(pc.greater(unequal.column("sha256_count_distinct"), 1))
    if len(clash):
        key = clash.column("key")[0].as_py()
        paths = table.filter(pc.equal(keys, key)).select(["source", "path"]).to_pylist()
        where = ", ".join(f"{row['source']}/{row['path']}" for row in paths[:4])
        raise DuplicateKeyError(f"key {key}: different files have it: {where}; remove or re-encode all but one")
    return Candidates(
        key=_hex_numbers(keys),
        phash=_hash_words(table.column("phash"), config.dedupe.hash_size),
        is_planned=is_in(key_array(keys), planned),
        priority=by_code[sources.indices.to_numpy()] if len(table) else np.empty(0, np.int64),
        pixels=table.column("width").to_numpy().astype(np.int64) * table.column("height").to_numpy(),
        lossless=pc.is_in(table.column("format"), value_set=pa.array(LOSSLESS_FORMATS)).to_numpy(),
        bytes=table.column("num_bytes").to_numpy(),
        date=dates,
    )


def _hex_numbers(keys: pa.ChunkedArray) -> Any:
    """Keys as numbers, which sort as their text does."""
    return np.frombuffer(bytes.fromhex("".join(keys.to_pylist())), dtype=">u8").astype(np.uint64)


def _hash_words(hashes: pa.ChunkedArray, hash_size: int) -> Any:
    words = np.frombuffer(b"".join(hashes.to_pylist()), dtype=">u8").astype(np.uint64)
    return words.reshape(-1, hash_size**2 // 64)


# --- what is written ---


def _report(candidates: Candidates, decision: Decision, *, parts_made: int, dry_run: bool) -> DedupeReport:
    dropped = decision.keeper != np.arange(len(decision.keeper))
    identical = dropped & (candidates.key == candidates.key[decision.keeper])
    near = dropped & ~identical
    return DedupeReport(
        num_files=len(dropped),
        num_kept=int((~dropped).sum()),
        num_identical=int(identical.sum()),
        num_near=int(near.sum()),
        num_planned_over_better=int((near & (decision.rule == RULES.index("planned"))).sum()),
        num_groups=len(np.unique(decision.keeper[dropped])),
        num_degenerate=decision.num_degenerate,
        parts_made=parts_made,
        is_current=False,
        is_dry_run=dry_run,
    )


def _write_kept(
    workspace: Workspace,
    parts: list[Path],
    part_of_row: Any,
    row_in_part: Any,
    decision: Decision,
    inheritances: Mapping[int, Inheritance],
) -> tuple[int, str]:
    is_kept = decision.keeper == np.arange(len(decision.keeper))
    starts = np.searchsorted(part_of_row, np.arange(len(parts) + 1))
    num_made = 0
    for number, part in enumerate(parts):
        candidates = np.arange(starts[number], starts[number + 1])
        kept = candidates[is_kept[candidates]]
        rows = row_in_part[kept]
        changes = {place: inheritances[row] for place, row in enumerate(kept.tolist()) if row in inheritances}
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
        manifest = read_part(part)
        if difference := schema_mismatch(manifest, MANIFEST):
            raise ValueError(f"{part}: {difference}; run `python -m sharding scan` again")
        write_part(target, with_inheritances(manifest.take(rows), changes), made_from=made_from)
        num_made += 1
    return num_made, _kept_digest(workspace, parts)


def _drops_table(table: pa.Table, candidates: Candidates, decision: Decision) -> pa.Table:
    dropped = np.nonzero(decision.keeper != np.arange(len(decision.keeper)))[0]
    keepers = decision.keeper[dropped]
    described = table.select(["key", "source", "path", "width", "height", "format", "num_bytes"])
    rows, kept = described.take(dropped).to_pylist(), described.take(keepers).to_pylist()
    return pa.Table.from_pylist(
        [
            drop_row(
                row,
                stage="dedupe",
                reason=_reason(RULES[rule], row["key"] == keeper["key"]),
                kept_key=keeper["key"],
                distance=int(distance),
                detail=f"{RULES[rule]}: {_describe(row)}; kept {keeper['source']}/{keeper['path']} {_describe(keeper)}",
            )
            for row, keeper, rule, distance in zip(
                rows, kept, decision.rule[dropped], decision.distance[dropped], strict=True
            )
        ],
        schema=DROPS,
    )


def _reason(rule: str, is_identical: bool) -> str:
    if is_identical:
        return "identical_bytes"
    return "better_copy_of_planned" if rule == "planned" else "near_duplicate"


def _describe(row: Mapping[str, Any]) -> str:
    return f"{row['width']}x{row['height']} {row['format']} {row['num_bytes']:,} bytes"


def _groups_table(table: pa.Table, decision: Decision) -> pa.Table:
    """One row per member, keepers first; groups are numbered in the order of their keepers in the manifest."""
    own = np.arange(len(decision.keeper))
    dropped = own[decision.keeper != own]
    keepers = np.unique(decision.keeper[dropped])
    members = np.concatenate([keepers, dropped])
    numbers = np.searchsorted(keepers, decision.keeper[members])
    order = np.lexsort((members, decision.keeper[members] != members, numbers))
    members, numbers = members[order], numbers[order]
    return pa.table(
        [
            pa.array(numbers, pa.int64()),
            table.column("key").take(members).combine_chunks().cast(pa.string()),
            pa.array(decision.keeper[members] == members),
            pa.array(decision.distance[members], pa.int32()),
            pa.array([RULES[rule] for rule in decision.rule[members]], pa.string()),
        ],
        schema=GROUPS,
    )


def _remove_stale(workspace: Workspace, parts: list[Path]) -> None:
    """Remove kept parts that the manifest no longer has: later stages read whatever lies there."""
    names = {part.name for part in parts}
    for folder, allowed in ((workspace.kept, names), (workspace.dedupe / "groups", {part_name(0)})):
        for part in list_parts(folder):
            if part.name not in allowed:
                logger.warning("%s: no such part in the manifest any more, removed", part)
                part.unlink()

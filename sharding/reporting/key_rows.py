"""Look up the rows of every table of a workspace about a key: what `show` prints.

Reads tables and indexes by column, so a workspace of millions answers in seconds. Judges nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.chunk import Chunk, list_chunks
from sharding.reporting.chunk_list import sealing_runs
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import GROUPS, MANIFEST, PAIRS, RATINGS, Workspace
from sharding.tables import list_parts, read_part

MAX_NEIGHBOURS = 20
"""Members of a group, and pairs, that are told of one key."""
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class TableRow:
    """A row about the key. table: folder of the table, relative to the workspace."""

    table: str
    values: dict[str, Any]


def table_rows(questions: Questions, workspace: Workspace, prefix: str) -> list[TableRow]:
    """Return the rows of all tables about the keys that begin with `prefix`, in the order of the line."""

    def rows(folder: Path, parts: Sequence[Path] | None = None) -> list[TableRow]:
        return _rows(questions, workspace, folder, list_parts(folder) if parts is None else parts, prefix)

    found = rows(workspace.manifest) + rows(workspace.decisions)
    for row in rows(workspace.dedupe / "groups"):
        others = _group_members(questions, workspace, row.values["group"], row.values["key"])
        found.append(TableRow(row.table, row.values | {"others": others}))
    found += _neighbours(questions, workspace, sorted({row.values["key"] for row in found}))
    found += rows(workspace.dedupe / "drops") + rows(workspace.kept)
    for model in _folders(workspace.root / "annotations"):
        found += [_with_tag_names(row, model) for row in rows(model)]
    for policy in _folders(workspace.root / "captions"):
        found += rows(policy)
    found += rows(workspace.plan) + rows(workspace.plan / "drops")
    found += rows(workspace.pack_drops, sorted(workspace.pack_drops.glob("*.parquet")))
    return found + _chunk_rows(questions, workspace, prefix)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir())


def _rows(
    questions: Questions, workspace: Workspace, folder: Path, parts: Sequence[Path], prefix: str
) -> list[TableRow]:
    if not parts:
        return []
    found = questions.ask(f"select * from {rows_of(parts, MANIFEST)} where starts_with(key, {quoted(prefix)})")
    table = folder.relative_to(workspace.root).as_posix()
    return [TableRow(table, {name: plain_value(name, value) for name, value in row.items()}) for row in found]


def _group_members(questions: Questions, workspace: Workspace, group: int, key: str) -> list[str]:
    """Return the other members of a duplicate group, nearest to the keeper first, in words."""
    groups = rows_of(list_parts(workspace.dedupe / "groups"), GROUPS)
    rows = questions.ask(
        f'select key, is_keeper, distance from {groups} where "group" = {group} and key <> {quoted(key)} '
        f"order by is_keeper desc, distance, key limit {MAX_NEIGHBOURS}"
    )
    return [f"{row['key']} ({'keeper' if row['is_keeper'] else _bits(row['distance'])})" for row in rows]


def _neighbours(questions: Questions, workspace: Workspace, keys: Sequence[str]) -> list[TableRow]:
    """Return for each key the pairs that the search found, nearest first: near, and yet perhaps not in one group."""
    if not (parts := list_parts(workspace.dedupe / "pairs")):
        return []
    found = []
    for key in filter(_is_key, keys):
        number = int(key, 16)
        rows = questions.ask(
            f'select * from {rows_of(parts, PAIRS)} where "left" = {number} or "right" = {number} '
            f'order by distance, "left", "right" limit {MAX_NEIGHBOURS}'
        )
        near = [f"{row['left'] + row['right'] - number:016x} ({row['kind']}, {_bits(row['distance'])})" for row in rows]
        found += [TableRow("dedupe/pairs", {"key": key, "near": near})] if near else []
    return found


def _is_key(text: str) -> bool:
    return bool(text) and set(text) <= _HEX


def _bits(distance: int | None) -> str:
    return "part of it" if distance is None else f"{distance} bits"


def _chunk_rows(questions: Questions, workspace: Workspace, prefix: str) -> list[TableRow]:
    chunks: dict[str, Chunk] = {
        str(chunk.index_path): chunk
        for chunk in list_chunks(workspace.chunks, with_held_out=True)
        if chunk.index_path.is_file()
    }
    if not chunks:
        return []
    indexes = rows_of([Path(path) for path in chunks], MANIFEST, extra="filename = true")
    rows = questions.ask(f"select * from {indexes} where starts_with(key, {quoted(prefix)}) order by filename")
    found = []
    for row in rows:
        chunk = chunks[row.pop("filename")]
        facts = {
            "key": row["key"],
            "chunk": chunk.name,
            "is_held_out": chunk.info.is_held_out or None,
            "policy": chunk.info.policy,
            "trained_by": list(sealing_runs(chunk.folder)),
        }
        values = {name: plain_value(name, value) for name, value in row.items()}
        if not values.get("mask_bytes"):
            values = {name: value for name, value in values.items() if not name.startswith("mask_")}
        found.append(TableRow("chunks", facts | values))
    return found


def plain_value(name: str, value: Any) -> Any:
    """Return a value as people read it: bytes in hex, groups and ratings by name."""
    if isinstance(value, bytes):
        return value.hex()
    if name == "groups" and value:
        return {entry["group"]: entry["tags"] for entry in value}
    if name == "rating_probs" and value and len(value) == len(RATINGS):
        return dict(zip(RATINGS, value, strict=True))
    return value


def _with_tag_names(row: TableRow, model: Path) -> TableRow:
    """Replace a tagger's row numbers by `{tag: probability}` when its label table lies beside the parts."""
    labels = model / "labels.parquet"
    if row.values.get("tag_ids") is None or not labels.exists():
        return row
    table = read_part(labels, ["tag_id", "name"])
    names = dict(zip(table["tag_id"].to_pylist(), table["name"].to_pylist(), strict=True))
    pairs = sorted(zip(row.values["tag_probs"], row.values["tag_ids"], strict=True), reverse=True)
    tags = {names.get(tag, str(tag)): probability for probability, tag in pairs}
    values = {name: value for name, value in row.values.items() if name not in ("tag_ids", "tag_probs")}
    return TableRow(row.table, values | {"tags": tags})

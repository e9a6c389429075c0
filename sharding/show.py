"""Tell everything that a workspace knows about a key: `python -m sharding show KEY DATASET.toml`.

Looks into every table, so that a dropped picture is explained, too. Writes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sharding.chunk import list_chunks
from sharding.schema import Workspace
from sharding.tables import list_parts, query, read_part

MAX_KEYS = 20
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class TableRow:
    """A row about the key. table: folder of the table, relative to the workspace."""

    table: str
    values: dict[str, Any]


@dataclass(frozen=True)
class KeyFacts:
    """All rows about one key, in the order of the line."""

    key: str
    rows: tuple[TableRow, ...]

    @property
    def fate(self) -> str:
        """What became of it, in one sentence."""
        chunks = [row.values["chunk"] for row in self.rows if row.table == "chunks"]
        if chunks:
            return f"packed in {', '.join(chunks)}"
        drops = [row.values for row in self.rows if "reason" in row.values]
        if drops:
            return "; ".join(_drop_text(drop) for drop in drops)
        statuses = [row.values["status"] for row in self.rows if row.table == "manifest"]
        if any(status != "kept" for status in statuses):
            return f"dropped by scan: {', '.join(sorted({s for s in statuses if s != 'kept'}))}"
        return "planned, not packed yet" if any(row.table == "plan" for row in self.rows) else "kept, not planned yet"


def show(workspace: Workspace, prefix: str) -> list[KeyFacts]:
    """Return what is known about every key that starts with `prefix`.

    Raises ValueError when no key does, when more than MAX_KEYS do, and when `prefix` cannot begin a key.
    """
    prefix = prefix.lower()
    if not prefix or not set(prefix) <= _HEX:
        raise ValueError(f"{prefix!r} is not the beginning of a key, which has 16 of the digits 0-9 a-f")
    rows = [(row.values["key"], row) for row in _table_rows(workspace, prefix)]
    keys = sorted({key for key, _ in rows})
    if not keys:
        raise ValueError(f"no key starts with {prefix!r} in {workspace.root}; has it been scanned?")
    if len(keys) > MAX_KEYS:
        raise ValueError(
            f"{len(keys):,} keys start with {prefix!r}, for example {', '.join(keys[:3])}; give more of it"
        )
    return [KeyFacts(key, tuple(row for of_key, row in rows if of_key == key)) for key in keys]


def render_keys(found: list[KeyFacts]) -> str:
    """Return the facts as text: one block per key, one line per value; empty values are left out."""
    lines: list[str] = []
    for facts in found:
        lines += [f"{facts.key}  {facts.fate}"]
        for row in facts.rows:
            lines.append(f"  {row.table}")
            values = {name: value for name, value in row.values.items() if name != "key"}
            lines += [
                f"    {name}: {_text(value)}" for name, value in values.items() if value not in (None, "", [], {})
            ]
    return "\n".join(lines)


def _drop_text(drop: dict[str, Any]) -> str:
    of = f" of {drop['kept_key']}" if drop["kept_key"] else ""
    distance = f" at distance {drop['distance']}" if drop["distance"] is not None else ""
    return f"dropped by {drop['stage']}: {drop['reason']}{of}{distance} ({drop['source']}/{drop['path']})"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, tuple):
        return " = ".join(_text(item) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(item)}" for name, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table_rows(workspace: Workspace, prefix: str) -> list[TableRow]:
    rows: list[TableRow] = []
    for folder in (workspace.manifest, workspace.dedupe / "groups", workspace.dedupe / "drops", workspace.kept):
        rows += _rows(workspace, folder, list_parts(folder), prefix)
    for model in sorted(path for path in (workspace.root / "annotations").glob("*") if path.is_dir()):
        rows += [_with_tag_names(row, model) for row in _rows(workspace, model, list_parts(model), prefix)]
    for policy in sorted(path for path in (workspace.root / "captions").glob("*") if path.is_dir()):
        rows += _rows(workspace, policy, list_parts(policy), prefix)
    for folder in (workspace.plan, workspace.plan / "drops"):
        rows += _rows(workspace, folder, list_parts(folder), prefix)
    rows += _rows(workspace, workspace.pack_drops, sorted(workspace.pack_drops.glob("*.parquet")), prefix)
    for chunk in list_chunks(workspace.chunks):
        if chunk.index_path.exists():
            found = _rows(workspace, workspace.chunks, [chunk.index_path], prefix)
            rows += [TableRow("chunks", {"key": row.values["key"], "chunk": chunk.name, **row.values}) for row in found]
    return rows


def _rows(workspace: Workspace, folder: Path, parts: list[Path], prefix: str) -> list[TableRow]:
    if not parts:
        return []
    names = ", ".join("'" + str(part).replace("'", "''") + "'" for part in parts)
    files = f"read_parquet([{names}], hive_partitioning = false)"
    found: pa.Table = query(f"select * from {files} where starts_with(key, '{prefix}')")
    table = folder.relative_to(workspace.root).as_posix()
    return [TableRow(table, {name: _plain(value) for name, value in row.items()}) for row in found.to_pylist()]


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _with_tag_names(row: TableRow, model: Path) -> TableRow:
    """Replace a tagger's row numbers by `{tag: probability}` when its label table lies beside the parts."""
    labels = model / "labels.parquet"
    if "tag_ids" not in row.values or not labels.exists():
        return row
    table = read_part(labels, ["tag_id", "name"])
    names = dict(zip(table["tag_id"].to_pylist(), table["name"].to_pylist(), strict=True))
    pairs = sorted(zip(row.values["tag_probs"], row.values["tag_ids"], strict=True), reverse=True)
    tags = {names.get(tag, str(tag)): probability for probability, tag in pairs}
    values = {name: value for name, value in row.values.items() if name not in ("tag_ids", "tag_probs")}
    return TableRow(row.table, values | {"tags": tags})

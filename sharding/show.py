"""Tell everything that a workspace knows about a picture: `python -m sharding show KEY|PATH DATASET.toml`.

Looks into every table, so that a dropped picture is explained, too: its record, what people decided, its duplicate
group, what models said, its captions, its place in the plan and in chunks, the runs that trained it. Writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharding.config import DatasetConfig
from sharding.reporting.find_file import FoundFile, find_file
from sharding.reporting.key_rows import TableRow, plain_value, table_rows
from sharding.reporting.questions import Questions, quoted, rows_of
from sharding.schema import MANIFEST, Workspace
from sharding.tables import list_parts

MAX_KEYS = 20
_KEY_LENGTH = 16
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class KeyFacts:
    """All rows about one key, in the order of the line. key "": a file that could not be read or is not scanned."""

    key: str
    rows: tuple[TableRow, ...]

    @property
    def fate(self) -> str:
        """What became of it, in one sentence, and what people decided."""
        decided = [
            f"decided: {row.values['decision']}" + (f" by {row.values['who']}" if row.values["who"] else "")
            for row in self.rows
            if row.table == "decisions"
        ]
        return "; ".join([self._outcome(), *decided])

    def _outcome(self) -> str:
        chunks = [row.values["chunk"] for row in self.rows if row.table == "chunks"]
        if chunks:
            return f"packed in {', '.join(chunks)}"
        drops = [row.values for row in self.rows if "reason" in row.values]
        if drops:
            return "; ".join(_drop_text(drop) for drop in drops)
        statuses = [row.values["status"] for row in self.rows if row.table == "manifest"]
        if any(status != "kept" for status in statuses):
            return f"dropped by scan: {', '.join(sorted({s for s in statuses if s != 'kept'}))}"
        if any(row.table == "plan" for row in self.rows):
            return "planned, not packed yet"
        return "kept, not planned yet" if statuses else "listed, not scanned yet"


def show(config: DatasetConfig, workspace: Workspace, text: str) -> list[KeyFacts]:
    """Return what is known about every key that begins with `text`, or about the file of that path.

    Raises ValueError, naming the nearest, when there is none, and when more than MAX_KEYS keys begin so.
    """
    if not text:
        raise ValueError("give a key, its first digits, or the path of a file of a source")
    with Questions() as questions:
        if len(text) <= _KEY_LENGTH and set(text.lower()) <= _HEX:
            return _show_keys(questions, workspace, text.lower())
        files = find_file(questions, config, workspace, text)
        keys = dict.fromkeys(file.key for file in files if file.key)
        facts = [found for key in keys for found in _show_keys(questions, workspace, key)]
        return facts + [_show_keyless(file) for file in files if not file.key]


def _show_keyless(file: FoundFile) -> KeyFacts:
    row = file.record if file.record is not None else {"source": file.source, "path": file.path}
    table = "manifest" if file.record is not None else "listing"
    return KeyFacts("", (TableRow(table, {name: plain_value(name, value) for name, value in row.items()}),))


def _show_keys(questions: Questions, workspace: Workspace, prefix: str) -> list[KeyFacts]:
    manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
    known = questions.ask_one(
        f"select count(distinct key) as number, min(key, 3) as some from {manifest} "
        f"where starts_with(key, {quoted(prefix)})"
    )
    if known["number"] > MAX_KEYS:
        raise ValueError(
            f"{known['number']:,} keys start with {prefix!r}, for example {', '.join(known['some'])}; give more of it"
        )
    rows = table_rows(questions, workspace, prefix)
    keys = sorted({row.values["key"] for row in rows})
    if not keys:
        raise ValueError(_no_key(questions, workspace, prefix))
    return [KeyFacts(key, tuple(row for row in rows if row.values["key"] == key)) for key in keys]


def _no_key(questions: Questions, workspace: Workspace, prefix: str) -> str:
    manifest = rows_of(list_parts(workspace.manifest), MANIFEST)
    row = questions.ask_one(
        f"select max(key) filter (key < {quoted(prefix)} and key <> '') as before, "
        f"min(key) filter (key > {quoted(prefix)}) as after from {manifest}"
    )
    nearest = " and ".join(key for key in (row["before"], row["after"]) if key)
    hint = f"the nearest are {nearest}" if nearest else "nothing has been scanned yet"
    return f"no key starts with {prefix!r} in {workspace.root}; {hint}"


# --- as text ---


def render_keys(found: Sequence[KeyFacts]) -> str:
    """Return the facts as text: one block per key, one line per value.

    Empty values are left out, and in dedupe/kept those of the manifest: what is left was inherited from duplicates.
    """
    lines: list[str] = []
    for facts in found:
        lines += [f"{facts.key or '(no key)'}  {facts.fate}"]
        record: Mapping[str, Any] = {}
        for row in facts.rows:
            lines.append(f"  {row.table}")
            values = {name: value for name, value in row.values.items() if value not in (None, "", [], {})}
            if row.table == "manifest":
                record = record or values
            elif row.table == "dedupe/kept":
                values = {name: value for name, value in values.items() if record.get(name) != value}
            lines += [f"    {name}: {_text(value)}" for name, value in values.items() if name != "key"]
    return "\n".join(lines)


def _drop_text(drop: Mapping[str, Any]) -> str:
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

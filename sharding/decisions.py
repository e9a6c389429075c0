"""What people have decided about pictures: the table `decisions`, which overrides filters and dedupe.

    keep               no filter drops it, and dedupe does not drop it as a near-duplicate
    drop               dedupe drops it
    not_a_duplicate    dedupe neither drops it for another picture that is like it, nor the other way round
    preferred_keeper   among duplicates it stays, unless another one is planned already

One decision per key; a later one replaces it, and `forget` takes it back. Decisions hold for a key, so they outlive
scans and moves. Acts on nothing: `scan` and `dedupe` read them.

    python -m sharding decisions import configs/datasets/X.toml decisions.csv --workspace W
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharding.files import locked, remove_temporaries, write_bytes
from sharding.keys import is_in, key_numbers
from sharding.schema import DECISION_KINDS, DECISIONS, MANIFEST, Workspace
from sharding.tables import part_name, read_parts, write_part

COLUMNS = ("key", "decision", "who", "why")
FORGET = "forget"
"""In place of a decision: there shall be none about this key."""
_HEX = frozenset("0123456789abcdef")
_SHOWN = 20


class DecisionError(ValueError):
    """A decision cannot be read; the message lists every mistake with its line."""


@dataclass(frozen=True)
class Decisions:
    """The table, one row per key."""

    table: pa.Table

    def keys(self, decision: str) -> npt.NDArray[np.uint64]:
        """Return the keys with this decision as sorted numbers."""
        chosen = self.table.filter(pc.equal(self.table.column("decision"), decision))
        numbers: npt.NDArray[np.uint64] = np.sort(key_numbers(chosen.column("key")))
        return numbers

    def digest(self) -> str:
        """Return a digest of all decisions, with who and why, which stand in drops."""
        return _digest(self.table)

    def of(self, keys: pa.Array | pa.ChunkedArray) -> pa.Table:
        """Return the rows about these keys."""
        return self.table.filter(pc.is_in(self.table.column("key"), value_set=pc.unique(keys)))


@dataclass(frozen=True)
class DecisionReport:
    """What was added to the table."""

    num_rows: int
    num_changed: int
    """Of these, not in the table as they are now."""
    num_total: int
    counts: Mapping[str, int]
    """By decision, of the whole table."""
    unknown_keys: tuple[str, ...]
    """Keys that no file of the manifest has; their decisions are kept."""
    is_dry_run: bool = False

    def summary(self) -> str:
        """Return what changed, the table's counts, and what is unknown."""
        lines = [f"{self.num_rows:,} decisions, {self.num_changed:,} new or changed; {self.num_total:,} in the table"]
        lines += [f"  {count:,} {decision}" for decision, count in self.counts.items() if count]
        if self.unknown_keys:
            shown = ", ".join(self.unknown_keys[:3])
            lines.append(f"warning: {len(self.unknown_keys):,} keys stand in no manifest, first {shown}")
        if self.is_dry_run:
            lines.append("nothing was written (--dry-run)")
        elif self.num_changed:
            lines.append("run `python -m sharding scan` and `dedupe` to apply them")
        return "\n".join(lines)


def read_decisions(workspace: Workspace) -> Decisions:
    """Return the table; without one there are no decisions."""
    return Decisions(read_parts(workspace.decisions, schema=DECISIONS).combine_chunks())


def parse_decisions(text: str, *, name: str) -> pa.Table:
    """Read CSV with the columns key, decision, who, why into rows of DECISIONS.

    The first line names the columns, in any order; who and why may be absent. A decision may be `forget`.
    Raises DecisionError with all mistakes and their lines; `name` stands for the file.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff")))
    head = [cell.strip() for cell in next(reader, [])]
    if not {"key", "decision"} <= set(head) or not set(head) <= set(COLUMNS) or len(set(head)) < len(head):
        raise DecisionError(f"{name}:1: the first line must be {','.join(COLUMNS)}, got {','.join(head)!r}")
    rows: list[dict[str, str]] = []
    mistakes = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        values = dict.fromkeys(COLUMNS, "") | dict(zip(head, (cell.strip() for cell in cells), strict=False))
        mistake = f"{len(head)} columns expected, got {len(cells)}" if len(cells) != len(head) else _mistake(values)
        if mistake:
            mistakes.append(f"{name}:{reader.line_num}: {mistake}")
        rows.append(values)
    if mistakes:
        more = [f"and {len(mistakes) - _SHOWN:,} more"] if len(mistakes) > _SHOWN else []
        raise DecisionError("\n".join([*mistakes[:_SHOWN], *more]))
    return pa.Table.from_pylist(rows, schema=DECISIONS)


def _mistake(values: Mapping[str, str]) -> str:
    if len(values["key"]) != 16 or not set(values["key"]) <= _HEX:
        return f"key {values['key']!r}: must be 16 of the digits 0-9 a-f"
    if values["decision"] not in (*DECISION_KINDS, FORGET):
        return f"decision {values['decision']!r}: must be one of {', '.join(DECISION_KINDS)} or {FORGET}"
    return ""


def make_decisions(keys: pa.Array | pa.ChunkedArray, *, decision: str, who: str, why: str) -> pa.Table:
    """Return rows of DECISIONS that say the same of many keys. Raises ValueError for a wrong key or decision."""
    if decision not in (*DECISION_KINDS, FORGET):
        raise DecisionError(f"decision {decision!r}: must be one of {', '.join(DECISION_KINDS)} or {FORGET}")
    key_numbers(pa.chunked_array([keys]) if isinstance(keys, pa.Array) else keys)  # refuses what is no key
    return pa.table([keys, *(pa.repeat(text, len(keys)) for text in (decision, who, why))], schema=DECISIONS)


def add_decisions(workspace: Workspace, added: pa.Table, *, dry_run: bool = False) -> DecisionReport:
    """Add rows (of `parse_decisions` or `make_decisions`) to the table, whole or not at all.

    A later row replaces an earlier one about its key.
    """
    with locked(workspace.decisions, dry_run=dry_run):
        return _add(workspace, added, dry_run=dry_run)


def _add(workspace: Workspace, added: pa.Table, *, dry_run: bool) -> DecisionReport:
    before = read_decisions(workspace).table
    both = pa.concat_tables([before, added]).combine_chunks()
    texts = pc.binary_join_element_wise(*(both.column(name) for name in COLUMNS[1:]), "\0")
    keys = key_numbers(both.column("key"))
    order = np.argsort(keys, kind="stable")
    is_last = np.append(keys[order[1:]] != keys[order[:-1]], len(order) > 0)[: len(order)]
    last = order[is_last]
    # The first row of a key is the table's, if it has one; what differs from it is a change.
    first = order[np.insert(is_last[:-1], 0, True)[: len(order)]]
    is_new = first >= len(before)
    after = both.take(pa.array(last))
    is_forgotten = pc.equal(after.column("decision"), FORGET).to_numpy()
    differs = pc.not_equal(texts.take(pa.array(last)), texts.take(pa.array(first))).to_numpy()
    after = after.filter(pa.array(~is_forgotten)).combine_chunks()
    counts = dict(zip(*(part.to_pylist() for part in pc.value_counts(after["decision"]).flatten()), strict=True))
    report = DecisionReport(
        num_rows=int((last >= len(before)).sum()),
        num_changed=int(np.where(is_new, ~is_forgotten, differs).sum()),
        num_total=len(after),
        counts={kind: counts.get(kind, 0) for kind in DECISION_KINDS},
        unknown_keys=_unknown(workspace, pc.unique(added.column("key"))),
        is_dry_run=dry_run,
    )
    if not dry_run and not after.equals(before):
        remove_temporaries(workspace.decisions)
        write_part(workspace.decisions / part_name(0), after, made_from=_digest(after))
    return report


def _unknown(workspace: Workspace, keys: pa.Array) -> tuple[str, ...]:
    manifest = read_parts(workspace.manifest, ["key"], schema=MANIFEST).column("key")
    manifest = manifest.filter(pc.not_equal(manifest, ""))  # what could not be read has none
    known = is_in(key_numbers(pa.chunked_array([keys])), key_numbers(manifest))
    return tuple(sorted(keys.filter(pa.array(~known)).to_pylist()))


def _digest(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=64_000):
        digest.update(json.dumps(batch.to_pydict(), sort_keys=True).encode())
    return digest.hexdigest()


def export_decisions(workspace: Workspace, target: Path) -> int:
    """Write the table as CSV, by key, and return the number of rows. What is exported imports unchanged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    rows = read_decisions(workspace).table.to_pylist()
    writer.writerows([row[column] for column in COLUMNS] for row in rows)
    write_bytes(target, text.getvalue().encode())
    return len(rows)

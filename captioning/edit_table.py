"""What people have changed in captions: a table laid over what a policy gives. Models' raw output is never touched.

One part per edit in edits/<policy>/; for each caption and group of words that it changed, the words before and after.
`compose` applies them last. When the policy has come to give other words, an edit still holds: what it removed stays
away, what it added stays, and words that are new stand behind.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sharding.files import digest_of, remove_temporaries
from sharding.schema import CAPTIONS, EDITS, Workspace
from sharding.tables import list_parts, part_name, read_part, read_parts, write_part

SEPARATOR = ", "


class EditError(ValueError):
    """An edit cannot be made: its arguments are wrong, or nothing is there to be edited."""


@dataclass(frozen=True)
class Change:
    """One group of words of one caption, before and after an edit."""

    key: str
    group: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class EditFacts:
    """One edit, as `captioning edit list` shows it."""

    number: int
    operation: str
    who: str
    when: datetime
    why: str
    num_captions: int


def read_edits(workspace: Workspace, policy: str) -> pa.Table:
    """Return all edits of a policy, the oldest first."""
    return read_parts(workspace.edits(policy), schema=EDITS)


def edits_of(edits: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
    """Return the edits of some captions."""
    return edits.filter(pc.is_in(edits.column("key"), value_set=keys.combine_chunks())) if len(edits) else edits


def edits_digest(edits: pa.Table) -> str:
    """Return a digest of what edits do, "" for none. It does not depend on who, when, why, nor on their numbers."""
    return digest_of(edits.select(["key", "group", "before", "after"]).to_pylist()) if len(edits) else ""


def apply_edits(captions: pa.Table, edits: pa.Table, *, groups: Sequence[str]) -> pa.Table:
    """Return the captions (schema CAPTIONS) with the edits (schema EDITS, in order) applied.

    groups: the policy's order. A word that stands twice after an edit stands at its first place only.
    """
    keys = captions.column("key")
    own = edits_of(edits, keys)
    if not len(own):
        return captions
    changes: dict[str, list[Change]] = {}
    for row in own.select(["key", "group", "before", "after"]).to_pylist():
        change = Change(row["key"], row["group"], tuple(row["before"]), tuple(row["after"]))
        changes.setdefault(change.key, []).append(change)
    is_edited = np.asarray(pc.is_in(keys, value_set=pa.array(list(changes))))
    rows = []
    for row in captions.filter(pa.array(is_edited)).to_pylist():
        words = {entry["group"]: tuple(entry["tags"]) for entry in row["groups"]}
        for change in changes[row["key"]]:
            words[change.group] = merge(words.get(change.group, ()), change.before, change.after)
        order = [*(name for name in groups if name in words), *(name for name in words if name not in groups)]
        rows.append(_caption(row["key"], [(name, words[name]) for name in order]))
    edited = pa.Table.from_pylist(rows, schema=CAPTIONS)
    places = np.arange(len(captions))
    places[is_edited] = len(captions) + np.arange(len(edited))
    return pa.concat_tables([captions.cast(CAPTIONS), edited]).take(pa.array(places))


def merge(current: tuple[str, ...], before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
    """Return a group's words with the change from `before` to `after` made to them.

    In a group of one word, such as a tier, the edit wins over a word that the policy has given since.
    """
    if current == before or len(current) == len(before) == len(after) == 1:
        return after
    kept = [word for word in after if word in current or word not in before]
    return (*kept, *(word for word in current if word not in before and word not in kept))


def _caption(key: str, groups: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, object]:
    seen: dict[str, None] = {}
    entries = []
    for name, words in groups:
        fresh = [word for word in dict.fromkeys(words) if word not in seen]
        seen |= dict.fromkeys(fresh)
        if fresh:
            entries.append({"group": name, "tags": fresh})
    return {"key": key, "text": SEPARATOR.join(seen), "groups": entries}


# --- writing ---


def write_edit(
    workspace: Workspace,
    changes: Sequence[Change],
    *,
    policy: str,
    operation: str,
    who: str,
    when: datetime,
    why: str,
) -> int:
    """Add an edit, whole or not at all, and return its number: one more than the last one's.

    The caller holds the lock of edits/<policy>, from when it read the captions.
    """
    folder = workspace.edits(policy)
    remove_temporaries(folder)
    number = max((edit_number(part) for part in list_parts(folder)), default=0) + 1
    own = {"edit": number, "operation": operation, "who": who, "when": when, "why": why}
    columns = {
        "key": [change.key for change in changes],
        "group": [change.group for change in changes],
        "before": [list(change.before) for change in changes],
        "after": [list(change.after) for change in changes],
    }
    table = pa.table(
        [
            pa.array(columns[field.name], field.type)
            if field.name in columns
            else pa.repeat(pa.scalar(own[field.name], field.type), len(changes))
            for field in EDITS
        ],
        schema=EDITS,
    )
    write_part(folder / part_name(number), table, made_from=edits_digest(table))
    return number


def edit_number(part: Path) -> int:
    """Return the number in a part's name."""
    return int(re.sub(r"\D", "", part.stem))


def list_edits(workspace: Workspace, policy: str) -> list[EditFacts]:
    """Return what was done, the oldest first."""
    facts = []
    for part in list_parts(workspace.edits(policy)):
        table = read_part(part, ["key", "operation", "who", "when", "why"])
        own = table.slice(0, 1).to_pylist()[0]
        num_captions = pc.count_distinct(table.column("key")).as_py()
        facts.append(
            EditFacts(edit_number(part), own["operation"], own["who"], own["when"], own["why"], int(num_captions))
        )
    return facts


def undo_edit(workspace: Workspace, number: int | None, *, policy: str, dry_run: bool) -> EditFacts:
    """Take an edit back, the last one without a number; later edits hold. Raises EditError when there is none."""
    facts = {edit.number: edit for edit in list_edits(workspace, policy)}
    if not facts:
        raise EditError(f"policy {policy!r}: there is no edit to undo")
    chosen = max(facts) if number is None else number
    if chosen not in facts:
        raise EditError(f"edit {chosen}: unknown; there are {', '.join(map(str, facts))} (`edit DATASET.toml list`)")
    if not dry_run:
        (workspace.edits(policy) / part_name(chosen)).unlink()
    return facts[chosen]

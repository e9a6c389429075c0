"""Edit many captions at once: preview as a diff, write as an overlay, undo. For sets of up to a million captions.

Captions are read as `compose` made them, which must be current; what is written is `edit_table`'s, nothing else. What
an edit does is in `edit_operations`, where it does it in `edit_filter`.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from captioning.config import CaptioningConfig
from captioning.edit_filter import CaptionRow, EditFilter, Words, parse_filter
from captioning.edit_operations import Operation
from captioning.edit_table import Change, EditError, EditFacts, list_edits, undo_edit, write_edit
from captioning.policy import PolicyConfig
from captioning.taggers.base import TaggerSettings
from captioning.text_table import text_table
from sharding.config import ConfigError
from sharding.schema import Workspace
from sharding.tables import list_parts, read_part

MAX_CAPTIONS = 1_000_000
_RED, _GREEN, _BOLD, _PLAIN = "\033[31m", "\033[32m", "\033[1m", "\033[0m"


@dataclass(frozen=True)
class EditedCaption:
    """A caption before and after."""

    key: str
    source: str
    before: Words
    after: Words

    def diff(self, *, is_coloured: bool) -> str:
        """Return a unified diff with one word a line, behind its group."""
        before, after = ([f"{group}: {word}" for group, word in words] for words in (self.before, self.after))
        _, _, *lines = difflib.unified_diff(before, after, n=1, lineterm="")
        head = f"{self.key} ({self.source})"
        if not is_coloured:
            return "\n".join([f"--- {head}", f"+++ {head}", *lines])
        colours = {"-": _RED, "+": _GREEN, "@": _BOLD}
        coloured = [f"{colours[line[0]]}{line}{_PLAIN}" if line[0] in colours else line for line in lines]
        return "\n".join([f"{_RED}--- {head}{_PLAIN}", f"{_GREEN}+++ {head}{_PLAIN}", *coloured])


@dataclass(frozen=True)
class EditReport:
    """What an edit changed, or would change."""

    policy: str
    operation: str
    number: int | None
    """Of the edit; None when nothing was written."""
    num_captions: int
    num_matching: int
    num_changed: int
    shown: tuple[EditedCaption, ...]
    is_dry_run: bool
    is_coloured: bool = False

    def summary(self) -> str:
        """Return the diffs and the counts."""
        blocks = [it.diff(is_coloured=self.is_coloured) for it in self.shown]
        if self.num_changed > len(self.shown):
            blocks.append(f"… and {self.num_changed - len(self.shown):,} more captions")
        counts = f"{self.num_captions:,} captions, {self.num_matching:,} match, {self.num_changed:,} "
        if self.is_dry_run:
            tail = "would change; nothing was written, --yes writes" if self.num_changed else "would change"
        else:
            tail = f"changed by edit {self.number}" if self.number is not None else "changed; nothing was written"
        return "\n".join([*blocks, f"{self.policy}: {counts}{tail}"])


@dataclass(frozen=True)
class EditListReport:
    """The edits of a policy, the oldest first."""

    policy: str
    edits: tuple[EditFacts, ...]

    def summary(self) -> str:
        """Return a table."""
        lines = [
            (str(it.number), f"{it.when:%Y-%m-%d %H:%M}", it.who, f"{it.num_captions:,}", it.operation, it.why)
            for it in self.edits
        ]
        head = ("edit", "when, UTC", "who", "captions", "operation", "why")
        return text_table(head, lines, numbers=(0, 3)) if lines else f"{self.policy}: no edits"


@dataclass(frozen=True)
class UndoReport:
    """Which edit was taken back, or would be."""

    edit: EditFacts
    is_dry_run: bool

    def summary(self) -> str:
        """Return one sentence."""
        tail = "would be undone; nothing was written, --yes writes" if self.is_dry_run else "undone"
        return f"edit {self.edit.number} ({self.edit.operation}; {self.edit.num_captions:,} captions): {tail}"


def edit_captions(
    config: CaptioningConfig,
    workspace: Workspace,
    operation: Operation,
    *,
    policy: str,
    description: str,
    where: str = "",
    who: str = "",
    why: str = "",
    dry_run: bool = True,
    num_shown: int = 20,
    is_coloured: bool = False,
) -> EditReport:
    """Apply an operation to the captions that a filter chooses; write the overlay and compose anew unless dry_run.

    Raises EditError when nothing matches, when captions are not current or too many; FileNotFoundError before
    `compose`.
    """
    rules = known_policy(config, policy)
    filter_ = parse_filter(where, groups=rules.groups, scorers=scorers_of(config))
    caption_parts(workspace, policy)
    _require_current(config, workspace, policy)
    num_captions = num_matching = num_changed = 0
    shown: list[EditedCaption] = []
    changes: list[Change] = []
    for part in list_parts(workspace.kept):
        for row in _rows(config, workspace, workspace.captions(policy) / part.name, filter_):
            num_captions += 1
            if not filter_.matches(row):
                continue
            num_matching += 1
            after = _in_order(operation(row.words), rules.groups)
            if after == row.words:
                continue
            num_changed += 1
            if num_changed > MAX_CAPTIONS:
                raise EditError(
                    f"more than {MAX_CAPTIONS:,} captions would change: edits are for small sets; put it into the "
                    f"policy's tables (policies.{policy}), or narrow --where"
                )
            changes += changed_groups(row.key, row.words, after)
            if len(shown) < num_shown:
                shown.append(EditedCaption(row.key, row.source, row.words, after))
    if not num_matching:
        raise EditError(f"--where {where!r}: matches none of {num_captions:,} captions")
    number = None
    if changes and not dry_run:
        when = datetime.now(UTC)
        number = write_edit(workspace, changes, policy=policy, operation=description, who=who, when=when, why=why)
        _compose(config, workspace, policy)
    return EditReport(
        policy, description, number, num_captions, num_matching, num_changed, tuple(shown), dry_run, is_coloured
    )


def undo(
    config: CaptioningConfig, workspace: Workspace, number: int | None, *, policy: str, dry_run: bool = True
) -> UndoReport:
    """Take an edit back, the last one without a number, and compose anew. Raises EditError for an unknown one."""
    known_policy(config, policy)
    facts = undo_edit(workspace, number, policy=policy, dry_run=dry_run)
    if not dry_run:
        _compose(config, workspace, policy)
    return UndoReport(facts, dry_run)


def edit_list(config: CaptioningConfig, workspace: Workspace, *, policy: str) -> EditListReport:
    """Return all edits of a policy."""
    known_policy(config, policy)
    return EditListReport(policy, tuple(list_edits(workspace, policy)))


def changed_groups(key: str, before: Words, after: Words) -> list[Change]:
    """Return the change of each group that an edit changed."""
    changes = []
    for group in dict.fromkeys(name for name, _ in (*before, *after)):
        old, new = (tuple(word for name, word in words if name == group) for words in (before, after))
        if old != new:
            changes.append(Change(key, group, old, new))
    return changes


def _in_order(words: Words, groups: Sequence[str]) -> Words:
    """Return the words by group in the policy's order, so that a preview shows what `compose` will make of it."""
    place = {name: number for number, name in enumerate(groups)}
    return tuple(sorted(words, key=lambda pair: place.get(pair[0], len(place))))


# --- what goes in ---


def scorers_of(config: CaptioningConfig) -> list[str]:
    """Return the names of all models that give scores."""
    return [name for name, model in config.annotate.models.items() if not isinstance(model, TaggerSettings)]


def caption_parts(workspace: Workspace, policy: str) -> list[Path]:
    """Return the parts of a policy's captions. Raises FileNotFoundError before `compose` has run."""
    parts = list_parts(workspace.captions(policy))
    if not parts:
        raise FileNotFoundError(
            f"{workspace.captions(policy)}: no parts; run `python -m captioning compose --policy {policy}` first"
        )
    return parts


def known_policy(config: CaptioningConfig, policy: str) -> PolicyConfig:
    """Return a policy's settings. Raises ConfigError for an unknown one."""
    if policy not in config.policies:
        raise ConfigError(f"policy {policy!r}: unknown; the dataset has {', '.join(config.policies) or 'none'}")
    return config.policies[policy]


def _rows(config: CaptioningConfig, workspace: Workspace, part: Path, filter_: EditFilter) -> Iterator[CaptionRow]:
    captions = read_part(part)
    keys = captions.column("key")
    records = _aligned(workspace.kept / part.name, ["key", "source", "created_at"], keys)
    years = pc.fill_null(pc.year(records.column("created_at")), 0).to_pylist()
    sources = records.column("source").to_pylist()
    scores = {}
    for name in sorted(filter_.scorers):
        table = _aligned(workspace.annotations(name) / part.name, ["key", "score"], keys)
        scores[name] = table.column("score").to_pylist()
    for place, row in enumerate(captions.to_pylist()):
        source = sources[place]
        dataset = config.file_under(source, years[place] or None)[0] if source in config.sources else ""
        yield CaptionRow(
            key=row["key"],
            words=tuple((entry["group"], word) for entry in row["groups"] for word in entry["tags"]),
            text=row["text"],
            source=source or "",
            dataset=dataset,
            scores={name: values[place] for name, values in scores.items()},
        )


def _aligned(path: Path, columns: list[str], keys: pa.ChunkedArray) -> pa.Table:
    """Return rows of a part in the order of `keys`, null where it has none."""
    table = read_part(path, columns)
    return table if table.column("key").equals(keys) else table.take(pc.index_in(keys, value_set=table.column("key")))


def _require_current(config: CaptioningConfig, workspace: Workspace, policy: str) -> None:
    from captioning.compose import compose

    stale = compose(config, workspace, policy=policy, dry_run=True).num_parts_written
    if stale:
        raise EditError(
            f"{workspace.captions(policy)}: {stale:,} parts are missing or not current; run "
            f"`python -m captioning compose --policy {policy}` first"
        )


def _compose(config: CaptioningConfig, workspace: Workspace, policy: str) -> None:
    from captioning.compose import compose

    compose(config, workspace, policy=policy)

"""Edit many captions at once: preview as a diff, write as an overlay, undo. For sets of up to a million captions.

Captions are read as `compose` made them, which must be current; what is written is `edit_table`'s, nothing else. What
an edit does is in `edit_operations`, where it does it in `edit_filter`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from captioning.compose import compose
from captioning.composed import caption_parts, caption_rows, known_policy, not_current, scorers_of
from captioning.config import CaptioningConfig
from captioning.edit_filter import CaptionRow, EditFilter, Words, parse_filter
from captioning.edit_operations import Operation
from captioning.edit_table import Change, EditError, EditFacts, list_edits, undo_edit, write_edit
from captioning.text_table import text_table
from captioning.time_limit import TookTooLongError, limited
from sharding.files import locked
from sharding.schema import Workspace
from sharding.tables import list_parts

MAX_CAPTIONS = 1_000_000
SECONDS_PER_CAPTION = 5.0
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

    Of two edits at once one waits for the other. Raises EditError when nothing matches, when captions are not current
    or too many, when one takes longer than SECONDS_PER_CAPTION; FileNotFoundError before `compose`.
    """
    rules = known_policy(config, policy)
    filter_ = parse_filter(where, groups=rules.groups, scorers=scorers_of(config))
    caption_parts(workspace, policy)
    number = None
    with locked(workspace.edits(policy), dry_run=dry_run):
        if missing := not_current(config, workspace, policy=policy):
            raise EditError(missing)
        found = _find_changes(config, workspace, operation, filter_, policy=policy, num_shown=num_shown)
        if found.changes and not dry_run:
            when = datetime.now(UTC)
            number = write_edit(
                workspace, found.changes, policy=policy, operation=description, who=who, when=when, why=why
            )
            compose(config, workspace, policy=policy)
    counts = (found.num_captions, found.num_matching, found.num_changed)
    return EditReport(policy, description, number, *counts, tuple(found.shown), dry_run, is_coloured)


@dataclass
class _Found:
    """What an edit would change."""

    num_captions: int = 0
    num_matching: int = 0
    num_changed: int = 0
    shown: list[EditedCaption] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


def _find_changes(
    config: CaptioningConfig,
    workspace: Workspace,
    operation: Operation,
    filter_: EditFilter,
    *,
    policy: str,
    num_shown: int,
) -> _Found:
    found, groups = _Found(), config.policies[policy].groups
    for part in list_parts(workspace.kept):
        for row in caption_rows(config, workspace, workspace.captions(policy) / part.name, filter_.scorers):
            found.num_captions += 1
            after = _edited(row, operation, filter_)
            if after is None:
                continue
            found.num_matching += 1
            after = _in_order(after, groups)
            if after == row.words:
                continue
            found.num_changed += 1
            if found.num_changed > MAX_CAPTIONS:
                raise EditError(
                    f"more than {MAX_CAPTIONS:,} captions would change: edits are for small sets; put it into the "
                    f"policy's tables (policies.{policy}), or narrow --where"
                )
            found.changes += changed_groups(row.key, row.words, after)
            if len(found.shown) < num_shown:
                found.shown.append(EditedCaption(row.key, row.source, row.words, after))
    if not found.num_matching:
        raise EditError(f"--where {filter_.text!r}: matches none of {found.num_captions:,} captions")
    return found


def _edited(row: CaptionRow, operation: Operation, filter_: EditFilter) -> Words | None:
    """Return the words after the operation, None where the filter does not hold."""
    try:
        return limited(lambda: operation(row.words) if filter_.matches(row) else None, seconds=SECONDS_PER_CAPTION)
    except TookTooLongError as error:
        raise EditError(
            f"caption {row.key}: {error}; a regular expression with a repetition inside a repetition, such as (a+)+, "
            "tries every way to match: write it without"
        ) from None


def undo(
    config: CaptioningConfig, workspace: Workspace, number: int | None, *, policy: str, dry_run: bool = True
) -> UndoReport:
    """Take an edit back, the last one without a number, and compose anew. Raises EditError for an unknown one."""
    known_policy(config, policy)
    with locked(workspace.edits(policy), dry_run=dry_run or not list_edits(workspace, policy)):
        facts = undo_edit(workspace, number, policy=policy, dry_run=dry_run)
        if not dry_run:
            compose(config, workspace, policy=policy)
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

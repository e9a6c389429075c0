"""Raw annotations and records → captions, by a policy. No model, no torch, no image is opened.

For every part of workspace.kept the part of the same name in captions/<policy>/. A missing score gives no word and is
counted; it never becomes the worst tier. Order, thresholds and words all come from the policy; `composer` applies it.
Last come the changes that people have made (`edit_table`), and the limit of tokens once more for those captions.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow.compute as pc

from captioning.composer import Composer, PartCaptions
from captioning.config import CaptioningConfig
from captioning.edit_table import edits_digest, edits_of, read_edits
from captioning.part_input import AnnotationMissingError, check_revisions, input_digest, policy_digest
from sharding.files import digest_of
from sharding.runlog import EventLog, Progress
from sharding.schema import Workspace
from sharding.tables import is_current, list_parts, owned_parts, read_part, write_part

__all__ = ["AnnotationMissingError", "ComposeReport", "compose"]

logger = logging.getLogger(__name__)

_NUM_CUT_WORDS = 5


@dataclass(frozen=True)
class ComposeReport:
    """What one call of `compose` did."""

    policy: str
    num_parts: int
    num_parts_current: int
    num_parts_written: int
    num_captions: int
    """In the parts written by this call (or that a dry run would write)."""
    num_empty: int
    missing: Mapping[str, int]
    """By group: pictures that got no word because there was no score, rating, date or field."""
    num_cut: int
    """Captions shortened to `tokens.max_tokens`."""
    cut: Mapping[tuple[str, str], int]
    """What was cut off: (group, word) → times."""
    num_cut_edited: int
    """Captions shortened to it because of edits."""
    num_many_tags: int
    """Captions with more words than `warn_above_tags`."""
    num_fallback: int
    """Captions without any word, which have those of `fallback`."""
    is_dry_run: bool
    seconds: float

    def summary(self) -> str:
        """Return a few lines for people."""
        verb = "to write" if self.is_dry_run else "written"
        lines = [
            f"compose {self.policy}: {self.num_parts} parts, {self.num_parts_current} already current, "
            f"{self.num_parts_written} {verb}, {self.num_captions:,} captions in {self.seconds:.1f} s"
        ]
        lines += [f"  without a word for {group}: {number:,}" for group, number in sorted(self.missing.items())]
        if self.num_empty:
            lines.append(f"  empty captions: {self.num_empty:,}")
        if self.num_fallback:
            lines.append(f"  captions without any word, given the fallback: {self.num_fallback:,}")
        if self.num_many_tags:
            lines.append(f"  captions with more words than warn_above_tags: {self.num_many_tags:,}")
        if self.num_cut:
            lines.append(f"  captions cut to tokens.max_tokens: {self.num_cut:,}")
        if self.num_cut_edited:
            lines.append(f"  edited captions cut to tokens.max_tokens: {self.num_cut_edited:,}")
        for group in dict.fromkeys(group for group, _ in self.cut):
            words = Counter({word: number for (of_group, word), number in self.cut.items() if of_group == group})
            most = ", ".join(f"{word} ({number:,})" for word, number in words.most_common(_NUM_CUT_WORDS))
            lines.append(
                f"    of {group} {words.total():,} words: {most}{', …' if len(words) > _NUM_CUT_WORDS else ''}"
            )
        return "\n".join(lines)


@dataclass
class _Counts:
    """What the parts that were written sum up to; the fields are the report's."""

    num_parts_written: int = 0
    num_captions: int = 0
    num_empty: int = 0
    num_fallback: int = 0
    num_cut: int = 0
    num_cut_edited: int = 0
    num_many_tags: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    cut: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, found: PartCaptions) -> None:
        self.num_captions += found.captions.num_rows
        self.num_empty += int(pc.sum(pc.equal(found.captions.column("text"), "")).as_py() or 0)
        self.num_fallback += found.num_fallback
        self.num_cut += found.num_cut
        self.num_cut_edited += found.num_cut_edited
        self.num_many_tags += found.num_many_tags
        self.missing.update(found.missing)
        self.cut.update(found.cut)


def compose(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    policy: str,
    part_index: int = 0,
    num_parts: int = 1,
    dry_run: bool = False,
) -> ComposeReport:
    """Write the captions of each owned part that is not current.

    Raises ConfigError for an unknown policy, FileNotFoundError without kept parts, AnnotationMissingError when
    `annotate` has to run first, or has been stopped before all parts were those of one revision.
    """
    composer = Composer(config, workspace, policy=policy)
    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    owned = owned_parts(kept, part_index, num_parts)
    check_revisions(workspace, owned, composer.rules)
    digest = policy_digest(config, composer.rules)
    all_edits = read_edits(workspace, policy)
    started = time.monotonic()
    counts = _Counts()
    with Progress(len(owned), unit="parts", title=f"compose {policy}") as progress:
        for part in owned:
            edits = edits_of(all_edits, read_part(part, ["key"]).column("key")) if len(all_edits) else all_edits
            edited = [edits_digest(edits)] if len(edits) else []
            made_from = digest_of([digest, *input_digest(workspace, part, composer.rules), *edited])
            target = workspace.captions(policy) / part.name
            if not is_current(target, made_from):
                counts.num_parts_written += 1
                if dry_run:
                    counts.num_captions += read_part(part, ["key"]).num_rows
                else:
                    found = composer.part(part, edits=edits)
                    metadata = {"policy": policy, "policy_digest": digest}
                    write_part(target, found.captions, made_from=made_from, metadata=metadata)
                    _tell(workspace, found, part=f"{policy}/{part.name}")
                    counts.add(found)
            progress.advance()
    return ComposeReport(
        policy=policy,
        num_parts=len(owned),
        num_parts_current=len(owned) - counts.num_parts_written,
        is_dry_run=dry_run,
        seconds=time.monotonic() - started,
        **vars(counts),
    )


def _tell(workspace: Workspace, found: PartCaptions, *, part: str) -> None:
    facts = {"captions": found.captions.num_rows, "missing": found.missing, "cut": found.num_cut}
    EventLog(workspace.events, stage="compose").write("part_written", part=part, **facts)
    if found.num_cut_edited:
        logger.warning(
            "%s: %s edited captions were longer than tokens.max_tokens and were cut", part, f"{found.num_cut_edited:,}"
        )

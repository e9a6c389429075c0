"""What another policy changes: words by group that captions gain and lose, and examples. Nothing is written.

Both policies are applied to the same parts in memory, so the second need not have been composed before. People's edits
belong to one policy; each side has its own, as `compose` would write it.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.composer import Composer
from captioning.config import CaptioningConfig
from captioning.edit_table import read_edits
from captioning.words import Ids
from sharding.runlog import Progress
from sharding.schema import Workspace
from sharding.tables import list_parts, owned_parts

_NUM_LINES = 20


@dataclass(frozen=True)
class Change:
    """A word of a group, and the captions that have it in one policy only."""

    group: str
    word: str
    num_gained: int
    """Captions that have it in B, not in A."""
    num_lost: int
    """Captions that have it in A, not in B."""


@dataclass(frozen=True)
class Example:
    """One caption that differs."""

    key: str
    before: str
    after: str


@dataclass(frozen=True)
class DiffReport:
    """The difference between the policies A (before) and B (after)."""

    before: str
    after: str
    num_captions: int
    num_different: int
    """Captions with another text."""
    num_reordered: int
    """Of those, captions with the same words in the same groups, in another order."""
    changes: list[Change]
    """The most frequent first."""
    examples: list[Example]
    seconds: float

    def summary(self) -> str:
        """Return a table of changes by group and word, and the examples."""
        lines = [
            f"{self.before} → {self.after}: {self.num_different:,} of {self.num_captions:,} captions differ, "
            f"{self.num_reordered:,} of them only in order, in {self.seconds:.1f} s"
        ]
        by_group = Counter[str]()
        for change in self.changes:
            by_group[change.group] += change.num_gained + change.num_lost
        for group, _ in by_group.most_common():
            found = [change for change in self.changes if change.group == group]
            gained, lost = sum(it.num_gained for it in found), sum(it.num_lost for it in found)
            lines.append(f"{group}: +{gained:,} −{lost:,} of {len(found):,} words")
            lines += [f"  {it.word}: +{it.num_gained:,} −{it.num_lost:,}" for it in found[:_NUM_LINES]]
            lines += [f"  … {len(found) - _NUM_LINES:,} more"] if len(found) > _NUM_LINES else []
        for example in self.examples:
            lines += [f"{example.key}", f"  − {example.before}", f"  + {example.after}"]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return everything as one JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False)


def diff_policies(
    config: CaptioningConfig,
    workspace: Workspace,
    *,
    before: str,
    after: str,
    num_examples: int = 5,
    part_index: int = 0,
    num_parts: int = 1,
) -> DiffReport:
    """Compose the owned parts by both policies, each with people's edits of it, and compare. Raises as `compose`."""
    composers = Composer(config, workspace, policy=before), Composer(config, workspace, policy=after)
    kept = list_parts(workspace.kept)
    if not kept:
        raise FileNotFoundError(f"{workspace.kept}: no parts; run `python -m sharding dedupe` first")
    edits = [read_edits(workspace, policy) for policy in (before, after)]
    started = time.monotonic()
    gained, lost = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    num_captions = num_different = num_reordered = 0
    examples: list[Example] = []
    owned = owned_parts(kept, part_index, num_parts)
    with Progress(len(owned), unit="parts", title=f"diff {before} {after}") as progress:
        for part in owned:
            old, new = (composer.part(part, edits=own).captions for composer, own in zip(composers, edits, strict=True))
            differs = np.asarray(pc.not_equal(old.column("text"), new.column("text")))
            has_other_words = _compare(old, new, gained, lost)
            num_captions += len(differs)
            num_different += int(differs.sum())
            num_reordered += int((differs & ~has_other_words).sum())
            for row in np.flatnonzero(differs)[: num_examples - len(examples)].tolist():
                texts = (table.column("text")[row].as_py() for table in (old, new))
                examples.append(Example(old.column("key")[row].as_py(), *texts))
            progress.advance()
    changes = [Change(group, word, gained[group, word], lost[group, word]) for group, word in {**gained, **lost}]
    changes.sort(key=lambda it: (-(it.num_gained + it.num_lost), it.group, it.word))
    return DiffReport(
        before=before,
        after=after,
        num_captions=num_captions,
        num_different=num_different,
        num_reordered=num_reordered,
        changes=changes,
        examples=examples,
        seconds=time.monotonic() - started,
    )


def _compare(
    old: pa.Table, new: pa.Table, gained: Counter[tuple[str, str]], lost: Counter[tuple[str, str]]
) -> npt.NDArray[np.bool_]:
    """Count words that stand on one side only; return (N,) which rows have any."""
    has_other_words = np.zeros(old.num_rows, dtype=bool)
    (old_rows, old_words), (new_rows, new_words) = (_grouped_words(table) for table in (old, new))
    words = pa.concat_arrays([old_words, new_words]).dictionary_encode()
    numbers: Ids = np.asarray(words.indices, dtype=np.int64)
    number = max(len(words.dictionary), 1)
    old_keys = old_rows * number + numbers[: len(old_rows)]
    new_keys = new_rows * number + numbers[len(old_rows) :]
    for keys, others, counter in ((new_keys, old_keys, gained), (old_keys, new_keys, lost)):
        only = keys[~np.asarray(pc.is_in(pa.array(keys), value_set=pa.array(others)))]
        has_other_words[only // number] = True
        found, counts = np.unique(only % number, return_counts=True)
        texts = words.dictionary.take(pa.array(found)).to_pylist()
        for text, count in zip(texts, counts.tolist(), strict=True):
            group, _, word = text.partition("\n")
            counter[group, word] += count
    return has_other_words


def _grouped_words(captions: pa.Table) -> tuple[Ids, pa.Array]:
    """Return for each word its row, and the word with its group in front."""
    lists = captions.column("groups").combine_chunks()
    entries = pc.list_flatten(lists)
    tags = pc.struct_field(entries, "tags")
    entry_of = pc.list_parent_indices(tags)
    rows = np.asarray(pc.list_parent_indices(lists).take(entry_of), dtype=np.int64)
    groups = pc.struct_field(entries, "group").take(entry_of)
    return rows, pc.binary_join_element_wise(groups, pc.list_flatten(tags), "\n")

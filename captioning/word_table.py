"""Words of many pictures at once: streams of (row, group, word), joined into captions.

Everything is a flat array; Python sees each *distinct* word once, never each picture's. What the words are is decided
in `compose`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.clip_tokens import TokenCounter
from captioning.words import Ids, Words
from sharding.schema import CAPTIONS, TAG_GROUP

FIRST_GROUP = "first"


@dataclass(frozen=True)
class Entries:
    """(N,) arrays in the order of the captions: row ascending, position of the group, number of the word."""

    rows: Ids
    groups: Ids
    ids: Ids

    def where(self, wanted: npt.NDArray[np.bool_]) -> "Entries":
        return Entries(self.rows[wanted], self.groups[wanted], self.ids[wanted])


class WordTable:
    """Collects words for the rows of one part. In a group they stand in their fixed order, or as they were added."""

    def __init__(self, num_rows: int, *, groups: Sequence[str], words: Words) -> None:
        self.num_rows = num_rows
        self.groups = tuple(groups)
        self._words = words
        self._added: list[Entries] = []

    def add(self, rows: Ids, words: Ids, *, groups: Ids) -> None:
        """Add one word each to `rows`, in the given groups (positions in `self.groups`). Skips NO_WORD and group < 0.

        All three are (N,) integers; `rows` ascending.
        """
        arrays = (np.asarray(values, dtype=np.int64) for values in (rows, groups, words))
        self._added.append(Entries(*arrays).where((words >= 0) & (groups >= 0)))

    def add_to_group(self, rows: Ids, words: Ids, *, group: str) -> None:
        """Add words to one group; nothing happens when the table does not have it."""
        if group in self.groups:
            self.add(rows, words, groups=np.full(len(rows), self.groups.index(group), dtype=np.int64))

    def entries(self) -> Entries:
        """Return the words in their order: by group, none twice in a row, the first place wins."""
        empty = np.empty(0, dtype=np.int64)
        rows, groups, ids = (
            np.concatenate([empty, *(getattr(it, name) for it in self._added)]) for name in ("rows", "groups", "ids")
        )
        if FIRST_GROUP in self.groups and len(ids):
            groups = np.where(self._words.is_first()[ids], self.groups.index(FIRST_GROUP), groups)
        places = rows * len(self.groups) + groups
        if self._words.num_ranks > 1 and len(ids):
            places = places * self._words.num_ranks + self._words.ranks()[ids]
        order = np.argsort(places, kind="stable")
        sorted_entries = Entries(rows[order], groups[order], ids[order])
        word_of_row = sorted_entries.rows * max(len(self._words), 1) + sorted_entries.ids
        _, first = np.unique(word_of_row, return_index=True)
        is_first = np.zeros(len(ids), dtype=bool)
        is_first[first] = True
        return sorted_entries.where(is_first)

    def captions(self, keys: pa.ChunkedArray, entries: Entries) -> pa.Table:
        """Return schema.CAPTIONS of entries in order."""
        rows, groups = entries.rows, entries.groups
        texts = self._words.texts().take(pa.array(entries.ids))
        row_offsets = np.searchsorted(rows, np.arange(self.num_rows + 1))
        text = pc.binary_join(pa.ListArray.from_arrays(pa.array(row_offsets, pa.int32()), texts), ", ")
        starts = np.flatnonzero(np.diff(rows * len(self.groups) + groups, prepend=-1))
        tags = pa.ListArray.from_arrays(pa.array(np.append(starts, len(rows)), pa.int32()), texts)
        names = pa.array(self.groups, pa.string()).take(pa.array(groups[starts]))
        lists = pa.StructArray.from_arrays([names, tags], fields=list(TAG_GROUP))
        list_offsets = np.searchsorted(rows[starts], np.arange(self.num_rows + 1))
        columns = [keys, text, pa.ListArray.from_arrays(pa.array(list_offsets, pa.int32()), lists)]
        return pa.Table.from_arrays(columns, schema=CAPTIONS)


def with_fallback(captions: pa.Table, words: Sequence[str], *, group: str) -> tuple[pa.Table, int]:
    """Return the captions (CAPTIONS) with `words` of a group where there is no text, and how many those are."""
    is_empty = np.asarray(pc.equal(captions.column("text"), ""))
    if not is_empty.any():
        return captions, 0
    row = {"key": "", "text": ", ".join(words), "groups": [{"group": group, "tags": list(words)}]}
    places = np.where(is_empty, len(captions), np.arange(len(captions)))
    filled = pa.concat_tables([captions, pa.Table.from_pylist([row], schema=CAPTIONS)]).take(pa.array(places))
    return filled.set_column(0, CAPTIONS.field("key"), captions.column("key")), int(is_empty.sum())


def fitting(entries: Entries, *, counter: TokenCounter, max_tokens: int, ranks: Ids) -> npt.NDArray[np.bool_]:
    """Return (N,) which words stay so that no caption is longer than max_tokens.

    ranks: (G,) by group, the highest is cut first; within a group the last word first. A word that does not fit takes
    all after it along, so that none of less weight stays.
    """
    with_comma, alone = counter.counts()
    order = np.argsort(entries.rows * (int(ranks.max(initial=0)) + 1) + ranks[entries.groups], kind="stable")
    rows, ids = entries.rows[order], entries.ids[order]
    lengths = np.cumsum(with_comma[ids])
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    before = np.append(0, lengths)[starts]
    row_of = np.cumsum(np.diff(rows, prepend=-1) > 0) - 1
    # The last word of what is kept so far has no comma behind it; rows ascend, so the largest place is of the same row.
    last = np.maximum.accumulate(order) if len(order) else order
    comma = (with_comma - alone)[entries.ids[last]]
    is_over = lengths - before[row_of] - comma > max_tokens
    num_over = np.cumsum(is_over)
    kept = np.empty(len(rows), dtype=bool)
    kept[order] = num_over - np.append(0, num_over)[starts][row_of] == 0
    return kept

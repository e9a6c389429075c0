"""Words of many pictures at once: streams of (row, group, word), joined into captions.

Everything is a flat array; Python sees each *distinct* word once, never each picture's. What the words are is decided
in `compose`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sharding.schema import CAPTIONS, TAG_GROUP

Ids = npt.NDArray[np.int64]
NO_WORD = -1


class WordTable:
    """Collects words for the rows of one part. Within a group, words stand in the order they were added."""

    def __init__(self, num_rows: int, *, groups: Sequence[str]) -> None:
        self.num_rows = num_rows
        self.groups = tuple(groups)
        self._words: dict[str, int] = {}
        self._rows: list[Ids] = []
        self._groups: list[Ids] = []
        self._ids: list[Ids] = []

    def word(self, text: str) -> int:
        """Return the number of a word; NO_WORD for an empty one."""
        return self._words.setdefault(text, len(self._words)) if text else NO_WORD

    def add(self, rows: Ids, words: Ids, *, groups: Ids) -> None:
        """Add one word each to `rows`, in the given groups (positions in `self.groups`). Skips NO_WORD and group < 0.

        All three are (N,) integers; `rows` ascending.
        """
        wanted = (words >= 0) & (groups >= 0)
        self._rows.append(np.asarray(rows, dtype=np.int64)[wanted])
        self._ids.append(np.asarray(words, dtype=np.int64)[wanted])
        self._groups.append(np.asarray(groups, dtype=np.int64)[wanted])

    def add_to_group(self, rows: Ids, words: Ids, *, group: str) -> None:
        """Add words to one group; nothing happens when the table does not have it."""
        if group in self.groups:
            self.add(rows, words, groups=np.full(len(rows), self.groups.index(group), dtype=np.int64))

    def captions(self, keys: pa.ChunkedArray) -> pa.Table:
        """Return schema.CAPTIONS: words by group, none twice in a row, the first place wins."""
        rows, groups, ids = self._sorted_without_repeats()
        texts = pa.array(list(self._words), pa.string()).take(pa.array(ids))
        row_offsets = np.searchsorted(rows, np.arange(self.num_rows + 1))
        text = pc.binary_join(pa.ListArray.from_arrays(pa.array(row_offsets, pa.int32()), texts), ", ")
        starts = np.flatnonzero(np.diff(rows * len(self.groups) + groups, prepend=-1))
        tags = pa.ListArray.from_arrays(pa.array(np.append(starts, len(rows)), pa.int32()), texts)
        names = pa.array(self.groups, pa.string()).take(pa.array(groups[starts]))
        entries = pa.StructArray.from_arrays([names, tags], fields=list(TAG_GROUP))
        entry_offsets = np.searchsorted(rows[starts], np.arange(self.num_rows + 1))
        columns = [keys, text, pa.ListArray.from_arrays(pa.array(entry_offsets, pa.int32()), entries)]
        return pa.Table.from_arrays(columns, schema=CAPTIONS)

    def _sorted_without_repeats(self) -> tuple[Ids, Ids, Ids]:
        empty = np.empty(0, dtype=np.int64)
        rows, groups, ids = (
            np.concatenate([empty, *parts]) for parts in (self._rows, self._groups, self._ids)
        )  # fmt: skip
        order = np.argsort(rows * len(self.groups) + groups, kind="stable")
        rows, groups, ids = rows[order], groups[order], ids[order]
        word_of_row = rows * max(len(self._words), 1) + ids
        _, first = np.unique(word_of_row, return_index=True)
        first.sort()
        return rows[first], groups[first], ids[first]

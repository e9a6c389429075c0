"""The words of a policy's captions, numbered once per process: parts share them, since the same words come in each.

`replace` is applied here, and the places of words that stand in a fixed order. Pictures are not known here.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids = npt.NDArray[np.int64]
NO_WORD = -1


class Column:
    """A column of integers that grows at its end and is read as an array."""

    def __init__(self) -> None:
        self._old = np.empty(0, dtype=np.int64)
        self._new: list[int] = []

    def append(self, value: int) -> None:
        self._new.append(value)

    def array(self) -> Ids:
        """Return (N,) int64; shared, not to be written to."""
        if self._new:
            self._old = np.concatenate([self._old, np.array(self._new, dtype=np.int64)])
            self._new = []
        return self._old

    def __len__(self) -> int:
        return len(self._old) + len(self._new)


class Words:
    """Distinct words by number.

    replace: word → word, "" for none. first: words of the group `first`, in order. orders: words that stand before
    others of their group, in this order.
    """

    def __init__(
        self, *, replace: Mapping[str, str] | None = None, first: Sequence[str] = (), orders: Sequence[str] = ()
    ) -> None:
        self._replace = dict(replace or {})
        self._numbers: dict[str, int] = {}
        self._new: list[str] = []
        self._texts = pa.array([], pa.string())
        self._firsts = {word: place for place, word in enumerate(first)}
        self._places = {word: place for place, word in enumerate(orders)} | self._firsts
        self._is_first, self._ranks = Column(), Column()
        self.num_ranks = len(self._places) + 1 if self._places else 1
        """Ranks are 0 … num_ranks - 1; words without a place of their own have the last."""

    def number(self, text: str) -> int:
        """Return the number of a word; NO_WORD for an empty one."""
        if self._replace:
            text = self._replace.get(text, text)
        if not text:
            return NO_WORD
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = len(self._numbers)
            self._new.append(text)
            self._is_first.append(text in self._firsts)
            self._ranks.append(self._places.get(text, self.num_ranks - 1))
        return number

    def __len__(self) -> int:
        return len(self._numbers)

    def texts(self) -> pa.Array:
        """Return all words, by number."""
        if self._new:
            self._texts = pa.concat_arrays([self._texts, pa.array(self._new, pa.string())])
            self._new = []
        return self._texts

    def is_first(self) -> npt.NDArray[np.bool_]:
        """Return for each word whether it stands in the group `first`."""
        return self._is_first.array().astype(bool)

    def ranks(self) -> Ids:
        """Return the rank of each word within its group."""
        return self._ranks.array()

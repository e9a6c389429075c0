"""Count the words of captions, those that stand together, and lengths. One part in memory at a time.

What grows with the data is one count per distinct word and per distinct pair, 16 bytes a pair.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioning.clip_tokens import TokenCounter, load_counter
from captioning.words import Words

Counts = npt.NDArray[np.int64]

_MANY_PAIRS = 1 << 20
LENGTHS_HEAD = ("length in", "least", "median", "mean", "95%", "most")


@dataclass(frozen=True)
class TagCount:
    """How many captions have a word."""

    tag: str
    count: int


@dataclass(frozen=True)
class PairCount:
    """How many captions have two words. The groups are those that the words mostly stand in."""

    left: str
    left_group: str
    right: str
    right_group: str
    count: int


@dataclass(frozen=True)
class Lengths:
    """How long captions are. `percentile_95`: 95 of 100 are at most this long."""

    unit: str
    minimum: int
    median: int
    mean: float
    percentile_95: int
    maximum: int

    def cells(self) -> tuple[str, ...]:
        """Return a line below LENGTHS_HEAD."""
        mean = f"{self.mean:,.1f}"
        return (
            self.unit,
            f"{self.minimum:,}",
            f"{self.median:,}",
            mean,
            f"{self.percentile_95:,}",
            f"{self.maximum:,}",
        )


class WordCounter:
    """Takes captions part by part.

    paired: groups whose words are counted in pairs. tokenizer: as in `clip_tokens.load_counter`; empty: no tokens.
    """

    def __init__(self, paired: Sequence[str] = ("character", "series"), *, tokenizer: str = "") -> None:
        self.num_captions = 0
        self.words: Counter[tuple[str, str]] = Counter()
        """By (group, word)."""
        self.first_words: Counter[tuple[str, str]] = Counter()
        """Only the first word of each group."""
        self._paired = pa.array(paired, pa.string())
        self._ids: dict[str, int] = {}
        self._pairs = _PairCounts()
        self._characters, self._num_words = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._num_tokens = np.zeros(1, np.int64)
        self._distinct = Words()
        self._counter = load_counter(tokenizer, self._distinct) if tokenizer else None

    def add(self, captions: pa.Table) -> None:
        """Count a table with the columns text and groups of schema.CAPTIONS."""
        self.num_captions += len(captions)
        groups = captions.column("groups").combine_chunks()
        entries = pc.list_flatten(groups)
        names, tags = pc.struct_field(entries, "group"), pc.struct_field(entries, "tags")
        entry_of = pc.list_parent_indices(tags)
        words, word_groups = pc.list_flatten(tags), names.take(entry_of)
        rows = np.asarray(pc.list_parent_indices(groups), dtype=np.int64)[np.asarray(entry_of)]
        is_first = np.diff(np.asarray(entry_of, dtype=np.int64), prepend=-1) != 0
        _count(self.words, word_groups, words)
        _count(self.first_words, word_groups.filter(pa.array(is_first)), words.filter(pa.array(is_first)))
        self._add_pairs(rows, words, pc.is_in(word_groups, value_set=self._paired))
        self._characters = _added(self._characters, np.asarray(pc.utf8_length(captions.column("text"))))
        self._num_words = _added(self._num_words, np.bincount(rows, minlength=len(captions)))
        if self._counter is not None:
            self._num_tokens = _added(self._num_tokens, self._tokens(self._counter, rows, words, len(captions)))

    def _tokens(self, counter: TokenCounter, rows: Counts, words: pa.Array, num_rows: int) -> Counts:
        """Return (N,) lengths in tokens; the last word of a caption has no comma behind it."""
        encoded = words.dictionary_encode()
        ids = np.array([self._distinct.number(word) for word in encoded.dictionary.to_pylist()], np.int64)
        own = ids[np.asarray(encoded.indices)]
        with_comma, alone = counter.counts()
        is_last = np.diff(rows, append=num_rows) != 0
        lengths = np.where(is_last, alone[own], with_comma[own])
        return np.bincount(rows, weights=lengths, minlength=num_rows).astype(np.int64)

    def _add_pairs(self, rows: Counts, words: pa.Array, is_paired: pa.Array) -> None:
        encoded = words.filter(is_paired).dictionary_encode()
        ids = np.array([self._ids.setdefault(it, len(self._ids)) for it in encoded.dictionary.to_pylist()], np.int64)
        if not len(ids):
            return
        own, own_rows = ids[np.asarray(encoded.indices)], rows[np.asarray(is_paired)]
        distance = 1
        while distance < len(own):
            is_same = own_rows[distance:] == own_rows[:-distance]
            if not is_same.any():
                break
            left, right = own[:-distance][is_same], own[distance:][is_same]
            self._pairs.add(np.minimum(left, right) << 32 | np.maximum(left, right))
            distance += 1

    def top_tags(self, top: int) -> dict[str, list[TagCount]]:
        """Return the most frequent words by group; of equally frequent ones the first by alphabet."""
        groups: dict[str, list[TagCount]] = {}
        for (group, word), count in sorted(self.words.items(), key=lambda item: (-item[1], item[0])):
            listed = groups.setdefault(group, [])
            if len(listed) < top:
                listed.append(TagCount(word, count))
        return groups

    def top_pairs(self, top: int) -> list[PairCount]:
        """Return the most frequent pairs."""
        pairs, counts = self._pairs.merged()
        names = list(self._ids)
        order = np.argsort(-counts, kind="stable")
        if len(order) > top:  # all that tie with the last one, so that the alphabet decides among them
            order = order[: int(np.searchsorted(-counts[order], -counts[order[top - 1]], side="right"))]
        groups = _usual_groups(self.words, self._paired.to_pylist())
        found = []
        for place in order.tolist():
            left, right = sorted(
                (names[int(pairs[place]) >> 32], names[int(pairs[place]) & 0xFFFFFFFF]),
                key=lambda word: (groups.get(word, ""), word),
            )
            found.append(PairCount(left, groups.get(left, ""), right, groups.get(right, ""), int(counts[place])))
        return sorted(found, key=lambda pair: (-pair.count, pair.left, pair.right))[:top]

    def lengths(self) -> list[Lengths]:
        """Return the lengths in characters, in words, and in tokens if they were counted."""
        if not self.num_captions:
            return []
        lengths = [_lengths("characters", self._characters), _lengths("words", self._num_words)]
        return lengths if self._counter is None else [*lengths, _lengths("CLIP tokens", self._num_tokens)]

    def token_windows(self) -> dict[str, int]:
        """Return how many captions need one token window of CLIP, two, three or more; empty without tokens.

        A window holds 75 tokens, start and end not counted.
        """
        if self._counter is None:
            return {}
        counts = self._num_tokens
        edges = [(0, 76, "up to 75"), (76, 151, "76 to 150"), (151, 226, "151 to 225"), (226, len(counts), "more")]
        return {name: int(counts[start:end].sum()) for start, end, name in edges}


class _PairCounts:
    """Sorted pairs with counts; what is added waits until there is as much as there was."""

    def __init__(self) -> None:
        self._pairs, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[Counts] = []
        self._num_waiting = 0

    def add(self, pairs: Counts) -> None:
        self._waiting.append(pairs)
        self._num_waiting += len(pairs)
        if self._num_waiting > max(_MANY_PAIRS, len(self._pairs)):
            self.merged()

    def merged(self) -> tuple[Counts, Counts]:
        pairs, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self._waiting]), return_counts=True)
        both = np.concatenate([self._pairs, pairs])
        self._pairs, which = np.unique(both, return_inverse=True)
        merged = np.zeros(len(self._pairs), np.int64)
        np.add.at(merged, which, np.concatenate([self._counts, counts]))
        self._counts, self._waiting, self._num_waiting = merged, [], 0
        return self._pairs, self._counts


def _usual_groups(words: Mapping[tuple[str, str], int], paired: Sequence[str]) -> dict[str, str]:
    usual: dict[str, tuple[int, str]] = {}
    for (group, word), count in words.items():
        if group in paired:
            usual[word] = max(usual.get(word, (0, "")), (count, group))
    return {word: group for word, (_, group) in usual.items()}


def _count(counter: Counter[tuple[str, str]], groups: pa.Array, words: pa.Array) -> None:
    pairs = pa.table({"group": groups, "word": words}).group_by(["group", "word"]).aggregate([([], "count_all")])
    columns = (pairs.column(name).to_pylist() for name in ("group", "word", "count_all"))
    for group, word, count in zip(*columns, strict=True):
        counter[group, word] += count


def _added(histogram: Counts, values: npt.NDArray[np.integer]) -> Counts:
    counts = np.bincount(values, minlength=len(histogram))
    counts[: len(histogram)] += histogram
    return counts


def _lengths(unit: str, histogram: Counts) -> Lengths:
    total, lengths = int(histogram.sum()), np.arange(len(histogram))
    is_there, upto = np.flatnonzero(histogram), np.cumsum(histogram)
    return Lengths(
        unit=unit,
        minimum=int(is_there[0]),
        median=int(np.searchsorted(upto, 0.5 * total)),
        mean=round(float(histogram @ lengths) / total, 2),
        percentile_95=int(np.searchsorted(upto, 0.95 * total)),
        maximum=int(is_there[-1]),
    )
